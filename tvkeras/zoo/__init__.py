"""Published classifiers: `tvkeras.zoo.load("airbench_tv_lip")` is a plain Keras model.

An entry is a published run folder:

run.json, config.gin, log.csv       the run: network, data, settings, log
best.weights.h5                     the classifier, as float16
card.json, README.md, *.png         what was measured on exactly these weights
examples.csv                        the same, image by image
probe.npz                           test images and their logits, for `verify`

A released entry never changes under its name. `tvkeras.zoo.store` says where files are looked for,
`tvkeras.zoo.publishing` makes one of an evaluated run, `tvkeras.zoo.exporting` writes one for
Hugging Face, and `tvkeras.zoo.hub` reads such folders.
"""

import fnmatch
import os
import pathlib
from typing import TYPE_CHECKING

import keras

from tvkeras import checkpoint, checks
from tvkeras.runs import Run
from tvkeras.zoo import hub, probe, store
from tvkeras.zoo.store import DownloadError

if TYPE_CHECKING:  # they import what measures, which `load` does not need
    from tvkeras.detection import GradientNormDetector
    from tvkeras.evaluation.card import Card

__all__ = ["DownloadError", "card", "detector", "find", "load", "names", "verify"]


def names(pattern: str = "*") -> list[str]:
    """The entries whose name matches a pattern such as "*tv*", sorted."""
    return sorted(fnmatch.filter(store.index(), pattern))


def load(name: str | os.PathLike[str]) -> keras.Model:
    """A published classifier, on either backend.

    Args:
        name: One of `names()`; or a folder that `exporting.package` wrote (a path with a
            "/", if an entry has the name too), or such a one on Hugging Face, as
            "hf://USER/NAME" (with huggingface_hub installed). Of these the hashes are
            the folder's own: take them from those you trust.

    Returns:
        A plain Keras model from float32 images in [0, 1], of shape
        `(batch, height, width, channels)` and not normalised in any other way, to logits
        of shape `(batch, num_classes)`. Its weights are float32 and can be trained on.

    Raises:
        ValueError: For an unknown name, with those that exist; or an entry of a newer
            schema.
        checkpoint.CheckpointError: If a file is not the published one, or does not fit.
        DownloadError: If a file is neither here nor can be downloaded.

    Example:
        classifier = tvkeras.zoo.load("airbench_tv_lip")
        classifier.predict(images).argmax(axis=1)
    """
    if hub.is_address(name):
        return hub.load(name)
    return Run.open(store.folder(str(name), "run.json", "best.weights.h5")).classifier()


def card(name: str | os.PathLike[str]) -> "Card":
    """What was measured on an entry, or on what `load` takes else.

    Raises:
        ValueError, DownloadError: As `load`.
    """
    from tvkeras.evaluation.card import Card

    find_folder = hub.folder if hub.is_address(name) else store.folder
    return Card.from_json((find_folder(str(name), "card.json") / "card.json").read_text())


def detector(name: str, statistic: str = "loss") -> "GradientNormDetector":
    """The detector of attacked images that an entry's card reports on.

    Args:
        name: One of `names()`.
        statistic: "loss" or "model".

    Raises:
        ValueError, DownloadError: As `load`; also for a statistic that was not measured.
    """
    from tvkeras.detection import GradientNormDetector

    found = {report.statistic: report for report in card(name).detection}
    report = found[checks.one_of("statistic", statistic, found)]
    return GradientNormDetector(norm=report.norm, statistic=statistic, threshold=report.threshold)


def find(model: str) -> pathlib.Path:
    """The folder of a classifier that a command was given: a run's, or that of an entry.

    Args:
        model: A folder, which wins if it holds a run, or one of `names()`, of which the
            weights, the run and the card are fetched.

    Raises:
        ValueError, DownloadError: As `load`, for an entry.
    """
    if model in store.index() and not pathlib.Path(model, "run.json").exists():
        return store.folder(model, "run.json", "best.weights.h5", "card.json")
    return pathlib.Path(model)


def verify(name: str) -> float:
    """Fetches all files of an entry, compares their sha256, and computes the probe's logits again.

    Returns:
        The largest difference between a logit and the published one, at most
        `probe.TOLERANCE`.

    Raises:
        ValueError, DownloadError: As `load`.
        checkpoint.CheckpointError: If the difference is larger.
    """
    folder = store.folder(name, *store.files(name))
    difference = probe.difference(folder)
    if not difference <= probe.TOLERANCE:  # NaN is not
        raise checkpoint.CheckpointError(
            f"zoo entry {name!r} computes other logits than were published: they differ by "
            f"{difference:.3g}, more than {probe.TOLERANCE:g}."
        )
    return difference
