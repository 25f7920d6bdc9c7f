"""A first look at a classifier: errors, gradient norms, FGSM and PGD."""

from collections.abc import Sequence
from typing import Any

import keras

from tvkeras import attacks, inputs, norms
from tvkeras.data import Examples
from tvkeras.inference import CompiledClassifier, loss_statistics

PGD_STEPS = 20


def measure(
    classifier: keras.Model | CompiledClassifier,
    examples: Examples,
    *,
    norm: str = "l2",
    epsilons: Sequence[float | str] = (0.1, 0.25, "100/255"),
    attacked_images: int = 1000,
    batch_size: int = 250,
) -> dict[str, Any]:
    """Clean error, size of the loss's gradient, and error under FGSM and 20-step PGD.

    FGSM and PGD are quick checks: only a suite of several kinds of attack gives a
    robust accuracy to quote.

    Args:
        classifier: Maps images to logits.
        examples: The test set; clean error and gradients are over all of it.
        norm: Threat norm of the attacks and, through its dual, of the gradients.
        epsilons: Radii in pixel units.
        attacked_images: How many of the first images are attacked.
        batch_size: Images in a batch.

    Returns:
        `clean_error`, `loss`, `gradient_norm_mean`, `gradient_norm_max` over
        `images` images; `fgsm_error` and `pgd_error`, by radius as text, over
        `attacked_images`.
    """
    model = CompiledClassifier.of(classifier)
    images, labels = examples.images, examples.labels
    losses, predicted, sizes = loss_statistics(model, images, labels, norm, batch_size)
    wrong = predicted != inputs.labels(labels, len(predicted))
    count = min(attacked_images, len(examples))

    def errors(steps: int) -> dict[str, float]:
        attack = attacks.ProjectedGradient(norm=norm, steps=steps)
        few = images[:count], labels[:count]
        found = (attack(model, *few, epsilon=e, batch_size=batch_size) for e in epsilons)
        return {str(e): float(r.success.mean()) for e, r in zip(epsilons, found, strict=True)}

    return {
        "images": len(examples),
        "clean_error": float(wrong.mean()),
        "loss": float(losses.mean()),
        "gradient_norm": norms.dual(norm),
        "gradient_norm_mean": float(sizes.mean()),
        "gradient_norm_max": float(sizes.max()),
        "norm": norm,
        "attacked_images": count,
        "attacked_images_clean_error": float(wrong[:count].mean()),
        "fgsm_error": errors(1),
        "pgd_error": errors(PGD_STEPS),
    }
