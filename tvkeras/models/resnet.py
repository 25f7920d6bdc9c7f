"""ResNet-9 for small images and short training; ResNet-50 of `keras.applications`."""

import keras
from keras import layers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_VARIANCE = (0.229**2, 0.224**2, 0.225**2)


def resnet9(
    num_classes: int,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    width: int = 64,
    activation: str = "relu",
) -> keras.Model:
    """ResNet of nine layers: the accuracy of a deep one in a few epochs of training.

    Eight convolutions of 3x3, each with BatchNorm and activation: one of `width`
    channels; one each of 2, 4 and 8 times `width` that halves the sides, the first and
    the last of them followed by two convolutions around which their input is added;
    then the average over the image, and linear logits. Pooling is by averages, whose
    gradient is spread over the image, and comes before BatchNorm, where it saves
    three quarters of the activations.

    Args:
        num_classes: Number of logits.
        input_shape: `(height, width, channels)`, sides divisible by 8.
        width: Channels of the first convolution.
        activation: A Keras activation; a smooth one such as "silu" suits the
            regularisation of gradients.

    Returns:
        A functional model from images in [0, 1] to logits.

    Reference: Page (2018), "How to train your ResNet"; Coleman et al. (2017), DAWNBench.
    """

    def conv(x: keras.KerasTensor, channels: int, pool: bool = False) -> keras.KerasTensor:
        x = layers.Conv2D(
            channels, 3, padding="same", use_bias=False, kernel_initializer="he_normal"
        )(x)
        if pool:
            x = layers.AveragePooling2D(2)(x)
        x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        return layers.Activation(activation)(x)

    def residual(x: keras.KerasTensor, channels: int) -> keras.KerasTensor:
        return layers.Add()([x, conv(conv(x, channels), channels)])

    images = keras.Input(input_shape, name="images")
    x = conv(images, width)
    x = residual(conv(x, 2 * width, pool=True), 2 * width)
    x = conv(x, 4 * width, pool=True)
    x = residual(conv(x, 8 * width, pool=True), 8 * width)
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(num_classes, name="logits", dtype="float32")(x)
    return keras.Model(images, logits, name=f"resnet9_{width}")


def resnet50(num_classes: int, input_shape: tuple[int, int, int] = (224, 224, 3)) -> keras.Model:
    """ResNet-50 with linear logits, untrained.

    Args:
        num_classes: Number of logits.
        input_shape: `(height, width, 3)`, sides of at least 32.

    Returns:
        A functional model from images in [0, 1] to logits.

    Reference: He et al. (2016), arXiv:1512.03385.
    """
    network = keras.applications.ResNet50(
        weights=None, classes=num_classes, classifier_activation=None, input_shape=input_shape
    )
    images = keras.Input(input_shape, name="images")
    normalized = layers.Normalization(mean=IMAGENET_MEAN, variance=IMAGENET_VARIANCE)(images)
    return keras.Model(images, network(normalized), name="resnet50")
