"""What each defence minimises, and the gradient of it at one batch.

A defence is a frozen dataclass with one method, `update(batch)`, written in
`keras.ops` for every backend. `TrainingBatch` gives it the classifier as a pure
function of weights and images; `Update` is what the training step needs back.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import keras
from keras import ops

from tvkeras import backends, checks, norms

Tensor = Any


class Outputs(NamedTuple):
    """One evaluation of the classifier in training mode.

    Attributes:
        loss: Weighted mean of `example_loss` plus `auxiliary`, a scalar.
        example_loss: Shape `(batch,)`, without sample weights.
        logits: Shape `(batch, num_classes)`.
        state: Non-trainable variables after the call: BatchNorm statistics, seeds.
    """

    loss: Tensor
    example_loss: Tensor
    logits: Tensor
    state: Sequence[Tensor]


class Update(NamedTuple):
    """Result of one training step before the optimizer sees it.

    Attributes:
        gradients: One for each trainable variable, times the batch's loss scale.
        loss: The value of the defence's objective, a scalar.
        logits: For the metrics, shape `(batch, num_classes)`.
        state: Non-trainable variables after the step.
        penalties: Scalars to log, by name.
    """

    gradients: Sequence[Tensor]
    loss: Tensor
    logits: Tensor
    state: Sequence[Tensor]
    penalties: Mapping[str, Tensor] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """A batch and the classifier as a pure function of weights and images.

    Every call starts from the same non-trainable state, so that a second pass
    replays the first one's dropout masks and leaves BatchNorm's moving statistics
    to the pass whose `state` the defence returns.

    Attributes:
        call: Maps (trainable, images) to (logits, state, auxiliary loss).
        example_loss: Maps (labels, logits) to losses of shape `(batch,)`.
        trainable: Values of the trainable variables.
        images: Shape `(batch, height, width, channels)`, in [0, 1].
        labels: Shape `(batch,)`, or `(batch, num_classes)` for soft labels.
        sample_weight: Shape `(batch,)`, or None.
        loss_scale: Factor on every gradient, for float16.
        stochastic: Whether the classifier draws random numbers, as dropout does.
        seed: Source of the defence's own random numbers.
        strength: Factor, at most 1, on the defence's weights (of `AdversarialTraining`, on
            its radius and step), while they are ramped up.
        step: Steps that were done before.
    """

    call: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Sequence[Tensor], Tensor]]
    example_loss: Callable[[Tensor, Tensor], Tensor]
    trainable: Sequence[Tensor]
    images: Tensor
    labels: Tensor
    sample_weight: Tensor | None
    loss_scale: Tensor | float
    stochastic: bool
    seed: keras.random.SeedGenerator
    strength: Tensor | float = 1.0
    step: Tensor | int = 0

    def outputs(
        self, trainable: Sequence[Tensor], images: Tensor, extra: Tensor | None = None
    ) -> Outputs:
        """Evaluates the classifier on `images`, which carry the batch's labels.

        Args:
            trainable: Values of the trainable variables.
            images: Shape `(batch, height, width, channels)`.
            extra: Index of one image of the batch to append, unperturbed, as a last
                row that takes no part in the mean loss.
        """
        labels, count = self.labels, None
        if extra is not None:
            images = ops.concatenate([images, ops.take(self.images, extra[None], axis=0)])
            labels = ops.concatenate([labels, ops.take(labels, extra[None], axis=0)])
            count = -1
        logits, state, auxiliary = self.call(trainable, images)
        logits = ops.cast(logits, self.images.dtype)
        example_loss = self.example_loss(labels, logits)
        loss = self.mean(example_loss[:count]) + ops.cast(auxiliary, logits.dtype)
        return Outputs(loss, example_loss, logits, state)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the batch of `values`, shape `(batch,)`, with the sample weights."""
        return _mean(values if self.sample_weight is None else values * self.sample_weight)

    def maximum(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """The largest of `values` over all replicas.

        Returns:
            The index of the largest one of this replica's, the global maximum, and
            the factor of a term that concerns it alone: 1, or with several replicas,
            whose gradients are averaged, their number on its owner and 0 elsewhere.
        """
        index = ops.argmax(values)
        return index, *backends.maximum_of_replicas(ops.take(values, index))

    def gradient(
        self, function: Callable[..., tuple[Tensor, Any]], *arguments: Any
    ) -> tuple[Tensor, Any, Any]:
        """Value, auxiliary output and scaled gradient of `function(*arguments)`."""

        def scaled(*arguments: Any) -> tuple[Tensor, Any]:
            value, auxiliary = function(*arguments)
            return value * self.loss_scale, (value, auxiliary)

        (_, (value, auxiliary)), gradients = backends.value_and_gradient(scaled, arguments)
        return value, auxiliary, gradients

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Per-example gradient of the weighted loss w_i l_i from that of the scaled mean loss.

        It stays weighted: under BatchNorm an image moves the others' losses too, with
        their weights, and divided by a small weight of its own that share would explode.
        0 for an image of weight 0, which does not count.
        """
        gradient = ops.cast(gradient, self.images.dtype)
        factor = ops.cast(ops.shape(self.images)[0], gradient.dtype) / self.loss_scale
        if self.sample_weight is None:
            return gradient * factor
        factor = ops.where(self.sample_weight > 0, factor, 0.0)
        return gradient * ops.reshape(factor, (-1,) + (1,) * (len(gradient.shape) - 1))

    def subset(self, fraction: float) -> "TrainingBatch":
        """A random `fraction` of the batch, drawn without replacement."""
        size = ops.shape(self.images)[0]
        if isinstance(size, int):
            count = max(1, round(fraction * size))
        else:
            scaled = ops.round(fraction * ops.cast(size, "float32"))
            count = ops.maximum(1, ops.cast(scaled, "int32"))
        rows = ops.argsort(keras.random.uniform((size,), seed=self.seed))[:count]

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else ops.take(values, rows, axis=0)

        return dataclasses.replace(
            self,
            images=pick(self.images),
            labels=pick(self.labels),
            sample_weight=pick(self.sample_weight),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defense:
    """Base of all defences: what a training step minimises.

    Attributes:
        penalties: Names of the extra scalars that `update` measures.
    """

    penalties: ClassVar[tuple[str, ...]] = ()

    @property
    def passes(self) -> float:
        """Forward-backward passes over a batch in one step."""
        return 1.0

    def update(self, batch: TrainingBatch) -> Update:
        """Gradient of the objective at one batch."""
        raise TypeError(f"{type(self).__name__} defines no objective: use one of its subclasses.")

    def check_precision(self, compute_dtype: str) -> None:
        """Raises ValueError if the objective is lost to rounding in `compute_dtype`."""

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras's serialisation."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Defense":
        """The inverse of `get_config`, also after JSON has made lists of tuples."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Undefended(Defense):
    """Plain training: the mean loss."""

    def update(self, batch: TrainingBatch) -> Update:
        """Gradient of the mean loss, in one forward-backward pass."""

        def objective(trainable: Sequence[Tensor]) -> tuple[Tensor, Outputs]:
            outputs = batch.outputs(trainable, batch.images)
            return outputs.loss, outputs

        loss, outputs, (gradients,) = batch.gradient(objective, batch.trainable)
        return Update(gradients, loss, outputs.logits, outputs.state)


# The smallest usable fd_step. An l1 displacement sits in one pixel, whose rounding weighs most.
# `python -m benchmarks.precision` prints the errors behind it.
MIN_FD_STEP = {
    "float32": {"l1": 1e-4, "l2": 1e-4, "linf": 1e-4},
    "float16": {"l1": 0.2, "l2": 0.05, "linf": 0.05},
    "bfloat16": {"l1": 1.0, "l2": 0.1, "linf": 0.1},
}


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TVLipschitz(Defense):
    """Total-variation and Lipschitz regularisation of the loss.

    mean_i l_i + tv_weight * mean_i ||g_i||_* + lipschitz_weight * max_i ||g_i||_*

    where g_i is the gradient of example i's loss with respect to its image and
    each norm is a difference quotient along the steepest direction d_i. With sample
    weights w_i, the losses in all three terms are w_i l_i, and the logged sizes theirs:
    a weight of 2 doubles an example's part of the means, and its size in the maximum. With the
    step t at which t d_i has l2 length `fd_step`, the forward scheme takes two
    forward-backward passes, because

        grad J = (1 - tv_weight / t) grad mean l(x) + tv_weight / t grad mean l(x + t d)

    and the Lipschitz term needs one more row, the image of largest norm, in the
    second pass. A classifier that draws random numbers takes a third pass for the
    Lipschitz term (an appended row would change the dropout masks); "central" always
    takes three.

    Under BatchNorm the appended row takes part in the second pass's statistics, so
    that the two ends of the mean's quotient differ by O(1 / batch size), divided by
    the step: prefer fd_step >= 0.1 when both terms are on, where that is a few
    percent at batches of 64 and more.

    Attributes:
        norm: Norm of the threat model: "l2", "linf" or "l1".
        tv_weight: Weight of the mean, the paper's epsilon; a number or "8/255".
        lipschitz_weight: Weight of the maximum, the paper's lambda.
        fd_step: Finite-difference step: l2 length of the displacement (for linf at
            most that, where an image's gradient has zero entries).
        scheme: "forward" or "central".
        method: "finite_difference", or "double_backprop" for the exact gradient.
        penalty_fraction: Share of each batch, drawn at random, that is penalised.
            The mean keeps its expectation, the maximum is that of the share. The
            cost is 1 + 2 penalty_fraction passes.
        penalty_every: Penalises one step in so many, with weights so many times as large,
            which keeps the expectation; the others are plain.

    Raises:
        ValueError: For an illegal argument.

    Reference: Finlay, Oberman & Abbasi (2019), arXiv:1808.09540; Finlay & Oberman
    (2019), arXiv:1905.11468; Karras et al. (2020), arXiv:1912.04958, for
    `penalty_every`.
    """

    norm: str = "l2"
    tv_weight: float | str = 0.1
    lipschitz_weight: float = 0.0
    fd_step: float = 1e-2
    scheme: str = "forward"
    method: str = "finite_difference"
    penalty_fraction: float = 1.0
    penalty_every: int = 1

    penalties: ClassVar[tuple[str, ...]] = ("total_variation", "lipschitz")

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, norms.DUALS)
        checks.epsilon(self.tv_weight, "tv_weight")
        checks.number("lipschitz_weight", self.lipschitz_weight, minimum=0.0)
        checks.number("fd_step", self.fd_step, minimum=0.0, exclusive=True)
        checks.one_of("scheme", self.scheme, ("forward", "central"))
        checks.one_of("method", self.method, ("finite_difference", "double_backprop"))
        checks.number(
            "penalty_fraction", self.penalty_fraction, minimum=0.0, maximum=1.0, exclusive=True
        )
        checks.whole_number("penalty_every", self.penalty_every, minimum=1)
        if self.penalty_every > 1 and self.penalty_fraction < 1.0:
            raise ValueError(
                "penalty_every must be 1 with a penalty_fraction, got "
                f"penalty_every={self.penalty_every}, penalty_fraction={self.penalty_fraction}. "
                "Save by one of them."
            )
        if self.penalty_fraction < 1.0 and self.method == "double_backprop":
            raise ValueError(
                "penalty_fraction must be 1 with method='double_backprop', the exact reference, "
                f"got penalty_fraction={self.penalty_fraction}."
            )

    @property
    def passes(self) -> float:
        """Forward-backward passes over a batch in one step, without dropout."""
        passes = 3.0 if self.scheme == "central" else 2.0
        if self.penalty_fraction < 1.0:
            passes = 1.0 + passes * self.penalty_fraction
        return (passes + self.penalty_every - 1) / self.penalty_every

    def check_precision(self, compute_dtype: str) -> None:
        """Raises ValueError if rounding swamps the difference quotient.

        The quotient divides a difference of losses by the step, so that a low
        precision needs a longer one.
        """
        smallest = MIN_FD_STEP.get(compute_dtype, {}).get(self.norm, 0.0)
        if self.method == "finite_difference" and self.fd_step < smallest:
            raise ValueError(
                f"fd_step must be >= {smallest} when the classifier computes in {compute_dtype} "
                f"(rounding is divided by the step), got fd_step={self.fd_step}. "
                f"Use fd_step={smallest}, or compute in float32."
            )

    def update(self, batch: TrainingBatch) -> Update:
        """Gradient of the objective; the moving statistics are those of the clean pass."""
        if self.penalty_every > 1:
            return self._sometimes(batch)
        if self.method == "double_backprop":
            return self._double_backprop(batch)
        return self._finite_difference(batch)

    def _sometimes(self, batch: TrainingBatch) -> Update:
        """Every so many steps the penalised update, else the plain one, which measures none."""
        always = dataclasses.replace(self, penalty_every=1)
        batch = dataclasses.replace(batch, strength=batch.strength * self.penalty_every)

        def plain() -> Update:
            update = Undefended().update(batch)
            unknown = ops.full_like(update.loss, math.nan)
            return update._replace(penalties=dict.fromkeys(self.penalties, unknown))

        due = ops.equal(batch.step % self.penalty_every, 0)
        return ops.cond(due, lambda: always.update(batch), plain)

    def _finite_difference(self, batch: TrainingBatch) -> Update:
        tv_weight, lipschitz_weight = self._weights(batch)
        if self.penalty_fraction < 1.0:
            plain = Undefended().update(batch)
            batch = batch.subset(self.penalty_fraction)
            batch = dataclasses.replace(batch, images=backends.after(batch.images, plain.gradients))
            clean, image_gradient = _clean_pass(batch)
        else:
            clean, image_gradient = _clean_pass(batch)
            plain = clean

        g = batch.input_gradient(image_gradient)
        sizes = norms.dual_length(g, self.norm)
        steepest, lipschitz, share = batch.maximum(sizes)
        if batch.sample_weight is not None:
            share = share * ops.take(batch.sample_weight, steepest)
        step = self._step(batch.images)
        displacement = step * norms.steepest_direction(g, self.norm)
        span = 2 * step if self.scheme == "central" else step

        def side(
            images: Tensor, previous: Sequence[Tensor], extra: Tensor | None = None
        ) -> tuple[Tensor, Sequence[Tensor]]:
            """One end of the quotients: (tv_weight mean l + lipschitz_weight l_k) / span.

            It waits for the gradients of the `previous` pass, whose activations are then
            gone: run at the same time, two passes would need memory for both.
            """
            images = backends.after(images, previous)

            def end(trainable: Sequence[Tensor]) -> tuple[Tensor, None]:
                outputs = batch.outputs(trainable, images, extra)
                value = tv_weight * outputs.loss
                if self.lipschitz_weight:
                    peak = ops.take(outputs.example_loss, steepest)
                    if extra is not None:
                        peak = peak - outputs.example_loss[-1]
                    value = value + lipschitz_weight * share * peak
                return value / span, None

            value, _, (gradients,) = batch.gradient(end, batch.trainable)
            return value, gradients

        if self.scheme == "central":
            base = side(batch.images - displacement, clean.gradients)
        elif self.lipschitz_weight and batch.stochastic:
            base = side(batch.images, clean.gradients)
        else:
            ratio = tv_weight / span
            base = ratio * clean.loss, [ratio * gradient for gradient in clean.gradients]
        one_sided = self.lipschitz_weight and self.scheme == "forward" and not batch.stochastic
        ahead = side(batch.images + displacement, base[1], steepest if one_sided else None)

        gradients = [p + a - b for p, a, b in zip(plain.gradients, ahead[1], base[1], strict=True)]
        return plain._replace(
            gradients=gradients,
            loss=plain.loss + ahead[0] - base[0],
            penalties={"total_variation": _mean(sizes), "lipschitz": lipschitz},
        )

    def _double_backprop(self, batch: TrainingBatch) -> Update:
        tv_weight, lipschitz_weight = self._weights(batch)

        def objective(trainable: Sequence[Tensor]) -> tuple[Tensor, Any]:
            def loss(images: Tensor) -> tuple[Tensor, Outputs]:
                outputs = batch.outputs(trainable, images)
                return outputs.loss, outputs

            _, outputs, (image_gradient,) = batch.gradient(loss, batch.images)
            sizes = norms.dual_length(batch.input_gradient(image_gradient), self.norm)
            steepest, lipschitz, share = batch.maximum(sizes)
            penalties = {"total_variation": _mean(sizes), "lipschitz": lipschitz}
            value = outputs.loss + tv_weight * penalties["total_variation"]
            peak = lipschitz_weight * share * ops.take(sizes, steepest)
            return value + peak, (outputs, penalties)

        loss, (outputs, penalties), (gradients,) = batch.gradient(objective, batch.trainable)
        return Update(gradients, loss, outputs.logits, outputs.state, penalties)

    def _weights(self, batch: TrainingBatch) -> tuple[Tensor | float, Tensor | float]:
        """Of the mean and of the maximum, as far as they are ramped up."""
        return batch.strength * checks.epsilon(
            self.tv_weight
        ), batch.strength * self.lipschitz_weight

    def _step(self, images: Tensor) -> float:
        """The t at which t d has l2 length fd_step, for a d without zero entries."""
        return self.fd_step / math.sqrt(math.prod(images.shape[1:]) if self.norm == "linf" else 1)


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Defense):
    """Trains on adversarial images found by projected gradient ascent in each step.

    One step without random start and bounds is total variation with
    fd_step = tv_weight, gradient for gradient: FGSM training for norm="linf",
    the talk's l1 TV. Seven steps with random start are Madry's. The attack sees the
    training-mode network with the same masks, and the moving statistics are those
    of the adversarial images.

    Attributes:
        norm: Norm of the threat model.
        epsilon: Perturbation radius in pixel units; a number or "8/255".
        steps: Gradient steps of the attack.
        step_size: Length of one, by default 2.5 epsilon / steps (epsilon for one).
        random_start: Whether the attack starts from a random point of the ball.
        bounds: Legal pixel values, or None for no clipping.

    Raises:
        ValueError: For an illegal argument.

    Reference: Goodfellow et al. (2015), arXiv:1412.6572; Madry et al. (2018),
    arXiv:1706.06083.
    """

    norm: str = "linf"
    epsilon: float | str = "8/255"
    steps: int = 7
    step_size: float | str | None = None
    random_start: bool = True
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_attack(self)

    @property
    def passes(self) -> float:
        """Forward-backward passes over a batch in one step."""
        return 1.0 + self.steps

    def update(self, batch: TrainingBatch) -> Update:
        """Gradient of the mean loss on the adversarial images."""

        def gradient(images: Tensor) -> Tensor:
            def loss(images: Tensor) -> tuple[Tensor, None]:
                return batch.outputs(batch.trainable, images).loss, None

            _, _, (image_gradient,) = batch.gradient(loss, images)
            return batch.input_gradient(image_gradient)

        start = ops.zeros_like(batch.images)
        if self.random_start:
            radius = checks.epsilon(self.epsilon)
            start = norms.random_in_ball(batch.images, self.norm, radius, batch.seed)
            start = batch.strength * start
        x_adv = _attack(self, gradient, batch.images, start, batch.strength)
        return Undefended().update(dataclasses.replace(batch, images=x_adv))


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TRADES(Defense):
    """Clean loss plus `beta` times the divergence between clean and attacked outputs.

    mean_i l_i + beta * mean_i KL(p(x_i) || p(x_adv_i)), where x_adv maximises the
    divergence by projected gradient ascent from a small Gaussian perturbation.

    Attributes:
        norm: Norm of the threat model.
        epsilon: Perturbation radius in pixel units; a number or "8/255".
        steps: Gradient steps of the attack.
        step_size: Length of one, by default 2.5 epsilon / steps (epsilon for one).
        beta: Weight of the divergence, 1 / lambda in the paper.
        bounds: Legal pixel values, or None for no clipping.

    Raises:
        ValueError: For an illegal argument.

    Reference: Zhang et al. (2019), arXiv:1901.08573.
    """

    norm: str = "linf"
    epsilon: float | str = "8/255"
    steps: int = 10
    step_size: float | str | None = None
    beta: float = 6.0
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_attack(self)
        checks.number("beta", self.beta, minimum=0.0)

    @property
    def passes(self) -> float:
        """Forward-backward passes over a batch in one step, a forward one counted as a third."""
        return 2.0 + self.steps + 1 / 3

    def update(self, batch: TrainingBatch) -> Update:
        """Gradient of the objective; the moving statistics are those of the clean pass."""
        clean_logits = ops.stop_gradient(batch.outputs(batch.trainable, batch.images).logits)

        def gradient(images: Tensor) -> Tensor:
            def divergence(images: Tensor) -> tuple[Tensor, None]:
                logits = batch.outputs(batch.trainable, images).logits
                return batch.mean(_kl_divergence(clean_logits, logits)), None

            _, _, (image_gradient,) = batch.gradient(divergence, images)
            return batch.input_gradient(image_gradient)

        def objective(trainable: Sequence[Tensor]) -> tuple[Tensor, Outputs]:
            clean = batch.outputs(trainable, batch.images)
            attacked = batch.outputs(trainable, x_adv)
            divergence = batch.mean(_kl_divergence(clean.logits, attacked.logits))
            return clean.loss + batch.strength * self.beta * divergence, clean

        shape, dtype = ops.shape(batch.images), batch.images.dtype
        start = keras.random.normal(shape, stddev=1e-3, dtype=dtype, seed=batch.seed)
        x_adv = _attack(self, gradient, batch.images, start)
        loss, clean, (gradients,) = batch.gradient(objective, batch.trainable)
        return Update(gradients, loss, clean.logits, clean.state)


def _mean(values: Tensor) -> Tensor:
    count = ops.cast(ops.shape(values)[0], values.dtype)
    return ops.sum(values) / count  # under JAX, ops.mean rounds float64 to float32


def _clean_pass(batch: TrainingBatch) -> tuple[Update, Tensor]:
    """One backward pass: the mean loss's gradient for the weights and for the images."""

    def objective(trainable: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Outputs]:
        outputs = batch.outputs(trainable, images)
        return outputs.loss, outputs

    loss, outputs, (gradients, image_gradient) = batch.gradient(
        objective, batch.trainable, batch.images
    )
    return Update(gradients, loss, outputs.logits, outputs.state), image_gradient


def _check_attack(defense: AdversarialTraining | TRADES) -> None:
    checks.one_of("norm", defense.norm, norms.DUALS)
    checks.epsilon(defense.epsilon)
    checks.whole_number("steps", defense.steps, minimum=1)
    if defense.step_size is not None:
        checks.epsilon(defense.step_size, "step_size")
    if defense.bounds is not None and not defense.bounds[0] < defense.bounds[1]:
        raise ValueError(f"bounds must be (low, high), got bounds={defense.bounds}.")


def _attack(
    defense: AdversarialTraining | TRADES,
    gradient: Callable[[Tensor], Tensor],
    images: Tensor,
    start: Tensor,
    strength: Tensor | float = 1.0,
) -> Tensor:
    epsilon = checks.epsilon(defense.epsilon)
    step_size = epsilon * min(1.0, 2.5 / defense.steps)
    if defense.step_size is not None:
        step_size = checks.epsilon(defense.step_size, "step_size")
    x_adv = norms.projected_ascent(
        gradient,
        images,
        norm=defense.norm,
        epsilon=strength * epsilon,
        steps=defense.steps,
        step_size=strength * step_size,
        start=start,
        bounds=defense.bounds,
    )
    return ops.stop_gradient(x_adv)


def _kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(other)), shape `(batch,)`."""
    log_p, log_q = ops.log_softmax(logits), ops.log_softmax(other)
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
