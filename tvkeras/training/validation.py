"""Robust accuracy on held-out images after each epoch, to choose the best one by."""

from typing import Any

import keras
import numpy as np

from tvkeras import attacks, checks, data
from tvkeras.inference import CompiledClassifier
from tvkeras.training.recorder import lost

ATTACKED_IMAGES = 1000
STEPS = 5


def first_images(batches: keras.utils.PyDataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images and labels of a data set, or all if there are fewer.

    Of `data.Batches` they are the same in all processes, and in no random order.
    """
    if isinstance(batches, data.Batches):
        return batches.examples.images[:count], batches.examples.labels[:count]
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for index in range(len(batches)):
        parts.append(batches[index])
        if sum(len(labels) for _, labels in parts) >= count:
            break
    images, labels = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
    return images, labels


class RobustValidation(keras.callbacks.Callback):
    """Adds `val_robust_accuracy` to an epoch's logs: under PGD of a few steps.

    A quick measure to compare a run's epochs by, no robust accuracy to quote. It attacks
    the first 1,000 images that the training does not see.

    Args:
        batches: Held-out batches.
        norm: Norm of the perturbation.
        epsilon: Radius in pixel units, a number or "8/255".

    Raises:
        ValueError: For an illegal argument.
    """

    def __init__(self, batches: keras.utils.PyDataset, *, norm: str, epsilon: float | str) -> None:
        super().__init__()
        self._images, self._labels = first_images(batches, ATTACKED_IMAGES)
        self._attack = attacks.ProjectedGradient(norm=norm, steps=STEPS)
        self._epsilon = checks.epsilon(epsilon, "validation_epsilon")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Attacks the classifier as it is now, unless a loss of it is no longer finite."""
        if logs is None or lost(logs):
            return
        model = CompiledClassifier.kept(self.model)  # as `model` is asked for, JAX's too
        result = self._attack(model, self._images, self._labels, epsilon=self._epsilon)
        logs["val_robust_accuracy"] = result.robust_accuracy
