"""Votes under noise as a detector of attacks, and what an attack that knows them makes of it.

    python -m benchmarks.votes --model=digits_tv_lip [--sigma=0.1] [--images=200]

A classifier gives a clean image's noisy copies the class of the image itself more often than it
does those of an image just beyond a decision boundary. The detector here rejects an image of whose
copies too few agree, as few as 5 % of other clean images have. Two attacks meet it: DDN, which
knows nothing of it, and PGD at growing radii on the mean logits of noisy copies, whose noise is not
the detector's. `tvkeras.detection` takes the gradient's size for the same purpose; its lines say
what that rejects, and what it costs to evade. Counted are right images that an attack took over the
boundary, unnoticed if it knows the detector. Distances are medians, l2.
"""

import functools
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags
from keras import ops

from tvkeras import attacks, data, detection, zoo
from tvkeras.inference import CompiledClassifier, Logits, Tensor
from tvkeras.inputs import as_float

Detects = Callable[[np.ndarray], np.ndarray]

_MODEL = flags.DEFINE_string("model", "digits_tv_lip", "An entry of the zoo.")
_SIGMA = flags.DEFINE_float("sigma", 0.1, "Standard deviation of the noise, in units of [0, 1].")
_COPIES = flags.DEFINE_integer("copies", 100, "Noisy copies that the detector asks about.")
_KNOWN = flags.DEFINE_integer("known", 16, "Noisy copies that the attack asks about.")
_IMAGES = flags.DEFINE_integer("images", 200, "Images attacked: the last of the test images.")

FALSE_POSITIVE_RATE = 0.05
RADII = np.arange(0.25, 3.01, 0.25)


def noisy(images: Tensor, copies: int, seed: int) -> Tensor:
    """`copies` noisy copies of each image, `(copies * batch, ...)`, the same noise for all."""
    shape = (copies, 1, *images.shape[1:])
    noise = np.random.default_rng(seed).normal(0, _SIGMA.value, shape).astype("float32")
    return ops.reshape(images[None] + noise, (-1, *images.shape[1:]))


def agreement(model: CompiledClassifier, images: np.ndarray) -> np.ndarray:
    """Share of an image's noisy copies with the class of the image itself, shape `(count,)`."""
    copies = _COPIES.value

    def votes(logits: Logits, images: Tensor) -> tuple[Tensor]:
        classes = ops.argmax(logits(noisy(images, copies, seed=0)), axis=1)
        agree = ops.reshape(classes, (copies, -1)) == ops.argmax(logits(images), axis=1)[None]
        return (ops.mean(ops.cast(agree, "float32"), axis=0),)

    return model.over("votes", votes, images, batch_size=20)[0]


class Noisy(keras.layers.Layer):
    """`noisy` as a layer, with noise that the detector does not have."""

    def call(self, images: Tensor) -> Tensor:
        """Shape `(copies * batch, ...)`."""
        return noisy(images, _KNOWN.value, seed=1)


class Averaged(keras.layers.Layer):
    """The mean over the copies of `Noisy`."""

    def call(self, logits: Tensor) -> Tensor:
        """Shape `(batch, num_classes)`."""
        return ops.mean(ops.reshape(logits, (_KNOWN.value, -1, logits.shape[1])), axis=0)


def classes(model: CompiledClassifier, images: np.ndarray) -> np.ndarray:
    """What the model takes the images for, shape `(count,)`."""

    def chosen(logits: Logits, images: Tensor) -> tuple[Tensor]:
        return (ops.argmax(logits(images), axis=1),)

    return model.over("classes", chosen, images, batch_size=250)[0]


def least_radius(
    model: CompiledClassifier, images: np.ndarray, labels: np.ndarray, rejects: Detects
) -> np.ndarray:
    """The first of `RADII` at which PGD on noisy copies gets past the detector, else inf."""
    inputs = keras.Input(images.shape[1:])
    mean_logits = Averaged()(model.classifier(Noisy()(inputs)))
    averaged = CompiledClassifier(keras.Model(inputs, mean_logits))
    pgd = attacks.ProjectedGradient(norm="l2", steps=50)
    radii = np.full(len(images), np.inf)
    for radius in RADII:
        x_adv = pgd(averaged, images, labels, epsilon=float(radius), batch_size=50).x_adv
        unnoticed = (classes(model, x_adv) != labels) & ~rejects(x_adv)
        radii = np.where(unnoticed, np.minimum(radii, radius), radii)
    return radii


def line(name: str, images: int, rejected: np.ndarray, distances: np.ndarray | None = None) -> None:
    """A line of the table: how many images, which of them are rejected, and how far they moved."""
    distance = "" if distances is None else f"{np.median(distances):10.3f}"
    print(f"{name:<32}{images:>8}{100 * rejected.mean():>13.1f}{distance}", flush=True)


def report(name: str, result: attacks.AttackResult, rejects: Detects) -> None:
    """The line of an attack, of the images that it broke."""
    broken = result.success
    line(name, broken.sum(), rejects(result.x_adv[broken]), result.distance[broken])


def main(_: list[str]) -> None:
    """Prints the table."""
    test = data.load(*zoo.card(_MODEL.value).dataset.split())
    held_out = test.images[: -_IMAGES.value][:1000]
    images, labels = test.images[-_IMAGES.value :], test.labels[-_IMAGES.value :]
    model = CompiledClassifier(zoo.load(_MODEL.value))
    right = classes(model, images) == labels
    images, labels = as_float(images[right]), labels[right]

    least = np.quantile(agreement(model, held_out), FALSE_POSITIVE_RATE, method="higher")
    gradient = detection.GradientNormDetector.fit(model, held_out, FALSE_POSITIVE_RATE)
    detectors: dict[str, Detects] = {
        "votes": lambda images: agreement(model, images) < least,
        "gradient": functools.partial(gradient.detects, model),
    }
    print(f"{_MODEL.value}, noise of {_SIGMA.value:g}; rejected where under {least:g} agree")
    print(f"{'':<32}{'images':>8}{'rejected, %':>13}{'distance':>10}")
    ddn = attacks.DecoupledDirectionNorm()(model, images, labels)
    for name, rejects in detectors.items():
        line(f"clean, by {name}", len(images), rejects(images))
        report(f"DDN, by {name}", ddn, rejects)
    radii = least_radius(model, images, labels, detectors["votes"])
    found = np.isfinite(radii)
    print(
        f"{'PGD that knows, past votes':<32}{found.sum():>8}{'':>13}{np.median(radii[found]):10.3f}"
    )
    knows = gradient.adaptive_attack(steps=300, search_steps=5, initial_weight=1.0)
    report("C&W that knows, by gradient", knows(model, images, labels), detectors["gradient"])


if __name__ == "__main__":
    app.run(main)
