"""Auto-PGD: projected gradient ascent with momentum that chooses its own step size."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import keras
import numpy as np
from keras import ops

from tvkeras import checks, norms
from tvkeras.attacks.base import Attack, Batch
from tvkeras.attacks.parts import (
    Standing,
    by_example,
    class_logits,
    example_margins,
    misclassified,
    select,
)
from tvkeras.inference import Logits, Randomness, Tensor, example_losses, input_gradient

CLASSES = {"ce": 2, "dlr": 3, "targeted_dlr": 4}  # the fewest classes of each loss
_MOMENTUM = 0.75
_ENOUGH_INCREASES = 0.75
_SMALLEST = 16  # examples; to compile for fewer would not pay


class _Ascent(NamedTuple):
    """One ascent between two gradients; by example where nothing else is said."""

    step: Tensor  # scalar: gradients taken
    x: Tensor
    x_before: Tensor
    loss: Tensor
    x_best: Tensor
    gradient_best: Tensor
    loss_best: Tensor
    step_size: Tensor
    increases: Tensor  # steps since the last checkpoint that raised the loss
    halved: Tensor  # whether the last checkpoint halved the step size
    loss_then: Tensor  # loss_best at the last checkpoint
    outcome: Standing


class _Given(NamedTuple):
    """What `Attack.perturb` is given, of the examples that are left of a batch of `whole`."""

    logits: Logits
    images: Tensor
    labels: Tensor
    epsilon: Tensor
    random: Randomness
    whole: int


class _Search(NamedTuple):
    """One ascent after another, between two gradients; by example where nothing else is said."""

    attempt: Tensor  # scalar: ascents made
    order: Tensor  # classes in the order of the image's logits
    rows: Tensor  # places in the batch as it was given
    ascent: _Ascent


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoPGD(Attack):
    """APGD, at a fixed epsilon: an ascent that stops an example at its first success.

    A step of length η goes along the steepest direction, is projected, and keeps a
    quarter of the step before. η begins at 2 epsilon. At checkpoints (after 22, 41,
    57, 70, 80, 87, 93 and 99 of 100 steps) it is halved, and the ascent goes on from
    the best point, where at most three quarters of the steps since the last checkpoint
    raised the loss, or where the best loss and η are those of the last checkpoint.

    Attributes:
        norm: Norm of the perturbation: "l2" or "linf".
        loss: "ce", the cross-entropy; "dlr", the difference of logits ratio; or
            "targeted_dlr", the same with respect to one class after another.
        steps: Steps of an ascent; each takes one gradient, and so does its start.
        restarts: Ascents from random points of the ball's surface, for each target.
        targets: Classes that "targeted_dlr" turns to, in the order of the image's
            logits; at most all the others.

    Raises:
        ValueError: For an illegal argument, and on a call with fewer classes than the
            loss needs: 3 for "dlr", 4 for "targeted_dlr".

    Reference: Croce & Hein (2020), arXiv:2003.01690.
    """

    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 9

    fixed_epsilon: ClassVar[bool] = True
    legal_norms: ClassVar[tuple[str, ...]] = ("l2", "linf")

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        checks.one_of("loss", self.loss, CLASSES)

    def search(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Attacks one batch; once half of it is broken, the rest goes on as a smaller one."""
        model, count = batch.model, len(batch.images)
        if not _half(count):
            return super().search(batch)

        def given(logits: Logits, *tensors: Tensor) -> _Given:
            images, labels, epsilon, seed = tensors
            return _Given(logits, images, labels, epsilon, model.randomness(seed), count)

        def begin(logits: Logits, *tensors: Tensor) -> _Search:
            return self._begin(given(logits, *tensors))

        def go_on(logits: Logits, state: _Search, few: Tensor, *tensors: Tensor) -> _Search:
            return self._go_on(given(logits, *tensors), state, few)

        x_adv, queries = batch.images.copy(), np.zeros(count, int)
        state = model.compiled((self, "begin", count), begin)(*batch.arrays)
        call = model.compiled((self, "go on", count), go_on)
        while True:
            rows, few = state.rows, _half(len(state.rows))
            left = batch._replace(images=batch.images[rows], labels=batch.labels[rows])
            state = call(state, np.int32(few), *left.arrays)
            standing, x_adv[rows], queries[rows] = state.ascent.outcome
            if not 0 < standing.sum() <= few:
                return x_adv, queries
            while standing.sum() <= _half(few):
                few = _half(few)
            kept = np.argsort(~standing, kind="stable")[:few]
            state = keras.tree.map_structure(lambda a, kept=kept: a[kept] if a.ndim else a, state)

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """One ascent after another, until every example has failed or all are made."""
        given = _Given(logits, images, labels, epsilon, random, ops.shape(images)[0])
        outcome = self._go_on(given, self._begin(given), few=0).ascent.outcome
        return outcome.x_adv, outcome.queries

    def _begin(self, given: _Given) -> _Search:
        clean = given.logits(given.images)
        num_classes = clean.shape[1]
        _check_classes(self.loss, num_classes)
        targets = min(self.targets, num_classes - 1) if self.loss == "targeted_dlr" else 1
        attempt, rows = ops.zeros((), "int32"), ops.arange(given.whole)
        outcome = Standing.before(clean, given.images, given.labels)
        ascent = self._at_random(given, attempt, rows, outcome)
        return _Search(attempt, ops.top_k(clean, targets + 1)[1], rows, ascent)

    def _go_on(self, given: _Given, state: _Search, few: Tensor) -> _Search:
        """Goes on until all ascents are made, or no more than `few` examples stand."""
        attempts = (state.order.shape[1] - 1) * self.restarts

        def many(outcome: Standing) -> Tensor:
            return ops.sum(ops.cast(outcome.standing, "int32")) > few

        def unfinished(state: _Search) -> Tensor:
            return ops.logical_and(state.attempt < attempts, many(state.ascent.outcome))

        def ascend(state: _Search) -> tuple[_Search]:
            target = ops.take(state.order, state.attempt // self.restarts + 1, axis=1)

            def loss(outputs: Tensor) -> Tensor:
                if self.loss == "ce":
                    return example_losses(outputs, given.labels)
                if self.loss == "dlr":
                    return dlr_losses(outputs, given.labels)
                return targeted_dlr_losses(outputs, given.labels, target)

            ascent = self._ascend(given, loss, state.ascent, many)
            over = ascent.step > self.steps
            attempt = state.attempt + ops.cast(over, "int32")
            following = self._at_random(given, attempt, state.rows, ascent.outcome)
            ascent = keras.tree.map_structure(
                lambda new, old: ops.where(over, new, old), following, ascent
            )
            return (state._replace(attempt=attempt, ascent=ascent),)

        return ops.while_loop(unfinished, ascend, (state,))[0]

    def _at_random(
        self, given: _Given, attempt: Tensor, rows: Tensor, outcome: Standing
    ) -> _Ascent:
        """The ascent from random points of the balls' surfaces, whichever examples are left."""
        images = given.images
        with given.random.at(attempt) as seed:
            draw = keras.random.normal if self.norm == "l2" else _uniform
            noise = draw((given.whole, *images.shape[1:]), dtype=images.dtype, seed=seed)
        noise = ops.take(noise, rows, axis=0)
        radius = given.epsilon / ops.maximum(norms.length(noise, self.norm), 1e-12)
        x = ops.clip(images + by_example(radius) * noise, 0.0, 1.0)
        return _start(x, outcome, 2 * given.epsilon)

    def _ascend(
        self,
        given: _Given,
        loss: Callable[[Tensor], Tensor],
        state: _Ascent,
        many: Callable[[Standing], Tensor],
    ) -> _Ascent:
        """Takes steps until all are done or not `many` examples stand."""
        logits, images, labels, epsilon, *_ = given
        windows = ops.convert_to_tensor(_windows(self.steps))

        def clip(x: Tensor) -> Tensor:
            return ops.clip(images + norms.project(x - images, self.norm, epsilon), 0.0, 1.0)

        def unfinished(state: _Ascent) -> Tensor:
            return ops.logical_and(state.step <= self.steps, many(state.outcome))

        def step(state: _Ascent) -> tuple[_Ascent]:
            losses, outputs, gradient = input_gradient(logits, state.x, loss)
            state = _record(state, misclassified(outputs, labels), losses, gradient)
            window = ops.take(windows, state.step, axis=0)
            state, gradient = _adapt(state, window, gradient)
            direction = norms.steepest_direction(gradient, self.norm)
            ahead = clip(state.x + by_example(state.step_size) * direction)
            kept = (1 - _MOMENTUM) * ops.cast(state.step > 0, images.dtype)
            x = clip((1 - kept) * ahead + kept * (2 * state.x - state.x_before))
            return (state._replace(step=state.step + 1, x=x, x_before=state.x),)

        return ops.while_loop(unfinished, step, (state,))[0]


def dlr_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, larger the nearer an example is to be misclassified.

    -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)), where z_(i) is the i-th largest logit:
    invariant to shifts and scales of the logits.

    Args:
        logits: Shape `(batch, num_classes)` with at least 3 classes.
        labels: Shape `(batch,)`.

    Returns:
        Shape `(batch,)`; 0 where the three largest logits are equal.

    Reference: Croce & Hein (2020), arXiv:2003.01690, equation 6.
    """
    _check_classes("dlr", logits.shape[1])
    top = ops.top_k(logits, 3)[0]
    return -example_margins(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr_losses(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Difference of logits ratio between label y and target t.

    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), where z_(i) is the i-th largest logit.

    Args:
        logits: Shape `(batch, num_classes)` with at least 4 classes.
        labels: Shape `(batch,)`.
        targets: Shape `(batch,)`.

    Returns:
        Shape `(batch,)`; 0 where the four largest logits are equal.

    Reference: Croce & Hein (2020), arXiv:2003.01690, equation 7.
    """
    _check_classes("targeted_dlr", logits.shape[1])
    top = ops.top_k(logits, 4)[0]
    difference = class_logits(logits, targets) - class_logits(logits, labels)
    return difference / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def _half(size: int) -> int:
    """Half of a batch; 0 where that is too small."""
    return size // 2 if size >= 2 * _SMALLEST else 0


def _check_classes(loss: str, num_classes: int) -> None:
    if num_classes < CLASSES[loss]:
        raise ValueError(
            f"loss={loss!r} must meet at least {CLASSES[loss]} classes, got {num_classes}. "
            f"Use loss={'dlr' if num_classes == 3 else 'ce'!r}."
        )


def _uniform(shape: Any, dtype: str, seed: keras.random.SeedGenerator) -> Tensor:
    return keras.random.uniform(shape, -1.0, 1.0, dtype=dtype, seed=seed)


def _windows(steps: int) -> np.ndarray:
    """At each checkpoint, the number of steps since the one before; elsewhere 0."""
    windows = np.zeros(steps + 1, "int32")
    length, step = max(int(0.22 * steps), 1), 0
    while (step := step + length) <= steps:
        windows[step] = length
        length = max(length - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return windows


def _start(x: Tensor, outcome: Standing, step_size: Tensor) -> _Ascent:
    infinite = ops.full_like(x[:, 0, 0, 0], np.inf)
    return _Ascent(
        step=ops.zeros((), "int32"),
        x=x,
        x_before=x,
        loss=infinite,
        x_best=x,
        gradient_best=ops.zeros_like(x),
        loss_best=-infinite,
        step_size=step_size * ops.ones_like(infinite),
        increases=ops.zeros_like(outcome.queries),
        halved=ops.ones_like(outcome.standing),
        loss_then=-infinite,
        outcome=outcome,
    )


def _record(state: _Ascent, missed: Tensor, loss: Tensor, gradient: Tensor) -> _Ascent:
    """Takes down what the classifier says of `state.x`."""
    better = loss > state.loss_best
    return state._replace(
        loss=loss,
        x_best=select(better, state.x, state.x_best),
        gradient_best=select(better, gradient, state.gradient_best),
        loss_best=ops.where(better, loss, state.loss_best),
        increases=state.increases + ops.cast(loss > state.loss, "int32"),
        outcome=state.outcome.after(state.x, missed),
    )


def _adapt(state: _Ascent, window: Tensor, gradient: Tensor) -> tuple[_Ascent, Tensor]:
    """At a checkpoint, halves the step size of the examples that make no progress."""
    checkpoint = window > 0
    few = ops.cast(state.increases, "float32") <= _ENOUGH_INCREASES * ops.cast(window, "float32")
    stalled = ops.logical_and(ops.logical_not(state.halved), state.loss_then >= state.loss_best)
    halve = ops.logical_and(checkpoint, ops.logical_or(few, stalled))
    gradient = select(halve, state.gradient_best, gradient)
    return state._replace(
        x=select(halve, state.x_best, state.x),
        step_size=ops.where(halve, state.step_size / 2, state.step_size),
        increases=ops.where(checkpoint, 0, state.increases),
        halved=ops.where(checkpoint, halve, state.halved),
        loss_then=ops.where(checkpoint, state.loss_best, state.loss_then),
    ), gradient
