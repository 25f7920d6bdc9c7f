"""The network of airbench: 94 to 96 % on CIFAR-10 for the least arithmetic."""

import keras
import numpy as np
from keras import layers

from tvkeras import checks

POOLING = {"average": layers.AveragePooling2D, "max": layers.MaxPooling2D}
WHITENING = "whitening"  # the layer that `whiten` sets
PATCH = 2


def airbench(
    num_classes: int,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    widths: tuple[int, int, int] = (64, 256, 256),
    residual: bool = False,
    activation: str = "gelu",
    pooling: str = "average",
) -> keras.Model:
    """A frozen whitening convolution and three blocks of two convolutions.

    A block is conv3x3, pooling by 2, BatchNorm, activation, conv3x3, BatchNorm,
    activation. BatchNorm has no scale. A convolution begins as the identity on as many
    channels as it has inputs. The first layer, 2x2, is set from images by `whiten` and
    not trained.

    Widths (64, 256, 256) are airbench94's, (128, 384, 384) airbench95's, and
    (128, 384, 512) with `residual` airbench96's.

    Args:
        num_classes: Number of logits.
        input_shape: `(height, width, channels)`, sides of at least 9.
        widths: Channels of the three blocks.
        residual: Whether a block has a third convolution, around which with the second
            the block's pooled activations are added.
        activation: A Keras activation; a smooth one such as "gelu" or "silu" suits the
            regularisation of gradients.
        pooling: "average", whose gradient is spread over the image, or "max".

    Returns:
        A functional model from images in [0, 1] to logits.

    Raises:
        ValueError: For an unknown `pooling`, or images that are too small.

    Reference: Jordan (2024), "94% on CIFAR-10 in 3.29 seconds", arXiv:2404.00498.
    """
    pool = POOLING[checks.one_of("pooling", pooling, POOLING)]
    if min(input_shape[:2]) < 9:
        raise ValueError(f"input_shape must have sides >= 9, got input_shape={input_shape}.")
    # PyTorch's default, uniform up to 1 / sqrt(inputs): what the recipe was tuned with.
    uniform = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
    convolutions = []

    def conv(x: keras.KerasTensor, channels: int) -> keras.KerasTensor:
        layer = layers.Conv2D(
            channels, 3, padding="same", use_bias=False, kernel_initializer=uniform
        )
        convolutions.append(layer)
        return layer(x)

    def norm(x: keras.KerasTensor) -> keras.KerasTensor:
        return layers.BatchNormalization(momentum=0.6, epsilon=1e-5, scale=False)(x)

    def activate(x: keras.KerasTensor) -> keras.KerasTensor:
        return layers.Activation(activation)(x)

    images = keras.Input(input_shape, name="images")
    whitened = 2 * PATCH * PATCH * input_shape[-1]
    x = activate(layers.Conv2D(whitened, PATCH, trainable=False, name=WHITENING)(images))
    for width in widths:
        x = entry = activate(norm(pool(2)(conv(x, width))))
        x = norm(conv(x, width))
        if residual:
            x = layers.Add()([norm(conv(activate(x), width)), entry])
        x = activate(x)
    flat = layers.GlobalAveragePooling2D if pooling == "average" else layers.GlobalMaxPooling2D
    x = layers.Dense(
        num_classes, use_bias=False, kernel_initializer=uniform, name="dense", dtype="float32"
    )(flat()(x))
    logits = layers.Rescaling(1 / 9, name="logits", dtype="float32")(x)
    model = keras.Model(images, logits, name="airbench")
    for layer in convolutions:
        kernel = layer.get_weights()[0]
        same = range(min(kernel.shape[2:]))
        kernel[:, :, :, same] = 0
        kernel[1, 1, same, same] = 1
        layer.kernel.assign(kernel)
    return model


def whiten(
    classifier: keras.Model, images: np.ndarray, noise: float = 0.0, floor: float = 1e-2
) -> None:
    """Sets the whitening layer of `airbench` from training images.

    Its filters are the eigenvectors of the 2x2 patches' covariance, divided by the root
    of their eigenvalue, and their negatives; the patches' mean becomes its bias.

    Args:
        classifier: One of `airbench`.
        images: uint8, shape `(count, height, width, channels)`.
        noise: Standard deviation of Gaussian noise that the classifier will see on them, in
            units of [0, 1]: white, it adds its variance to every direction's.
        floor: Added to the eigenvalues, in units of the pixels' variance: bounds how
            much a weak direction, and a perturbation along it, is amplified.
    """
    layer = classifier.get_layer(WHITENING)
    channels = images.shape[-1]
    pixels = images.astype(np.float64) / 255
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (PATCH, PATCH), axis=(1, 2))
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, PATCH * PATCH * channels)
    mean, scale = patches.mean(axis=0), pixels.std()
    values, vectors = np.linalg.eigh(np.cov((patches - mean).T / scale))
    values += (noise / scale) ** 2
    filters = vectors / np.sqrt(values + floor) / scale
    filters = np.concatenate([filters, -filters], axis=1)
    kernel = filters.reshape(PATCH, PATCH, channels, -1)
    layer.set_weights([kernel, -mean @ filters])
