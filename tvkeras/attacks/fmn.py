"""Fast minimum norm: a ball whose radius jumps to the boundary, then closes in on it."""

import dataclasses
import math
from typing import Any, ClassVar

from keras import ops

from tvkeras import norms
from tvkeras.attacks.base import Attack
from tvkeras.attacks.parts import Nearest, clearance, clearly_misclassified, example_margins
from tvkeras.inference import Logits, Randomness, Tensor, input_gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastMinimumNorm(Attack):
    """FMN: the smallest perturbation it meets in l1, l2 or linf; takes no epsilon.

    Each step moves along the gradient of the margin z_label - max_other z, then
    projects onto the ball. Until an example is first misclassified, its radius is the
    distance so far plus |margin| / ||gradient||_*, the distance to the boundary of a
    linear classifier. From then on it shrinks below the best distance where the
    example is misclassified and grows where not. A cosine takes the l2 length of a step
    from 1 to 0.01, and the relative change of the radius from 0.05 to 0.001.
    Pixels that the step would push out of [0, 1] count as constants (not so in the
    paper: there a jump that ends at the bounds falls short of the boundary for ever).

    Attributes:
        norm: Norm of the perturbation: "l2", "linf" or "l1".
        steps: Gradient steps, and queries of each example.

    Reference: Pintor et al. (2021), arXiv:2102.12827.
    """

    steps: int = 100

    fixed_epsilon: ClassVar[bool] = False

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """The nearest misclassified point of the path, else the image."""
        farthest = norms.length(ops.maximum(images, 1.0 - images), self.norm)

        def step(number: Tensor, state: tuple[Any, ...]) -> tuple[Any, ...]:
            x_adv, radius, found, nearest = state
            margin, outputs, gradient = input_gradient(
                logits, x_adv, lambda outputs: example_margins(outputs, labels)
            )
            blocked = ops.where(gradient > 0, x_adv <= 0.0, x_adv >= 1.0)  # by the bounds
            gradient = ops.where(blocked, 0.0, gradient)
            wrong = clearly_misclassified(outputs, labels)
            distance = norms.length(x_adv - images, self.norm)
            nearest = nearest.after(x_adv, distance, wrong)
            found = ops.logical_or(found, wrong)

            phase = ops.cast(number, images.dtype) * (math.pi / self.steps)
            cosine = (1.0 + ops.cos(phase)) / 2.0
            change = 0.001 + 0.049 * cosine
            slope = ops.maximum(norms.dual_length(gradient, self.norm), 1e-30)
            jump = distance + (ops.absolute(margin) + 2.0 * clearance(outputs)) / slope
            grown = ops.where(found, radius * (1.0 + change), jump)
            shrunk = ops.minimum(radius * (1.0 - change), nearest.distance)
            radius = ops.minimum(ops.where(wrong, shrunk, grown), farthest)

            step_size = 0.01 + 0.99 * cosine
            moved = x_adv - step_size * norms.steepest_direction(gradient, "l2")
            perturbation = norms.project(moved - images, self.norm, radius)
            x_adv = ops.clip(images + perturbation, 0.0, 1.0)
            return x_adv, radius, found, nearest

        found = ops.zeros_like(labels, dtype="bool")
        state = (images, farthest, found, Nearest(images, farthest))
        nearest = ops.fori_loop(0, self.steps, step, state)[3]
        return nearest.x_adv, ops.full_like(labels, self.steps)
