"""Carlini and Wagner's l2 attack, and its variant that a gradient-norm detector misses."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np
from keras import ops

from tvkeras import backends, checks, norms
from tvkeras.attacks.base import Attack
from tvkeras.attacks.parts import Nearest, clearly_misclassified, example_margins
from tvkeras.inference import (
    STATISTICS,
    CompiledClassifier,
    Logits,
    Randomness,
    Tensor,
    gradient_norm,
    measured,
)

_CAUTION = 0.999  # share of the threshold aimed at: rounding must not betray a success


class _Descent(NamedTuple):
    """Adam's state, the loss when last compared, who goes on, and what was found."""

    moments: tuple[Tensor, Tensor, Tensor]
    compared: Tensor
    running: Tensor
    found: Tensor
    nearest: Nearest
    queries: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class CarliniWagner(Attack):
    """C&W: the nearest success of Adam on ||x_adv - x||^2 + c max(0, margin).

    With the margin z_label - max_other z and x_adv = (tanh(w) + 1) / 2, always inside
    the bounds. A binary search for each example looks for the smallest weight c that
    succeeds. An example's descent ends when a tenth of the steps gains under 0.01 %,
    whatever the rest of its batch does.

    Attributes:
        norm: "l2".
        steps: Adam steps for each weight, at most.
        step_size: Adam's learning rate, in the space of w.
        search_steps: Weights tried for each example; ten times the last until one succeeds.
        initial_weight: The first.

    Reference: Carlini & Wagner (2017), arXiv:1608.04644.
    """

    steps: int = 1000
    step_size: float = 0.01
    search_steps: int = 9
    initial_weight: float = 1e-3

    fixed_epsilon: ClassVar[bool] = False
    legal_norms: ClassVar[tuple[str, ...]] = ("l2",)

    def objective(
        self, logits: Logits, x_adv: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """What the weight multiplies, who succeeds, and model calls per example."""
        outputs = logits(x_adv)
        losses = ops.maximum(example_margins(outputs, labels), 0.0)
        return losses, clearly_misclassified(outputs, labels), 1

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """The nearest success of all descents, else the image."""

        def attempt(_: Tensor, state: tuple[Any, ...]) -> tuple[Any, ...]:
            weight, low, high, nearest, queries = state
            nearest, found, calls = self.descend(logits, images, labels, weight, nearest)
            low, high = ops.where(found, low, weight), ops.where(found, weight, high)
            between = (low + ops.where(ops.isinf(high), 0.0, high)) / 2.0
            weight = ops.where(ops.isinf(high), weight * 10.0, between)
            return weight, low, high, nearest, queries + calls

        zeros = ops.zeros_like(images[:, 0, 0, 0])
        infinite = zeros + np.inf
        nearest, queries = Nearest(images, infinite), ops.zeros_like(labels)
        state = (zeros + self.initial_weight, zeros, infinite, nearest, queries)
        *_, nearest, queries = ops.fori_loop(0, self.search_steps, attempt, state)
        return nearest.x_adv, queries

    def descend(
        self, logits: Logits, images: Tensor, labels: Tensor, weight: Tensor, nearest: Nearest
    ) -> tuple[Nearest, Tensor, Tensor]:
        """Adam from the image: the nearest success so far, who succeeded here, and queries."""
        start = ops.arctanh((2.0 * images - 1.0) * 0.999999)
        origin = (ops.tanh(start) + 1.0) / 2.0

        def total(shift: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
            x_adv = (ops.tanh(start + shift) + 1.0) / 2.0
            losses, success, calls = self.objective(logits, x_adv, labels)
            squared = ops.sum(ops.square(x_adv - origin), axis=(1, 2, 3))
            totals = squared + weight * losses
            return ops.sum(totals), (totals, x_adv, success, calls)

        def step(number: Tensor, descent: _Descent) -> tuple[Tensor, _Descent]:
            (_, aux), (gradient,) = backends.value_and_gradient(total, (descent.moments[0],))
            totals, x_adv, success, calls = aux
            queries = descent.queries + calls * ops.cast(descent.running, labels.dtype)
            compares = number % -(-self.steps // 10) == 0
            stuck = ops.logical_and(compares, totals > 0.9999 * descent.compared)
            running = ops.logical_and(descent.running, ops.logical_not(stuck))
            success = ops.logical_and(success, running)
            distance = norms.length(x_adv - images, "l2")
            return number + 1, _Descent(
                moments=adam(number, gradient, descent.moments, self.step_size),
                compared=ops.where(compares, totals, descent.compared),
                running=running,
                found=ops.logical_or(descent.found, success),
                nearest=descent.nearest.after(x_adv, distance, success),
                queries=queries,
            )

        zeros, nobody = ops.zeros_like(images), ops.zeros_like(labels, dtype="bool")
        descent = _Descent(
            moments=(zeros, zeros, zeros),
            compared=ops.full_like(weight, np.inf),
            running=ops.logical_not(nobody),
            found=nobody,
            nearest=nearest,
            queries=ops.zeros_like(labels),
        )
        _, descent = ops.while_loop(
            lambda number, descent: ops.any(descent.running),
            step,
            (ops.zeros((), "int32"), descent),
            maximum_iterations=self.steps,
        )
        return descent.nearest, descent.found, descent.queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvasiveCarliniWagner(CarliniWagner):
    """C&W that a detector of large gradients does not notice.

    An image is a success only if it is misclassified and the size s of its gradient
    is under the detector's threshold t. The weight c multiplies

        1 + max(0, margin)          where the class is still right,
        L / (1 + L), L = log(s / t)  where it is not and s > t, else 0,

    and one binary search finds it for both. (The gradient is largest at the boundary
    between classes: a penalty on the near side too would keep the image from crossing
    it. The bounded penalty is always less than what it follows.)

    Attributes:
        norm: "l2".
        threshold: The detector notices gradients of this size or more.
        statistic: What it measures, "loss" or "model": see `tvkeras.detection`.
        detector_norm: Threat norm whose dual measures its gradients.

    Reference: Finlay et al. (2019), arXiv:1808.09540; Carlini & Wagner (2017),
    arXiv:1705.07263, on detectors in general.
    """

    threshold: float
    statistic: str = "loss"
    detector_norm: str = "l2"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        checks.one_of("statistic", self.statistic, STATISTICS)
        checks.one_of("detector_norm", self.detector_norm, norms.DUALS)

    def fools(
        self, model: CompiledClassifier, images: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Which images are misclassified and unnoticed."""
        sizes = measured(model, images, self.detector_norm, self.statistic)
        return super().fools(model, images, labels) & (sizes < self.threshold)

    def objective(
        self, logits: Logits, x_adv: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """What the weight multiplies, who succeeds, and model calls per example."""
        sizes, outputs, calls = gradient_norm(logits, x_adv, self.detector_norm, self.statistic)
        wrong = clearly_misclassified(outputs, labels)
        excess = ops.log(ops.maximum(sizes / (_CAUTION * self.threshold), 1.0))
        margins = ops.maximum(example_margins(outputs, labels), 0.0)
        losses = ops.where(wrong, excess / (1.0 + excess), 1.0 + margins)
        return losses, ops.logical_and(wrong, excess == 0.0), calls


def adam(
    number: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor, Tensor], step_size: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Step `number`, from 0, of Adam: what moves, and the averages of gradient and square."""
    x, mean, square = moments
    time = ops.cast(number + 1, gradient.dtype)
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.999 * square + 0.001 * ops.square(gradient)
    unbiased = mean / (1.0 - ops.power(0.9, time))
    spread = ops.sqrt(square / (1.0 - ops.power(0.999, time))) + 1e-8
    return x - step_size * unbiased / spread, mean, square
