"""A first look at a classifier: errors, gradient norms, FGSM and PGD."""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tvkeras import attacks, backends, norms
from tvkeras.attacks.pgd import input_gradient
from tvkeras.data import Examples

PGD_STEPS = 20


def measure(
    classifier: keras.Model,
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
        classifier: Maps images in [0, 1] to logits.
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
    call = backends.fast_twin(classifier).stateless_call
    trainable = [variable.value for variable in classifier.trainable_variables]
    state = [variable.value for variable in classifier.non_trainable_variables]

    def clean(images: Any, labels: Any) -> tuple[Any, Any, Any]:
        losses, logits, gradient = input_gradient(call, trainable, state, images, labels)
        return losses, ops.argmax(logits, axis=1), norms.dual_length(gradient, norm)

    compiled_clean = backends.compiled(clean)
    losses, wrong, sizes = [], [], []
    for images, labels in _batches(examples, len(examples), batch_size):
        loss, predicted, size = map(ops.convert_to_numpy, compiled_clean(images, labels))
        losses.append(loss)
        wrong.append(predicted != labels)
        sizes.append(size)
    wrong_all, sizes_all = np.concatenate(wrong), np.concatenate(sizes)
    count = min(attacked_images, len(examples))
    return {
        "images": len(examples),
        "clean_error": float(wrong_all.mean()),
        "loss": float(np.concatenate(losses).mean()),
        "gradient_norm": norms.dual(norm),
        "gradient_norm_mean": float(sizes_all.mean()),
        "gradient_norm_max": float(sizes_all.max()),
        "norm": norm,
        "attacked_images": count,
        "attacked_images_clean_error": float(wrong_all[:count].mean()),
        **{
            f"{name}_error": {
                str(epsilon): _attacked_error(
                    classifier, examples, count, batch_size, attack, epsilon
                )
                for epsilon in epsilons
            }
            for name, attack in (
                ("fgsm", attacks.ProjectedGradient(classifier, norm=norm, steps=1)),
                ("pgd", attacks.ProjectedGradient(classifier, norm=norm, steps=PGD_STEPS)),
            )
        },
    }


def _attacked_error(
    classifier: keras.Model,
    examples: Examples,
    count: int,
    batch_size: int,
    attack: attacks.ProjectedGradient,
    epsilon: float | str,
) -> float:
    wrong = 0
    for images, labels in _batches(examples, count, batch_size):
        x_adv = attack(images, labels, epsilon)
        logits = classifier.predict_on_batch(x_adv)
        wrong += int((logits.argmax(axis=1) != labels).sum())
    return wrong / count


def _batches(
    examples: Examples, count: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    size = -(-count // -(-count // batch_size))  # nearly equal batches: one shape to compile
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        yield examples.images[rows].astype(np.float32) / 255, examples.labels[rows]
