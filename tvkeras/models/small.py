"""A small convolutional network, for digits and for tests."""

import keras
from keras import layers


def small_cnn(
    num_classes: int,
    input_shape: tuple[int, int, int] = (8, 8, 1),
    width: int = 32,
    activation: str = "relu",
) -> keras.Model:
    """Two convolutions, average pooling, one more, global average, linear logits.

    Args:
        num_classes: Number of logits.
        input_shape: `(height, width, channels)`.
        width: Channels of the first convolution; the others have twice as many.
        activation: A Keras activation.

    Returns:
        A functional model from images in [0, 1] to logits.
    """

    def conv(x: keras.KerasTensor, channels: int) -> keras.KerasTensor:
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        return layers.Activation(activation)(x)

    images = keras.Input(input_shape, name="images")
    x = conv(conv(images, width), 2 * width)
    x = conv(layers.AveragePooling2D(2)(x), 2 * width)
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(num_classes, name="logits", dtype="float32")(x)
    return keras.Model(images, logits, name="small_cnn")
