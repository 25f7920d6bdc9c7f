"""TensorFlow's half of the training step: `tf.GradientTape` and fused BatchNorm."""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tvkeras.backends import Devices, processor_has_bfloat16

Tensor = Any


def value_and_gradient(
    function: Callable[..., tuple[Tensor, Any]], arguments: Sequence[Any]
) -> tuple[tuple[Tensor, Any], Any]:
    """Value, auxiliary output and gradient of a scalar function.

    Args:
        function: Maps `arguments` to (scalar, auxiliary output).
        arguments: Tensors or lists of tensors.

    Returns:
        ((value, auxiliary), gradients), the gradients structured like `arguments`,
        zero where the value does not depend on an argument.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tf.nest.flatten(arguments))
        value, auxiliary = function(*arguments)
    gradients = tape.gradient(value, arguments, unconnected_gradients="zero")
    return (value, auxiliary), gradients


def computes_in_bfloat16() -> bool:
    """Whether what trains has instructions for bfloat16; without them it is far slower."""
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    if details:
        return all(about.get("compute_capability", (0, 0)) >= (8, 0) for about in details)
    return bool(tf.config.list_physical_devices("TPU")) or processor_has_bfloat16()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors as one graph; under XLA on an accelerator, not on a CPU."""
    accelerated = bool(tf.config.list_physical_devices("GPU"))
    own = functools.partial(function)  # else closures of one function count as its retracing
    return tf.function(own, jit_compile=accelerated, autograph=False, reduce_retracing=True)


def after(value: Tensor, dependencies: Any) -> Tensor:
    """`value`, computed only when all `dependencies` are."""
    with tf.control_dependencies(tf.nest.flatten(dependencies)):
        return tf.identity(value)


def maximum_of_replicas(value: Tensor) -> tuple[Tensor, Tensor | float]:
    """Maximum of a scalar over the replicas, and its owner's share of a mean over them.

    Returns:
        The maximum, and the number of replicas on the first that attains it, 0 on the
        others.
    """
    context = tf.distribute.get_replica_context()
    count = context.num_replicas_in_sync
    if count == 1:
        return value, 1.0
    values = context.all_gather(tf.reshape(tf.stop_gradient(value), (1,)), axis=0)
    owner = tf.argmax(values, output_type=tf.int32)
    own = owner == context.replica_id_in_sync_group
    return tf.reduce_max(values), tf.where(own, tf.cast(count, value.dtype), 0)


def maximum_of_processes(number: int) -> int:
    """`number` itself: TensorFlow trains in one process here."""
    return number


def from_first_process(content: bytes) -> bytes:
    """`content` itself: TensorFlow trains in one process here."""
    return content


def train_step(model: Any, data: Any) -> dict[str, Tensor]:
    """One optimizer step of a `RobustClassifier`; returns its logs.

    Under a `MirroredStrategy` of several replicas, gradients and BatchNorm's moving
    statistics are averaged over them, gradients before they are clipped.

    Raises:
        ValueError: Under another strategy of several replicas, or with a setting that
            fails under one.
    """
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync
    if replicas > 1:
        _check_replicated(model, context.strategy)
    images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if replicas > 1:
        images = _with_equal_shares(images, context)
    state = [tf.convert_to_tensor(variable) for variable in model.non_trainable_variables]
    own = [own_seed(value, context) for value in state]
    update, new_state = model.compute_update(
        [tf.convert_to_tensor(variable) for variable in model.trainable_variables],
        own,
        images,
        labels,
        sample_weight,
    )
    gradients = update.gradients
    if replicas > 1:
        # The same numbers on all replicas: their metrics then survive a checkpoint exactly.
        gradients, loss, penalties = context.all_reduce(
            tf.distribute.ReduceOp.MEAN,
            (list(gradients), update.loss, dict(update.penalties)),
        )
        update = update._replace(loss=loss, penalties=penalties)
        gradients = [g / replicas for g in _clipped(gradients, model.optimizer)]  # Keras sums them
        new_state = [
            context.all_reduce(tf.distribute.ReduceOp.MEAN, new)
            if new.dtype.is_floating
            else new - (seed - old)
            for new, seed, old in zip(new_state, own, state, strict=True)
        ]
    for variable, value in zip(model.non_trainable_variables, new_state, strict=True):
        variable.assign(value)
    model.optimizer.apply(gradients, model.trainable_variables)
    if model.averaging:
        groups = (model.trainable_variables, model.non_trainable_variables)
        before = [[tf.convert_to_tensor(variable) for variable in group] for group in groups]
        step = tf.convert_to_tensor(model.optimizer.iterations)
        averaged = model.average_weights(step, *before)
        for group in zip(groups, before, averaged, strict=True):
            for variable, old, new in zip(*group, strict=True):
                if new is not old:
                    variable.assign(new)
    return model.compute_logs(update, images, labels, sample_weight)


def skipped_step(iterator: Any) -> dict[str, Tensor]:
    """What Keras's compiled step returns, with nothing done: no logs."""
    return {}


@contextlib.contextmanager
def spread(devices: int | str) -> Iterator[Devices]:
    """Spreads the models that are built and trained inside over devices, mirrored.

    Args:
        devices: How many of this machine's GPUs (without one, CPUs), or "all".

    Raises:
        ValueError: If there are fewer, or `TF_CONFIG` names several workers.
    """
    workers = json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {}).get("worker", [])
    if len(workers) > 1:
        raise ValueError(f"TF_CONFIG names {len(workers)} workers, but {_MANY_WORKERS}")
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    total = len(found) if devices == "all" else int(devices)
    if total > len(found):
        raise ValueError(
            f"devices must be 'all' or at most {len(found)} (this machine has "
            f"{[device.name for device in found]}), got devices={devices!r}."
        )
    if total == 1:
        yield Devices()
        return
    with _mirrored(tuple(device.name for device in found[:total])).scope():
        yield Devices(total)


@functools.cache
def _mirrored(names: tuple[str, ...]) -> Any:
    """One strategy for a set of devices: TensorFlow mixes up the collectives of two."""
    return tf.distribute.MirroredStrategy(names)


_MANY_WORKERS = (
    "TensorFlow trains on one: Keras's fit fails under MultiWorkerMirroredStrategy. "
    "Use KERAS_BACKEND=jax for several processes (BUILD.md, 'Many devices')."
)


def _check_replicated(model: Any, strategy: Any) -> None:
    if not isinstance(strategy, tf.distribute.MirroredStrategy):
        raise ValueError(
            "the tf.distribute strategy must be a MirroredStrategy, "
            f"got {type(strategy).__name__}: {_MANY_WORKERS}"
        )
    settings = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    refused = {
        "jit_compile": (model.jit_compile, False),
        "steps_per_execution": (model.steps_per_execution, 1),
        "gradient_accumulation_steps": (settings.gradient_accumulation_steps, None),
        "ema_overwrite_frequency": (settings.use_ema and settings.ema_overwrite_frequency, None),
        "averaging": (model.averaging, None),
        "penalty_every": (getattr(model.defense, "penalty_every", 1), 1),
    }
    for name, (value, only) in refused.items():
        if value and value != only:
            raise ValueError(
                f"{name} must be {only} on several TensorFlow devices, got {name}={value!r}. "
                "Change it, or use KERAS_BACKEND=jax."
            )


def _with_equal_shares(images: Tensor, context: Any) -> Tensor:
    """`images`, if all replicas have as many: else the mean over them would be another."""
    counts = context.all_gather(tf.shape(images)[:1], axis=0)
    equal = tf.debugging.assert_equal(
        counts,
        counts[0],
        "every batch must be a multiple of the number of devices: drop the last, smaller one "
        "(drop_remainder=True), or use tvkeras.data.Batches.",
    )
    with tf.control_dependencies([equal]):
        return tf.identity(images)


def own_seed(value: Tensor, context: Any) -> Tensor:
    """A seed's state (seed, counter) moved so that each replica draws its own numbers."""
    if value.dtype.is_floating or context.num_replicas_in_sync == 1:
        return value
    shift = tf.cast(context.replica_id_in_sync_group, value.dtype) * 1_000_003
    return value + tf.concat([shift[None], tf.zeros_like(value[1:])], axis=0)


def _clipped(gradients: Sequence[Tensor], optimizer: Any) -> Sequence[Tensor]:
    """Averaged gradients, clipped as the optimizer would clip them on one device.

    Keras's optimizers clip each replica's gradients before they add them up; what is
    clipped here already passes that unchanged.
    """
    scale = optimizer.scale_loss(tf.constant(1.0))
    settings = getattr(optimizer, "inner_optimizer", optimizer)
    gradients = [gradient / tf.cast(scale, gradient.dtype) for gradient in gradients]
    if settings.clipnorm:
        gradients = [tf.clip_by_norm(gradient, settings.clipnorm) for gradient in gradients]
    elif settings.global_clipnorm:
        gradients, _ = tf.clip_by_global_norm(gradients, settings.global_clipnorm)
    elif settings.clipvalue:
        limit = settings.clipvalue
        gradients = [  # an overflow stays one, for the loss scale to see
            tf.where(
                tf.math.is_finite(gradient), tf.clip_by_value(gradient, -limit, limit), gradient
            )
            for gradient in gradients
        ]
    return [gradient * tf.cast(scale, gradient.dtype) for gradient in gradients]


def fast_twin(classifier: keras.Model) -> keras.Model:
    """The same function, faster: BatchNorm as TensorFlow's fused kernel, GELU in few operations.

    Keras computes BatchNorm from elementary operations, and TensorFlow the gradient of
    GELU from those of its parts. The twin is a clone whose layers do neither; called
    statelessly with the classifier's own variables, it leaves the classifier a plain
    Keras model.

    Returns:
        The twin, or `classifier` itself where nothing can be replaced, or where a
        clone is not the same function (an adapted `Normalization` keeps its numbers
        outside variables and configuration).
    """
    if not _is_clonable(classifier) or not any(map(_faster, _flatten(classifier))):
        return classifier

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        return (_faster(layer) or type(layer)).from_config(layer.get_config())

    try:
        twin = keras.models.clone_model(classifier, clone_function=clone, recursive=True)
    except (NotImplementedError, TypeError, ValueError):  # a layer without a whole configuration
        return classifier
    twin.set_weights(classifier.get_weights())
    sides = (side or 64 for side in classifier.input_shape[1:])  # None: any size will do
    probe = tf.random.stateless_uniform((2, *sides), seed=(0, 0))
    one, other = (tf.cast(model(probe, training=False), tf.float32) for model in (twin, classifier))
    low = {"float16", "bfloat16"} & {layer.compute_dtype for layer in _flatten(classifier)}
    rounding = 1e-2 if low else 1e-5  # networks up to ResNet-152 show 3e-6 in float32
    allowed = rounding * tf.reduce_max(tf.abs(other))
    return twin if tf.reduce_max(tf.abs(one - other)) <= allowed else classifier


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` for `(batch, height, width, channels)`, fused."""

    def call(self, inputs: Tensor, training: bool | None = None, mask: Any = None) -> Tensor:
        """Normalises `inputs`; in training it moves the statistics as Keras does."""
        if mask is not None or inputs.dtype == tf.float64:
            return super().call(inputs, training=training, mask=mask)
        training = bool(training) and self.trainable
        mean, variance = self.moving_mean, self.moving_variance
        gamma = tf.convert_to_tensor(self.gamma if self.scale else tf.ones_like(mean))
        beta = tf.convert_to_tensor(self.beta if self.center else tf.zeros_like(mean))
        if not training:
            moments = tf.convert_to_tensor(mean), tf.convert_to_tensor(variance)
            return _normalized(inputs, gamma, beta, *moments, self.epsilon)
        outputs, batch_mean, batch_variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, gamma, beta, epsilon=self.epsilon
        )
        count = tf.cast(tf.size(inputs) // tf.shape(inputs)[-1], tf.float32)
        biased = batch_variance * (count - 1) / count  # the kernel returns it unbiased
        mean.assign(mean * self.momentum + batch_mean * (1 - self.momentum))
        variance.assign(variance * self.momentum + biased * (1 - self.momentum))
        return outputs


def _normalized(
    inputs: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    """BatchNorm with given moments; in a graph the images' gradient alone costs one product.

    The kernel's own gradient always computes those of gamma and beta too.
    """

    @tf.custom_gradient
    def normalized(inputs: Tensor, gamma: Tensor, beta: Tensor) -> Any:
        outputs = tf.compat.v1.nn.fused_batch_norm(
            inputs, gamma, beta, mean, variance, epsilon, is_training=False
        )[0]

        def gradients(upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            inverse = tf.math.rsqrt(variance + epsilon)
            exact = tf.cast(upstream, gamma.dtype)
            slopes = exact * ((tf.cast(inputs, gamma.dtype) - mean) * inverse)
            return (
                upstream * tf.cast(gamma * inverse, upstream.dtype),
                tf.reduce_sum(slopes, (0, 1, 2)),
                tf.reduce_sum(exact, (0, 1, 2)),
            )

        return outputs, gradients

    return normalized(inputs, gamma, beta)


class FusedGelu(keras.layers.Activation):
    """`keras.layers.Activation("gelu")` with a gradient that reuses the forward pass."""

    def call(self, inputs: Tensor) -> Tensor:
        """The product of `inputs` and their normal distribution function."""
        return _gelu(inputs)


@tf.custom_gradient
def _gelu(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    distribution = 0.5 + 0.5 * tf.math.erf(x * math.sqrt(1 / 2))

    def gradient(upstream: Tensor) -> Tensor:
        density = math.sqrt(1 / (2 * math.pi)) * tf.exp(-0.5 * x * x)
        return upstream * (distribution + x * density)

    return x * distribution, gradient


def _faster(layer: keras.layers.Layer) -> type[keras.layers.Layer] | None:
    """The faster kind that can stand for a layer, if there is one."""
    if type(layer) is keras.layers.Activation and layer.activation is keras.activations.gelu:
        return FusedGelu
    return FusedBatchNormalization if _is_fusible(layer) else None


def _is_fusible(layer: keras.layers.Layer) -> bool:
    return (
        type(layer) is keras.layers.BatchNormalization
        and layer.moving_mean is not None
        and layer.axis in (-1, 3)
        and len(layer.input.shape) == 4
        and not layer.renorm
        and not layer.synchronized
    )


def _is_clonable(model: Any) -> bool:
    """Whether a model is Functional or Sequential, as Keras's own cloning asks."""
    return isinstance(model, keras.Sequential) or hasattr(model, "operations")


def _flatten(model: keras.Model) -> list[keras.layers.Layer]:
    nested = [_flatten(layer) for layer in model.layers if _is_clonable(layer)]
    return [*model.layers, *(layer for layers in nested for layer in layers)]
