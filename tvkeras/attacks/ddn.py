"""Decoupled direction and norm: an l2 ball that grows and shrinks around the boundary."""

import dataclasses
import math
from typing import Any, ClassVar

from keras import ops

from tvkeras import norms
from tvkeras.attacks.base import Attack
from tvkeras.attacks.parts import Nearest, by_example, clearly_misclassified, tempered
from tvkeras.inference import Logits, Randomness, Tensor, example_losses, input_gradient

_RADIUS_CHANGE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoupledDirectionNorm(Attack):
    """DDN: the smallest l2 perturbation it meets; takes no epsilon.

    Each step moves along the gradient of the cross-entropy, then rescales the
    perturbation to the radius, 1 at first, which shrinks by 5 % where the example is
    misclassified and grows by it elsewhere. Steps shorten from 1 to 0.01 by a cosine.
    Logits are `tempered` (not so in the paper): large ones lose no attack.

    Attributes:
        norm: "l2".
        steps: Gradient steps, and queries of each example.

    Reference: Rony et al. (2019), arXiv:1811.09600.
    """

    steps: int = 100

    fixed_epsilon: ClassVar[bool] = False
    legal_norms: ClassVar[tuple[str, ...]] = ("l2",)

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """The nearest misclassified point of the path, else the image."""
        farthest = norms.length(ops.maximum(images, 1.0 - images), "l2")

        def step(number: Tensor, state: tuple[Any, ...]) -> tuple[Any, ...]:
            x_adv, radius, nearest = state
            _, outputs, gradient = input_gradient(
                logits, x_adv, lambda outputs: example_losses(tempered(outputs, labels), labels)
            )
            wrong = clearly_misclassified(outputs, labels)
            distance = norms.length(x_adv - images, "l2")
            nearest = nearest.after(x_adv, distance, wrong)

            phase = ops.cast(number, images.dtype) * (math.pi / self.steps)
            step_size = 0.01 + 0.99 * (1.0 + ops.cos(phase)) / 2.0
            moved = x_adv + step_size * norms.steepest_direction(gradient, "l2")
            change = ops.where(wrong, 1.0 - _RADIUS_CHANGE, 1.0 + _RADIUS_CHANGE)
            radius = ops.minimum(radius * ops.cast(change, radius.dtype), farthest)
            direction = norms.steepest_direction(moved - images, "l2")
            x_adv = ops.clip(images + by_example(radius) * direction, 0.0, 1.0)
            return x_adv, radius, nearest

        state = (images, ops.ones_like(farthest), Nearest(images, farthest))
        nearest = ops.fori_loop(0, self.steps, step, state)[2]
        return nearest.x_adv, ops.full_like(labels, self.steps)
