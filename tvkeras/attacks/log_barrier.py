"""LogBarrier: a descent towards the image that a barrier keeps beyond the boundary."""

import dataclasses
from typing import Any, ClassVar

import keras
from keras import ops

from tvkeras import checks, norms
from tvkeras.attacks.base import (
    Attack,
    Logits,
    Randomness,
    by_example,
    clearance,
    clearly_misclassified,
    example_margins,
    input_gradient,
    select,
)

Tensor = Any

_LEVELS = 20  # of noise to start from
_BISECTIONS = 10
_NEAR_LARGEST = 0.95  # pixels that linf's gradient moves, over the largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogBarrier(Attack):
    """The smallest perturbation met on a path among misclassified points; no epsilon.

    The path starts from noise, just loud enough to be misclassified, bisected towards
    the image. It descends ||u - x||^2 / 2 - w D^2 log(max_other z(u) - z_label(u)), where
    D is the shortest l2 distance so far and w falls from round to round. A step that
    crosses the boundary goes halfway back until it does not. Coming from that side, it
    finds other minima than DDN and FMN do, seldom nearer ones.

    w is relative to D, the barrier to the logits' scale: neither unit matters (in the
    paper w is absolute). For linf the gradient of the distance acts on all pixels
    within 5 % of the largest change.

    Attributes:
        norm: Norm of the perturbation: "l2" or "linf".
        rounds: Rounds.
        steps: Gradient steps in a round.
        step_size: Length of a step over the gradient's.
        weight: w in the first round.
        decay: Factor of w from round to round.

    Raises:
        ValueError: For an illegal argument.

    Reference: Finlay, Pooladian & Oberman (2019), arXiv:1903.10396.
    """

    rounds: int = 16
    steps: int = 25
    step_size: float = 0.1
    weight: float = 0.1
    decay: float = 0.65

    fixed_epsilon: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, ("l2", "linf"))
        checks.whole_number("rounds", self.rounds, minimum=1)
        checks.whole_number("steps", self.steps, minimum=1)
        for name in ("step_size", "weight", "decay"):
            checks.number(name, getattr(self, name), minimum=0.0, maximum=1.0, exclusive=True)

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """The nearest misclassified point of the path, else the image."""

        def step(number: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x_adv, inside, best, best_distance, best_length = state
            margin, outputs, gradient = input_gradient(
                logits, x_adv, lambda outputs: example_margins(outputs, labels)
            )
            beyond = -margin > clearance(outputs)
            inside = select(beyond, x_adv, inside)
            perturbation = x_adv - images
            distance = norms.length(perturbation, self.norm)
            better = ops.logical_and(beyond, distance < best_distance)
            best = select(better, x_adv, best)
            best_distance = ops.where(better, distance, best_distance)
            length = norms.length(perturbation, "l2")
            best_length = ops.where(better, length, best_length)

            weight = self.weight * ops.power(
                ops.convert_to_tensor(self.decay, images.dtype),
                ops.cast(number // self.steps, images.dtype),
            )
            slope = weight * ops.square(best_length) / ops.where(beyond, margin, 1.0)
            away = self._distance_gradient(perturbation, distance)
            move = -self.step_size * (away - by_example(slope) * gradient)
            longest = length / (2.0 * ops.maximum(norms.length(move, "l2"), 1e-30))
            moved = ops.clip(x_adv + by_example(ops.minimum(1.0, longest)) * move, 0.0, 1.0)
            x_adv = select(beyond, moved, (x_adv + inside) / 2.0)
            return x_adv, inside, best, best_distance, best_length

        start = _at_boundary(logits, images, labels, _noisy(logits, images, labels, random))
        far = norms.length(ops.ones_like(images), "l2")
        state = (start, start, images, far, far)
        count = self.rounds * self.steps
        best = ops.fori_loop(0, count, step, state)[2]
        return best, ops.full_like(labels, _LEVELS + _BISECTIONS + count)

    def _distance_gradient(self, perturbation: Tensor, distance: Tensor) -> Tensor:
        if self.norm == "l2":
            return perturbation
        largest = ops.abs(perturbation) >= _NEAR_LARGEST * by_example(distance)
        return ops.where(largest, perturbation, 0.0)


def _noisy(logits: Logits, images: Tensor, labels: Tensor, random: Randomness) -> Tensor:
    """Images in the least noise, of standard deviation 0.1 to 2, that is misclassified."""

    def draw(number: Tensor, noisy: Tensor) -> Tensor:
        with random.at(number) as seed:
            noise = keras.random.normal(ops.shape(images), dtype=images.dtype, seed=seed)
        deviation = 0.1 * ops.cast(_LEVELS - number, images.dtype)
        candidate = ops.clip(images + deviation * noise, 0.0, 1.0)
        return select(clearly_misclassified(logits(candidate), labels), candidate, noisy)

    return ops.fori_loop(0, _LEVELS, draw, images)


def _at_boundary(logits: Logits, images: Tensor, labels: Tensor, far: Tensor) -> Tensor:
    """Misclassified points between the images and `far`, near the boundary."""

    def halve(_: Tensor, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        near, far = ends
        middle = (near + far) / 2.0
        wrong = clearly_misclassified(logits(middle), labels)
        return select(wrong, near, middle), select(wrong, middle, far)

    return ops.fori_loop(0, _BISECTIONS, halve, (images, far))[1]
