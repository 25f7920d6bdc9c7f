"""The defence protocol: a batch in, the gradient of what training minimises out.

A defence is a frozen dataclass with one method, `update(batch)`, written in
`keras.ops` for every backend. `TrainingBatch` gives it the classifier as a pure
function of weights and images; `Update` is what the training step needs back.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import keras
from keras import ops

from tvkeras import backends

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
        return batch_mean(values if self.sample_weight is None else values * self.sample_weight)

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


def batch_mean(values: Tensor) -> Tensor:
    """Mean of `values`, shape `(batch,)`."""
    count = ops.cast(ops.shape(values)[0], values.dtype)
    return ops.sum(values) / count  # under JAX, ops.mean rounds float64 to float32
