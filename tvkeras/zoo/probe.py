"""A few test images with the logits that a classifier gave them when it was published."""

import pathlib

import keras
import numpy as np

from tvkeras.inputs import as_float
from tvkeras.runs import Run

FILE = "probe.npz"
TOLERANCE = 1e-4


def write(folder: pathlib.Path, images: np.ndarray) -> None:
    """Writes the probe of the run in a folder.

    Args:
        folder: Of the run.
        images: uint8, shape `(count, height, width, channels)`.
    """
    np.savez(folder / FILE, images=images, logits=_logits(folder, images))


def difference(folder: pathlib.Path) -> float:
    """The largest difference between a logit in the probe and now; NaN if one is."""
    with np.load(folder / FILE, allow_pickle=False) as probe:
        return float(np.abs(_logits(folder, probe["images"]) - probe["logits"]).max())


def _logits(folder: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """Float32 logits, computed on the CPU: accelerators round products to fewer bits."""
    with keras.device("cpu:0"):
        classifier = Run.open(folder).classifier()
        return keras.ops.convert_to_numpy(classifier(as_float(images), training=False))
