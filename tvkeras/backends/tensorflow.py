"""TensorFlow's half of the training step: `tf.GradientTape` and fused BatchNorm."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors as one graph; under XLA on an accelerator, not on a CPU."""
    accelerated = bool(tf.config.list_physical_devices("GPU"))
    own = functools.partial(function)  # else closures of one function count as its retracing
    return tf.function(own, jit_compile=accelerated, autograph=False, reduce_retracing=True)


def train_step(model: Any, data: Any) -> dict[str, Tensor]:
    """One optimizer step of a `RobustClassifier`; returns its logs.

    Raises:
        ValueError: Under a `tf.distribute` strategy of several replicas, whose
            maxima and statistics this step does not gather.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1:
        raise ValueError(
            f"tvkeras trains on one TensorFlow replica, got a strategy of {replicas}. "
            "Train without tf.distribute."
        )
    images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    update, state = model.compute_update(
        [tf.convert_to_tensor(variable) for variable in model.trainable_variables],
        [tf.convert_to_tensor(variable) for variable in model.non_trainable_variables],
        images,
        labels,
        sample_weight,
    )
    for variable, value in zip(model.non_trainable_variables, state, strict=True):
        variable.assign(value)
    model.optimizer.apply(update.gradients, model.trainable_variables)
    return model.compute_logs(update, images, labels, sample_weight)


def fast_twin(classifier: keras.Model) -> keras.Model:
    """The same function, faster: BatchNorm as TensorFlow's fused kernel.

    Keras computes BatchNorm from elementary operations. The twin is a clone whose
    BatchNorm layers call the fused kernel; called statelessly with the classifier's
    own variables, it leaves the classifier a plain Keras model.

    Returns:
        The twin, or `classifier` itself where nothing can be replaced, or where a
        clone is not the same function (an adapted `Normalization` keeps its numbers
        outside variables and configuration).
    """
    if not _is_clonable(classifier) or not any(map(_is_fusible, _flatten(classifier))):
        return classifier

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        kind = FusedBatchNormalization if _is_fusible(layer) else type(layer)
        return kind.from_config(layer.get_config())

    try:
        twin = keras.models.clone_model(classifier, clone_function=clone, recursive=True)
    except (NotImplementedError, TypeError, ValueError):  # a layer without a whole configuration
        return classifier
    twin.set_weights(classifier.get_weights())
    sides = (side or 64 for side in classifier.input_shape[1:])  # None: any size will do
    probe = tf.random.stateless_uniform((2, *sides), seed=(0, 0))
    one, other = (tf.cast(model(probe, training=False), tf.float32) for model in (twin, classifier))
    scale = tf.reduce_max(tf.abs(other))
    return twin if tf.reduce_max(tf.abs(one - other)) <= 1e-2 * scale else classifier


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` for `(batch, height, width, channels)`, fused."""

    def call(self, inputs: Tensor, training: bool | None = None, mask: Any = None) -> Tensor:
        """Normalises `inputs`; in training it moves the statistics as Keras does."""
        if mask is not None or inputs.dtype == tf.float64:
            return super().call(inputs, training=training, mask=mask)
        training = bool(training) and self.trainable
        mean, variance = self.moving_mean, self.moving_variance
        gamma = self.gamma if self.scale else tf.ones_like(mean)
        beta = self.beta if self.center else tf.zeros_like(mean)
        outputs, batch_mean, batch_variance = tf.compat.v1.nn.fused_batch_norm(
            inputs,
            tf.convert_to_tensor(gamma),
            tf.convert_to_tensor(beta),
            mean=None if training else tf.convert_to_tensor(mean),
            variance=None if training else tf.convert_to_tensor(variance),
            epsilon=self.epsilon,
            is_training=training,
        )
        if training:
            count = tf.cast(tf.size(inputs) // tf.shape(inputs)[-1], tf.float32)
            biased = batch_variance * (count - 1) / count  # the kernel returns it unbiased
            mean.assign(mean * self.momentum + batch_mean * (1 - self.momentum))
            variance.assign(variance * self.momentum + biased * (1 - self.momentum))
        return outputs


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
