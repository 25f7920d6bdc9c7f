"""Accuracy on held-out images under what a network is trained for, to choose the best epoch by."""

import abc
from typing import Any

import keras
import numpy as np

from tvkeras import attacks, checks, data
from tvkeras.inference import CompiledClassifier, equal_batches
from tvkeras.inputs import as_float
from tvkeras.training.recorder import lost

VALIDATION_IMAGES = 1000
STEPS = 5
BATCH_SIZE = 250


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


class Validation(keras.callbacks.Callback, abc.ABC):
    """Adds an accuracy to an epoch's logs, of the first 1,000 images that training does not see.

    A quick measure to compare a run's epochs by, no accuracy to quote.
    """

    name: str

    def __init__(self, batches: keras.utils.PyDataset) -> None:
        super().__init__()
        self._images, self._labels = first_images(batches, VALIDATION_IMAGES)

    @abc.abstractmethod
    def accuracy(self, model: CompiledClassifier) -> float:
        """Share of the images that `model` gets right."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Asks the classifier as it is now, unless a loss of it is no longer finite."""
        if logs is not None and not lost(logs):
            # As `model` is asked for, JAX's too.
            logs[self.name] = self.accuracy(CompiledClassifier.kept(self.model))


class RobustValidation(Validation):
    """Adds `val_robust_accuracy`: under PGD of a few steps.

    Args:
        batches: Held-out batches.
        norm: Norm of the perturbation.
        epsilon: Radius in pixel units, a number or "8/255".

    Raises:
        ValueError: For an illegal argument.
    """

    name = "val_robust_accuracy"

    def __init__(self, batches: keras.utils.PyDataset, *, norm: str, epsilon: float | str) -> None:
        super().__init__(batches)
        self._attack = attacks.ProjectedGradient(norm=norm, steps=STEPS)
        self._epsilon = checks.epsilon(epsilon, "validation_epsilon")

    def accuracy(self, model: CompiledClassifier) -> float:
        """Share that stands."""
        result = self._attack(model, self._images, self._labels, epsilon=self._epsilon)
        return result.robust_accuracy


class NoisyValidation(Validation):
    """Adds `val_noisy_accuracy`: under Gaussian noise, one draw for each image.

    A network that learned under noise, and is to vote under it, may err without.

    Args:
        batches: Held-out batches.
        noise: Standard deviation, in units of [0, 1].
    """

    name = "val_noisy_accuracy"

    def __init__(self, batches: keras.utils.PyDataset, *, noise: float) -> None:
        super().__init__(batches)
        draws = np.random.default_rng(0).standard_normal(self._images.shape, "float32")
        self._images = as_float(self._images) + np.float32(noise) * draws

    def accuracy(self, model: CompiledClassifier) -> float:
        """Share that is right."""
        batches = equal_batches(len(self._images), BATCH_SIZE)
        classes = [model.logits(self._images[rows]).argmax(axis=1) for rows in batches]
        return float(np.mean(np.concatenate(classes)[: len(self._images)] == self._labels))
