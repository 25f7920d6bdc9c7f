"""Sizes of a classifier's derivative at an image.

`gradient_norm` needs no true label: a detector measures it, and the attack that evades it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from tvkeras import checks, norms
from tvkeras.attacks.base import AttackedClassifier, Logits, example_losses, input_gradient

Tensor = Any

STATISTICS = ("loss", "model")


def gradient_norm(
    logits: Logits, images: Tensor, norm: str, statistic: str
) -> tuple[Tensor, Tensor, int]:
    """Size of the derivative at each image; it can be differentiated itself.

    "loss": ||grad_x l(x, k)||_*, the cross-entropy at the predicted class k; one
    model call. "model": max_k ||grad_x p_k(x)||_*, the largest row of the Jacobian
    of the probabilities; one call for each class, and one to differentiate. For
    norm="l2" this is ||grad f||_{2,inf}.

    Args:
        logits: Maps images to logits.
        images: Shape `(batch, height, width, channels)`.
        norm: Threat norm, whose dual measures the gradients.
        statistic: "loss" or "model".

    Returns:
        Sizes `(batch,)`, logits `(batch, num_classes)`, and model calls per image.

    Reference: Finlay et al. (2019), arXiv:1808.09540.
    """
    checks.one_of("statistic", statistic, STATISTICS)

    def sized(images: Tensor, output: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        _, outputs, gradient = input_gradient(logits, images, output)
        return norms.dual_length(gradient, norm), outputs

    if statistic == "loss":
        sizes, outputs = sized(images, _predicted_losses)
        return sizes, outputs, 1

    fixed = ops.stop_gradient(images)

    def larger(row: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rows, largest = state
        row = ops.cast(row, rows.dtype)
        sizes, _ = sized(fixed, lambda outputs: _probability(outputs, ops.full_like(rows, row)))
        return ops.where(sizes > largest, row, rows), ops.maximum(sizes, largest)

    first = ops.zeros_like(images[:, 0, 0, 0], dtype="int32")
    largest, outputs = sized(fixed, lambda outputs: _probability(outputs, first))
    classes = outputs.shape[-1]
    rows, _ = ops.fori_loop(1, classes, larger, (first, largest))
    sizes, outputs = sized(images, lambda outputs: _probability(outputs, rows))
    return sizes, outputs, classes + 1


def loss_statistics(
    model: AttackedClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    norm: str,
    batch_size: int = 250,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss at the true label, predicted class and ||grad loss||_*, shape `(count,)` each.

    Args:
        model: The classifier.
        images: Floats in the classifier's bounds, or uint8; shape
            `(count, height, width, channels)`.
        labels: True classes, shape `(count,)`.
        norm: Threat norm, whose dual measures the gradients.
        batch_size: Images in a batch, at most.

    Raises:
        ValueError: For images or labels that are none of the classifier's.
    """
    checks.one_of("norm", norm, norms.DUALS)
    images = model.images(images)
    labels = model.labels(labels, images)

    def statistics(logits: Logits, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        losses, outputs, gradient = input_gradient(
            logits, images, lambda outputs: example_losses(outputs, labels)
        )
        return losses, ops.argmax(outputs, axis=1), norms.dual_length(gradient, norm)

    key = ("loss_statistics", norm)
    losses, classes, sizes = model.over(key, statistics, images, labels, batch_size=batch_size)
    return losses, classes, sizes


def measured(
    model: AttackedClassifier, images: np.ndarray, norm: str, statistic: str
) -> np.ndarray:
    """`gradient_norm` of the classifier itself at one batch of images in [0, 1]: `(batch,)`."""

    def sizes(logits: Logits, images: Tensor) -> Tensor:
        return gradient_norm(logits, images, norm, statistic)[0]

    return model.compiled(("gradient_norm", norm, statistic), sizes, own=True)(images)


def _predicted_losses(logits: Tensor) -> Tensor:
    """Cross-entropy at the predicted class, shape `(batch,)`."""
    return example_losses(logits, ops.stop_gradient(ops.argmax(logits, axis=-1)))


def _probability(logits: Tensor, classes: Tensor) -> Tensor:
    """Probability of one class for each example, shape `(batch,)`."""
    return ops.take_along_axis(ops.softmax(logits), classes[:, None], axis=-1)[:, 0]
