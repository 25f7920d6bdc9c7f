"""ResNeXt for small images, the network of the paper."""

import keras
from keras import layers


def resnext(
    num_classes: int,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    depth: int = 34,
    width: int = 32,
    branches: int = 2,
    activation: str = "relu",
) -> keras.Model:
    """ResNeXt of `depth` layers in three stages of widths 1, 2 and 4 times `width`.

    A block is `branches` parallel chains of conv3x3, BatchNorm, activation, conv3x3,
    BatchNorm, whose mean is added to the block's input. A branch is a chain of its
    own rather than a group of one wide convolution: the function and the number of
    parameters are the same, and no backend has to run a grouped convolution, which
    TensorFlow's CPU kernels do several times slower.

    The last layer is linear. (The reference code normalises and rectifies the
    logits; linear ones tell the truth about margins.)

    Args:
        num_classes: Number of logits.
        input_shape: `(height, width, channels)`, sides divisible by 4.
        depth: Layers with weights, 6 blocks_per_stage + 4: 10, 16, 22, 28, 34, ...
        width: Channels of the first stage.
        branches: Parallel chains in a block, ResNeXt's cardinality.
        activation: A Keras activation; a smooth one such as "gelu" or "softplus"
            suits the regularisation of gradients.

    Returns:
        A functional model from images in [0, 1] to logits.

    Raises:
        ValueError: If `depth` is not one of the above.

    Reference: Xie et al. (2017), arXiv:1611.05431; ResNeXt-34 (2x32) of Finlay,
    Oberman & Abbasi (2019), arXiv:1808.09540.
    """
    blocks, remainder = divmod(depth - 4, 6)
    if blocks < 1 or remainder:
        raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, 34, ...), got depth={depth}.")

    def conv(x: keras.KerasTensor, channels: int, size: int) -> keras.KerasTensor:
        x = layers.Conv2D(
            channels, size, padding="same", use_bias=False, kernel_initializer="he_normal"
        )(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    def activate(x: keras.KerasTensor) -> keras.KerasTensor:
        return layers.Activation(activation)(x)

    def block(x: keras.KerasTensor, channels: int) -> keras.KerasTensor:
        chains = [conv(activate(conv(x, channels, 3)), channels, 3) for _ in range(branches)]
        mean = layers.Average()(chains) if branches > 1 else chains[0]
        return activate(layers.Add()([x, mean]))

    images = keras.Input(input_shape, name="images")
    x = activate(conv(images, width, 3))
    for stage in range(3):
        if stage > 0:
            x = activate(conv(x, width * 2**stage, 1))
            x = layers.AveragePooling2D(2)(x)
        for _ in range(blocks):
            x = block(x, width * 2**stage)
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(num_classes, name="logits", dtype="float32")(x)
    return keras.Model(images, logits, name=f"resnext{depth}_{branches}x{width}")
