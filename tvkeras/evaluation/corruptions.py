"""Clean error on images that are spoiled without malice: noise, blur, brightness, contrast."""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops
from scipy import ndimage

from tvkeras.inference import CompiledClassifier, Logits, Tensor
from tvkeras.inputs import as_float

# The third of the five severities that the reference has for 32x32 images. Its brightness is
# that of a colour's value; here it is added to all channels.
CORRUPTIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "Gaussian noise, deviation 0.08": lambda images, random: (
        images + 0.08 * random.standard_normal(images.shape, np.float32)
    ),
    "Gaussian blur, deviation 0.7 pixels": lambda images, random: ndimage.gaussian_filter(
        images, (0, 0.7, 0.7, 0)
    ),
    "brightness + 0.15": lambda images, random: images + 0.15,
    "contrast x 0.4": lambda images, random: (
        0.6 * images.mean(axis=(1, 2), keepdims=True) + 0.4 * images
    ),
}


def corrupted_classes(
    classifier: keras.Model | CompiledClassifier,
    images: np.ndarray,
    *,
    batch_size: int = 250,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Predicted classes of corrupted images, int64 `(count,)`, by corruption.

    Args:
        classifier: Maps images to logits.
        images: Floats in the classifier's bounds, by default [0, 1], or uint8; shape
            `(count, height, width, channels)`.
        batch_size: Images in a batch, at most.
        seed: Of the noise.

    Raises:
        ValueError: If the images are no images, or not the classifier's.

    Reference: Hendrycks & Dietterich (2019), arXiv:1903.12261.
    """
    model = CompiledClassifier.of(classifier)
    clean = as_float(model.images(images), model.bounds)

    def predict(logits: Logits, images: Tensor) -> tuple[Tensor]:
        return (ops.argmax(logits(images), axis=1),)

    found = {}
    for name, corrupt in CORRUPTIONS.items():
        spoiled = np.clip(corrupt(clean, np.random.default_rng(seed)), 0, 1).astype(np.float32)
        (classes,) = model.unit.over("classes", predict, spoiled, batch_size=batch_size)
        found[name] = classes.astype(np.int64)
    return found
