"""What `compile`, `fit` and `evaluate` look at before the first step."""

import itertools
from typing import Any

import keras
import numpy as np

from tvkeras import contract, inputs
from tvkeras.contract import Wrapper
from tvkeras.training.losses import SmoothedCrossentropy

CHECKED_IMAGES = 64  # that the classifier is asked about before it trains


def admitted(
    model: Wrapper, loss: keras.losses.Loss, x: Any, y: Any, names: tuple[str, str] = ("x", "y")
) -> tuple[Any, Any]:
    """Images and labels as arrays, if they are what a model and a loss take; a data set as it is.

    Raises:
        ValueError: If they are not, by their `names`.
    """
    is_array = hasattr(x, "__array__") or isinstance(x, list | tuple)
    if y is None and x is not None and not is_array:
        return x, y
    shape = contract.image_shape(model.classifier)
    images = inputs.images(x, bounds=model.bounds, shape=shape, argument=names[0])
    if y is None:
        raise ValueError(f"{names[1]} must hold the labels of the images in {names[0]}, got None.")
    check = inputs.soft_labels if _wants_rows(loss, y) else inputs.labels
    num_classes = contract.num_classes(model.classifier, images.shape[1:])
    return images, check(y, len(images), num_classes, names[1])


def check_loss(loss: Any, loss_weights: Any) -> None:
    """Raises ValueError unless a loss is one of logits, whose mean over a batch is minimised."""
    if not isinstance(loss, keras.losses.Loss) or not loss.get_config().get("from_logits", 1):
        raise ValueError(
            "loss must be a keras.losses.Loss built with from_logits=True, "
            f"got loss={loss!r}. The classifier's outputs are logits."
        )
    if loss.reduction != "sum_over_batch_size" or loss_weights is not None:
        raise ValueError(
            "loss must have reduction='sum_over_batch_size' and no loss_weights, got "
            f"reduction={loss.reduction!r}, loss_weights={loss_weights!r}. "
            "Weigh examples with sample_weight."
        )


def check_mirroring(augmentation: Any, x: Any) -> None:
    """Raises ValueError unless `x` mirrors the images where the augmentation counts on it."""
    alternating = getattr(augmentation, "flip", None) == "alternating"
    if alternating and getattr(x, "augmentation", None) != augmentation:
        raise ValueError(
            "augmentation with flip='alternating' needs an x that mirrors the images, "
            "tvkeras.data.Batches(examples, batch_size, seed, augmentation=augmentation), got "
            f"x={x!r:.80}. Use flip=True for other data."
        )


def first_batch(x: Any, y: Any) -> tuple[tuple[Any, Any] | None, Any]:
    """A few leading images and labels, and `x` with nothing of it consumed."""
    if y is not None:
        return (x[:CHECKED_IMAGES], y[:CHECKED_IMAGES]), x
    if isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    elif hasattr(x, "take"):  # tf.data.Dataset
        batch = next(iter(x.take(1)))
    elif hasattr(x, "__next__"):
        batch = next(x)
        x = (element for element in itertools.chain([batch], x))
    else:
        return None, x
    images, labels, *_ = batch
    return (images[:CHECKED_IMAGES], labels[:CHECKED_IMAGES]), x


def _wants_rows(loss: Any, labels: Any) -> bool:
    """Whether a loss takes rows of class weights; one of which that is not known, these labels."""
    losses = keras.losses
    if isinstance(loss, losses.CategoricalCrossentropy | losses.CategoricalFocalCrossentropy):
        return True
    if isinstance(loss, losses.SparseCategoricalCrossentropy | SmoothedCrossentropy):
        return False
    shape = np.shape(labels)
    return len(shape) == 2 and shape[1] > 1
