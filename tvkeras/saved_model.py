"""A classifier and its detector as a SavedModel for TensorFlow Serving.

The server needs no Python of ours: conversion of 8-bit pixels, checks of the images and the
detector are part of the graph.
"""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tvkeras import checks, contract, data
from tvkeras.detection import GradientNormDetector
from tvkeras.evaluation import card
from tvkeras.inference import STATISTICS, gradient_norm
from tvkeras.inputs import Bounds
from tvkeras.runs import Run

Tensor = Any


def export(
    classifier: keras.Model,
    output: str | os.PathLike[str],
    *,
    detector: GradientNormDetector | None = None,
    version: int | None = None,
    bounds: tuple[float, float] | None = None,
) -> pathlib.Path:
    """Writes a SavedModel into `output/VERSION`; the folder appears whole or not at all.

    Its signatures take `images` of shape `(count, height, width, channels)`, any count
    from 1:

    - `serving_default`: float32 in [0, 1] -> `logits` and `probabilities`
      `(count, num_classes)`, `class_id` `(count,)`, and with a detector `score`, the
      gradient norm `(count,)`, and `attack_suspected` `(count,)`;
    - `serving_uint8`: uint8, divided by 255 -> the same;
    - `predict`: float32 in [0, 1] -> `logits` alone, without the gradient's cost.

    Images of another shape or outside [0, 1], NaN and empty batches fail with
    INVALID_ARGUMENT. A client never needs the classifier's own bounds: images are mapped
    to them in the graph. Without a detector its two outputs do not exist: a constant
    "not suspected" would be a verdict that nobody measured.

    Args:
        classifier: Maps images to logits.
        output: Folder of the model's versions; its name is usually the model's.
        detector: Fitted on this classifier. Its threshold becomes part of the graph.
        version: Number of the version; default: the next free one.
        bounds: Of the classifier's own images, such as (0, 255); by default [0, 1], or
            those of a `RobustClassifier`.

    Returns:
        The version's folder.

    Raises:
        ValueError: For an illegal argument, a classifier of other than logits, an existing
            version, or a backend other than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"export needs the TensorFlow backend, got {keras.backend.backend()!r}. Weights are "
            "the same on both: load them under KERAS_BACKEND=tensorflow."
        )
    classifier, own_bounds = contract.unwrapped(classifier, bounds)
    shape = contract.image_shape(classifier)
    if shape is None:
        raise ValueError(
            "classifier must be a Keras model of one input (batch, height, width, channels), got "
            f"input_shape={getattr(classifier, 'input_shape', None)!r}."
        )
    folder = pathlib.Path(output)
    if version is None:
        names = [path.name for path in folder.glob("*")]
        version = 1 + max((int(name) for name in names if name.isdecimal()), default=0)
    target = folder / str(checks.whole_number("version", version, minimum=1))
    if target.exists():
        raise ValueError(f"version {version} exists in {folder}. Versions are never replaced.")

    archive = keras.export.ExportArchive()
    archive.track(classifier)
    for name, (function, dtype) in _signatures(classifier, detector, own_bounds).items():
        images = tf.TensorSpec((None, *shape), dtype, name="images")
        archive.add_endpoint(name, function, input_signature=[images])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as staging:
        whole = pathlib.Path(staging) / "model"
        archive.write_out(whole, verbose=False)
        whole.rename(target)
    return target


def _signatures(
    classifier: keras.Model, detector: GradientNormDetector | None, bounds: Bounds
) -> Mapping[str, tuple[Callable[[Tensor], Mapping[str, Tensor]], tf.DType]]:
    """Function and type of the images, by signature."""
    shape = classifier.input_shape

    def logits(images: Tensor) -> Tensor:
        return tf.cast(classifier(bounds.native(images), training=False), tf.float32)

    def classify(images: Tensor) -> dict[str, Tensor]:
        detected = {}
        if detector is None:
            outputs = logits(images)
        else:
            score, outputs, _ = gradient_norm(logits, images, detector.norm, detector.statistic)
            suspected = tf.logical_not(score < detector.threshold)  # a lost gradient is
            detected = {"score": score, "attack_suspected": suspected}
        return {
            "logits": outputs,
            "probabilities": tf.nn.softmax(outputs),
            "class_id": tf.argmax(outputs, axis=-1),
            **detected,
        }

    def serving_default(images: Tensor) -> dict[str, Tensor]:
        return classify(_in_bounds(_of_shape(images, shape)))

    def serving_uint8(images: Tensor) -> dict[str, Tensor]:
        return classify(tf.cast(_of_shape(images, shape), tf.float32) / 255)

    def predict(images: Tensor) -> dict[str, Tensor]:
        return {"logits": logits(_in_bounds(_of_shape(images, shape)))}

    return {
        "serving_default": (serving_default, tf.float32),
        "serving_uint8": (serving_uint8, tf.uint8),
        "predict": (predict, tf.float32),
    }


def _of_shape(images: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """`images`, if there are any and of that shape.

    Servers do not check shapes. Unchecked, pooling lets images of another size through,
    and a missing axis can end the server (oneDNN's convolution aborts the process).
    """
    images = tf.ensure_shape(images, shape)
    message = "images must hold at least one image, got an empty batch."
    with tf.control_dependencies([tf.debugging.Assert(tf.shape(images)[0] > 0, [message])]):
        return tf.identity(images)


def _in_bounds(images: Tensor) -> Tensor:
    """`images`, if they lie in [0, 1] without NaN."""
    legal = tf.reduce_all((images >= 0) & (images <= 1))  # false for NaN
    message = (
        "images must lie in [0, 1] and hold no NaN. Divide 8-bit pixels by 255, or send them to "
        "the signature serving_uint8. Smallest and largest value:"
    )
    found = [message, tf.reduce_min(images), tf.reduce_max(images)]
    with tf.control_dependencies([tf.debugging.Assert(legal, found)]):
        return tf.identity(images)


def run_detector(
    run: Run, *, statistic: str = "loss", false_positive_rate: float | None = None
) -> GradientNormDetector:
    """The detector of a run or a zoo entry.

    It is the one whose figures the run's card states, if the run was evaluated with these
    weights and no rate is asked for; else it is fitted on the images that the run held
    out of its training.

    Args:
        run: The run.
        statistic: "loss" or "model".
        false_positive_rate: Share of clean images to reject; None for the card's
            detector, or 0.05.

    Raises:
        ValueError: For an illegal argument.
        tvkeras.data.DataNotFoundError: If the run's data is not on this machine.
    """
    checks.one_of("statistic", statistic, STATISTICS)
    if false_positive_rate is None and (measured := card.find(run.folder)):
        weights = hashlib.sha256(run.weights_path.read_bytes()).hexdigest()
        for report in measured.detection:
            if report.statistic == statistic and measured.model["weights_sha256"] == weights:
                return GradientNormDetector(
                    norm=report.norm, statistic=statistic, threshold=report.threshold
                )
    about, rate = run.about, 0.05 if false_positive_rate is None else false_positive_rate
    training = data.load(about["dataset"], "train", image_size=about.get("image_size"))
    _, held_out = data.held_out(training, about["validation_fraction"])
    return GradientNormDetector.fit(run.classifier(), held_out.images, rate, statistic=statistic)
