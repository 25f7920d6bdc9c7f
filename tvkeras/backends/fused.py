"""Faster kernels in the place of those that Keras and TensorFlow choose."""

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

Tensor = Any


def fast_twin(classifier: keras.Model) -> keras.Model:
    """The same function, faster: BatchNorm as a fused kernel, GELU and SiLU as a loop each.

    Keras and TensorFlow compose all three, and their gradients, of elementary operations. The
    layers of the twin, a clone, do not, and some of its convolutions have a faster gradient;
    called statelessly with the classifier's own variables, it leaves the classifier a plain
    Keras model.

    Returns:
        The twin, or `classifier` itself where nothing can be replaced, or where a
        clone is not the same function (an adapted `Normalization` keeps its numbers
        outside variables and configuration).
    """
    if not _is_clonable(classifier) or not any(map(_faster, _flatten(classifier))):
        return classifier
    try:
        twin = _cloned(classifier, _faster)
        pairs = [(twin, classifier)]
        if {"float16", "bfloat16"} & {layer.compute_dtype for layer in _flatten(classifier)}:
            # Its rounding would hide a difference, or be one.
            exact = _cloned(classifier, _faster, "float32"), _cloned(classifier, type, "float32")
            pairs = [exact, (_cloned(classifier, type), classifier)]
    except (NotImplementedError, TypeError, ValueError):  # a layer without a whole configuration
        return classifier
    sides = (side or 64 for side in classifier.input_shape[1:])  # None: any size will do
    probe = tf.random.stateless_uniform((2, *sides), seed=(0, 0))
    for pair in pairs:
        one, other = (tf.cast(model(probe, training=False), tf.float32) for model in pair)
        # Networks up to ResNet-152 show 3e-6.
        if tf.reduce_max(tf.abs(one - other)) > 1e-5 * tf.reduce_max(tf.abs(other)):
            return classifier
    return twin


def _cloned(
    classifier: keras.Model, kind: Callable[[Any], Any], dtype: str | None = None
) -> keras.Model:
    """A clone with the same weights whose layers are of the kinds, and of the dtype, asked for."""

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if dtype:
            config["dtype"] = dtype
        return (kind(layer) or type(layer)).from_config(config)

    cloned = keras.models.clone_model(classifier, clone_function=clone, recursive=True)
    cloned.set_weights(classifier.get_weights())
    return cloned


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


class SmallConvolution(keras.layers.Conv2D):
    """`keras.layers.Conv2D` of small images with many channels, in bfloat16 on a CPU.

    There oneDNN takes three to five times as long for the kernel's gradient as for the images';
    as a product of matrices for each of the kernel's places it takes about as long.
    """

    def convolution_op(self, inputs: Tensor, kernel: Any) -> Tensor:
        """The convolution, without bias and activation."""
        padding = self.padding.upper()

        @tf.custom_gradient
        def convolution(inputs: Tensor, kernel: Tensor) -> Any:
            def gradients(upstream: Tensor) -> tuple[Tensor, Tensor]:
                return (
                    tf.nn.conv2d_transpose(upstream, kernel, tf.shape(inputs), 1, padding),
                    _kernel_gradient(inputs, upstream, kernel.shape, padding),
                )

            return tf.nn.conv2d(inputs, kernel, 1, padding), gradients

        return convolution(inputs, tf.convert_to_tensor(kernel))


def _kernel_gradient(
    inputs: Tensor, upstream: Tensor, shape: tuple[int, ...], padding: str
) -> Tensor:
    height, width, channels, filters = shape
    if padding == "SAME":
        margins = ([(side - 1) // 2, side // 2] for side in (height, width))
        inputs = tf.pad(inputs, [[0, 0], *margins, [0, 0]])
    rows, columns = upstream.shape[1:3]
    upstream = tf.reshape(upstream, (-1, filters))
    products = [
        tf.matmul(
            tf.reshape(inputs[:, y : y + rows, x : x + columns], (-1, channels)),
            upstream,
            transpose_a=True,
        )
        for y in range(height)
        for x in range(width)
    ]
    return tf.reshape(tf.stack(products), shape)


class FusedActivation(keras.layers.Activation):
    """`keras.layers.Activation` of `gelu` or `silu`, each pass in one loop over memory.

    TensorFlow's own take a loop for each elementary operation, and up to seven times as long.
    """

    def call(self, inputs: Tensor) -> Tensor:
        """The product of `inputs` and the activation's distribution function of them."""
        return _FUSED[self.activation](inputs)


def _fused(function: Callable[..., Tensor], derivative: Callable[..., Tensor]) -> Any:
    """An elementwise function and its gradient, compiled, and computed in float32 at the least."""

    @tf.function(jit_compile=True)
    def outputs(x: Tensor) -> Tensor:
        return tf.cast(function(_exact(x)), x.dtype)

    @tf.function(jit_compile=True)
    def gradient(x: Tensor, upstream: Tensor) -> Tensor:
        return tf.cast(_exact(upstream) * derivative(_exact(x)), x.dtype)

    @tf.custom_gradient
    def fused(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return outputs(x), lambda upstream: gradient(x, upstream)

    return fused


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def _normal(x: Tensor) -> Tensor:
    return 0.5 + 0.5 * tf.math.erf(x * math.sqrt(1 / 2))


def _gelu_derivative(x: Tensor) -> Tensor:
    return _normal(x) + x * math.sqrt(1 / (2 * math.pi)) * tf.exp(-0.5 * x * x)


def _silu_derivative(x: Tensor) -> Tensor:
    logistic = tf.sigmoid(x)
    return logistic * (1 + x * (1 - logistic))


_FUSED = {
    keras.activations.gelu: _fused(lambda x: x * _normal(x), _gelu_derivative),
    keras.activations.silu: _fused(lambda x: x * tf.sigmoid(x), _silu_derivative),
}


def _faster(layer: keras.layers.Layer) -> type[keras.layers.Layer] | None:
    """The faster kind that can stand for a layer, if there is one."""
    if type(layer) is keras.layers.Activation and layer.activation in _FUSED:
        return FusedActivation
    if _is_small_convolution(layer):
        return SmallConvolution
    return FusedBatchNormalization if _is_fusible(layer) else None


def _is_small_convolution(layer: keras.layers.Layer) -> bool:
    """Where the products were measured to be faster (BUILD.md, Speed)."""
    return (
        type(layer) is keras.layers.Conv2D
        and layer.compute_dtype == "bfloat16"
        and not tf.config.list_physical_devices("GPU")
        and layer.data_format == "channels_last"
        and layer.strides == layer.dilation_rate == (1, 1)
        and layer.groups == 1
        and min(layer.kernel.shape[2:]) >= 128
        and math.prod(side or math.inf for side in layer.output.shape[1:3]) <= 64
    )


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
