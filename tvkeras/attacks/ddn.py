"""Decoupled direction and norm: an l2 ball that grows and shrinks around the boundary."""

import dataclasses
import math
from typing import Any, ClassVar

from keras import ops

from tvkeras import checks, norms
from tvkeras.attacks.base import Attack, by_example, clearly_misclassified, select, tempered
from tvkeras.inference import Logits, Randomness, example_losses, input_gradient

Tensor = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoupledDirectionNorm(Attack):
    """DDN: the smallest l2 perturbation it meets; takes no epsilon.

    Each step moves along the gradient of the cross-entropy, then rescales the
    perturbation to the radius, which shrinks by `radius_change` where the example is
    misclassified and grows by it elsewhere. Steps shorten from 1 to 0.01 by a cosine.
    Logits are `tempered` (not so in the paper): large ones lose no attack.

    Attributes:
        norm: "l2".
        steps: Gradient steps, and queries of each example.
        initial_radius: Length of the first perturbation, in pixel units.
        radius_change: Relative change of the radius in a step.

    Raises:
        ValueError: For an illegal argument.

    Reference: Rony et al. (2019), arXiv:1811.09600.
    """

    steps: int = 100
    initial_radius: float = 1.0
    radius_change: float = 0.05

    fixed_epsilon: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, ["l2"])
        checks.whole_number("steps", self.steps, minimum=1)
        checks.number("initial_radius", self.initial_radius, minimum=0.0, exclusive=True)
        checks.number("radius_change", self.radius_change, minimum=0.0, maximum=1.0, exclusive=True)

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """The nearest misclassified point of the path, else the image."""
        farthest = norms.length(ops.maximum(images, 1.0 - images), "l2")

        def step(number: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x_adv, radius, best, best_distance = state
            _, outputs, gradient = input_gradient(
                logits, x_adv, lambda outputs: example_losses(tempered(outputs, labels), labels)
            )
            wrong = clearly_misclassified(outputs, labels)
            distance = norms.length(x_adv - images, "l2")
            better = ops.logical_and(wrong, distance <= best_distance)
            best = select(better, x_adv, best)
            best_distance = ops.where(better, distance, best_distance)

            phase = ops.cast(number, images.dtype) * (math.pi / self.steps)
            step_size = 0.01 + 0.99 * (1.0 + ops.cos(phase)) / 2.0
            moved = x_adv + step_size * norms.steepest_direction(gradient, "l2")
            change = ops.where(wrong, 1.0 - self.radius_change, 1.0 + self.radius_change)
            radius = ops.minimum(radius * ops.cast(change, radius.dtype), farthest)
            direction = norms.steepest_direction(moved - images, "l2")
            x_adv = ops.clip(images + by_example(radius) * direction, 0.0, 1.0)
            return x_adv, radius, best, best_distance

        radius = ops.full_like(farthest, self.initial_radius)
        _, _, best, _ = ops.fori_loop(0, self.steps, step, (images, radius, images, farthest))
        return best, ops.full_like(labels, self.steps)
