"""ResNet-50 of `keras.applications`, with its normalisation inside."""

import keras

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_VARIANCE = (0.229**2, 0.224**2, 0.225**2)


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
    normalized = keras.layers.Normalization(mean=IMAGENET_MEAN, variance=IMAGENET_VARIANCE)(images)
    return keras.Model(images, network(normalized), name="resnet50")
