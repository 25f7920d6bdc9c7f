"""`defend`: fine-tunes any trained classifier under the penalty, in one call."""

import copy
import math
import time
from typing import Any

import keras
import numpy as np

from tvkeras import attacks, checks, data, norms
from tvkeras.defenses import Defense, TVLipschitz
from tvkeras.inference import CompiledClassifier
from tvkeras.training.averaging import Lookahead
from tvkeras.training.classifier import RobustClassifier
from tvkeras.training.schedules import one_cycle
from tvkeras.training.validation import VALIDATION_IMAGES, RobustValidation

LONGEST_STEP = 0.5
RAMP = 0.2  # fraction of the steps over which the penalty grows to its weight
REPORTED_STEPS = 20


def defend(
    model: keras.Model,
    images: Any,
    labels: Any,
    *,
    norm: str = "l2",
    epsilon: float | str = 0.5,
    epochs: int = 5,
    bounds: tuple[float, float] | None = None,
    defense: Defense | None = None,
    augmentation: data.Augmentation | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 128,
    validation_fraction: float = 0.1,
    seed: int = 0,
    verbose: bool = True,
) -> keras.Model:
    """A copy of a trained classifier that resists perturbations, fine-tuned under the penalty.

    The penalty's weight is the radius, as in one-step adversarial training, and its step as
    long as a perturbation of that radius, at most 0.5. It grows to its weight over the first
    fifth of the steps; the weights are averaged along (`Lookahead`), and those of the epoch
    with the highest accuracy under PGD on held-out images are kept.

    Args:
        model: Any built Keras model from images to logits; it stays as it is. Layers that
            are frozen stay frozen.
        images: For training: floats in `bounds`, or uint8; shape
            `(count, height, width, channels)`.
        labels: Their classes, shape `(count,)`.
        norm: Norm of the perturbations to resist: "l2", "linf" or "l1".
        epsilon: Their radius in units of [0, 1], a number or "8/255".
        epochs: Passes over the images.
        bounds: Pixel values of black and white in the model's images; by default [0, 1].
            (0, 255) for one of `keras.applications` with its preprocessing inside.
        defense: What training minimises instead of the penalty above.
        augmentation: Of the training images, such as `tvkeras.data.Augmentation()`.
        learning_rate: The highest of Adam's, which climbs to it over the first fifth of the
            steps and falls along a cosine.
        batch_size: Images in a batch.
        validation_fraction: Share of the images that is held out.
        seed: Of everything random.
        verbose: Whether to show progress, and error before and after.

    Returns:
        A plain Keras model.

    Raises:
        ValueError: For an illegal argument, images or labels that are none of the model's,
            or a model that returns no logits or that Keras cannot copy.

    Example:
    ```python
    robust = tvkeras.defend(model, images, labels, norm="l2", epsilon=0.5)
    robust.save("robust.keras")
    ```
    """
    radius = checks.epsilon(epsilon)
    checks.number(
        "validation_fraction", validation_fraction, minimum=0.0, maximum=1.0, exclusive=True
    )
    checks.whole_number("epochs", epochs, minimum=1)
    given = CompiledClassifier(model, bounds)
    images = given.images(images)
    labels = given.labels(labels, images)
    examples = data.Examples(
        name="the given images",
        split="train",
        images=images,
        labels=labels,
        num_classes=given.num_classes(images),
        checksum="",
    )
    training, held_out = data.held_out(examples, validation_fraction)
    batches = data.Batches(
        training, min(batch_size, len(training)), seed, augmentation=augmentation
    )
    steps = len(batches) * epochs
    robust = RobustClassifier(
        _copied(given.classifier),
        defense or penalty(norm, radius, images.shape[1:]),
        augmentation=augmentation,
        seed=seed,
        averaging=Lookahead(steps=steps, epoch_steps=len(batches)),
        ramp_steps=round(RAMP * steps),
        bounds=given.bounds,
    )
    robust.compile(
        keras.optimizers.Adam(one_cycle(steps, learning_rate=learning_rate)), metrics=["accuracy"]
    )
    validation = data.Batches(held_out, batch_size)
    best = keras.callbacks.EarlyStopping(
        "val_robust_accuracy", mode="max", patience=epochs, restore_best_weights=True
    )
    started = time.monotonic()
    robust.fit(
        batches,
        epochs=epochs,
        callbacks=[RobustValidation(validation, norm=norm, epsilon=radius), best],
        shuffle=False,
        verbose="auto" if verbose else 0,
    )
    seconds = time.monotonic() - started
    if verbose:
        attack = attacks.ProjectedGradient(norm=norm, steps=REPORTED_STEPS)
        few = held_out.images[:VALIDATION_IMAGES], held_out.labels[:VALIDATION_IMAGES]
        print(f"on {len(few[1])} held-out images, error   clean   PGD {norm} {epsilon}")
        for name, classifier in (("before", given), ("after", CompiledClassifier(robust))):
            clean = np.mean(_predicted(classifier, few[0]) != few[1])
            attacked = 1 - attack(classifier, *few, epsilon=radius).robust_accuracy
            print(f"  {name:<31}{clean:8.1%}{attacked:13.1%}")
        print(f"{epochs} epochs of {robust.defense.passes:.3g} passes a step took {seconds:.0f} s")
    return robust.classifier


def penalty(norm: str, epsilon: float, shape: tuple[int, ...]) -> TVLipschitz:
    """The penalty for perturbations of a radius, of images of a shape.

    Its step is the l2 length of the steepest perturbation of that radius, at most 0.5.
    """
    checks.one_of("norm", norm, norms.DUALS)
    length = epsilon * math.sqrt(math.prod(shape)) if norm == "linf" else epsilon
    return TVLipschitz(norm=norm, tv_weight=epsilon, fd_step=min(length, LONGEST_STEP))


def _predicted(model: CompiledClassifier, images: np.ndarray) -> np.ndarray:
    """Predicted classes, shape `(count,)`."""
    (logits,) = model.over("logits", lambda logits, x: (logits(x),), images, batch_size=250)
    return np.asarray(logits.argmax(axis=1))


def _copied(model: keras.Model) -> keras.Model:
    try:
        return copy.deepcopy(model)  # Keras saves and loads it
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"model must be one that Keras can save and load, got {model!r}: {error} Register its "
            "class and give it get_config, or train it in place with tvkeras.RobustClassifier."
        ) from error
