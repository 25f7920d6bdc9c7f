"""Fast minimum norm: a ball whose radius jumps to the boundary, then closes in on it."""

import dataclasses
import math
from typing import Any, ClassVar

from keras import ops

from tvkeras import checks, norms
from tvkeras.attacks.base import Attack, clearance, clearly_misclassified, example_margins, select
from tvkeras.inference import Logits, Randomness, input_gradient

Tensor = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastMinimumNorm(Attack):
    """FMN: the smallest perturbation it meets in l1, l2 or linf; takes no epsilon.

    Each step moves along the gradient of the margin z_label - max_other z, then
    projects onto the ball. Until an example is first misclassified, its radius is the
    distance so far plus |margin| / ||gradient||_*, the distance to the boundary of a
    linear classifier. From then on it shrinks below the best distance where the
    example is misclassified and grows where not, by a share that falls with the steps.
    Pixels that the step would push out of [0, 1] count as constants (not so in the
    paper: there a jump that ends at the bounds falls short of the boundary for ever).

    Attributes:
        norm: Norm of the perturbation: "l2", "linf" or "l1".
        steps: Gradient steps, and queries of each example.
        step_size: l2 length of the first step, in pixel units; a cosine shortens the
            steps to a hundredth of it.
        radius_change: Relative change of the radius in a step; falls to 0.001.

    Raises:
        ValueError: For an illegal argument.

    Reference: Pintor et al. (2021), arXiv:2102.12827.
    """

    steps: int = 100
    step_size: float = 1.0
    radius_change: float = 0.05

    fixed_epsilon: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        checks.whole_number("steps", self.steps, minimum=1)
        checks.number("step_size", self.step_size, minimum=0.0, exclusive=True)
        checks.number("radius_change", self.radius_change, minimum=0.001, maximum=1.0)

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """The nearest misclassified point of the path, else the image."""
        farthest = norms.length(ops.maximum(images, 1.0 - images), self.norm)

        def step(number: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x_adv, radius, found, best, best_distance = state
            margin, outputs, gradient = input_gradient(
                logits, x_adv, lambda outputs: example_margins(outputs, labels)
            )
            blocked = ops.where(gradient > 0, x_adv <= 0.0, x_adv >= 1.0)  # by the bounds
            gradient = ops.where(blocked, 0.0, gradient)
            wrong = clearly_misclassified(outputs, labels)
            distance = norms.length(x_adv - images, self.norm)
            better = ops.logical_and(wrong, distance <= best_distance)
            best = select(better, x_adv, best)
            best_distance = ops.where(better, distance, best_distance)
            found = ops.logical_or(found, wrong)

            phase = ops.cast(number, images.dtype) * (math.pi / self.steps)
            cosine = (1.0 + ops.cos(phase)) / 2.0
            change = 0.001 + (self.radius_change - 0.001) * cosine
            slope = ops.maximum(norms.dual_length(gradient, self.norm), 1e-30)
            jump = distance + (ops.absolute(margin) + 2.0 * clearance(outputs)) / slope
            grown = ops.where(found, radius * (1.0 + change), jump)
            shrunk = ops.minimum(radius * (1.0 - change), best_distance)
            radius = ops.minimum(ops.where(wrong, shrunk, grown), farthest)

            step_size = self.step_size * (0.01 + 0.99 * cosine)
            moved = x_adv - step_size * norms.steepest_direction(gradient, "l2")
            perturbation = norms.project(moved - images, self.norm, radius)
            x_adv = ops.clip(images + perturbation, 0.0, 1.0)
            return x_adv, radius, found, best, best_distance

        found = ops.zeros_like(labels, dtype="bool")
        state = (images, farthest, found, images, farthest)
        best = ops.fori_loop(0, self.steps, step, state)[3]
        return best, ops.full_like(labels, self.steps)
