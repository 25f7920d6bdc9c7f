"""Classifiers by name: plain functional Keras models from [0, 1] images to logits."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras

from tvkeras import checks
from tvkeras.models.head import logits
from tvkeras.models.resnet import resnet9, resnet50
from tvkeras.models.resnext import resnext
from tvkeras.models.small import small_cnn

BUILDERS: dict[str, Callable[..., keras.Model]] = {
    "resnet50": resnet50,
    "resnet9": resnet9,
    "resnext10": functools.partial(resnext, depth=10),
    "resnext16": functools.partial(resnext, depth=16),
    "resnext34": resnext,
    "small_cnn": small_cnn,
}


def build(name: str, num_classes: int, **arguments: Any) -> keras.Model:
    """A freshly initialised classifier.

    Args:
        name: One of `BUILDERS`.
        num_classes: Number of logits.
        **arguments: Those of the builder: `input_shape`, `width`, `activation`, ...

    Raises:
        ValueError: For an unknown name or argument.
    """
    builder = BUILDERS[checks.one_of("model", name, BUILDERS)]
    for argument in arguments:
        checks.one_of(f"argument of {name}", argument, inspect.signature(builder).parameters)
    return builder(num_classes=num_classes, **arguments)


__all__ = ["BUILDERS", "build", "logits", "resnet9", "resnet50", "resnext", "small_cnn"]
