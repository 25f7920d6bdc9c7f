"""Classifiers by name: plain functional Keras models from [0, 1] images to logits."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import keras

from tvkeras import checks
from tvkeras.models.airbench import WHITENING, airbench, whiten
from tvkeras.models.head import logits
from tvkeras.models.resnet import resnet9, resnet50
from tvkeras.models.resnext import resnext
from tvkeras.models.small import small_cnn

BUILDERS: dict[str, Callable[..., keras.Model]] = {
    "airbench": airbench,
    "resnet50": resnet50,
    "resnet9": resnet9,
    "resnext10": functools.partial(resnext, depth=10),
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


def multiply_adds(classifier: keras.Model) -> int:
    """Multiplications, each with an addition, of a forward pass over one image.

    Those of the convolutions and dense layers; a forward-backward pass takes three times
    as many.
    """
    total = 0
    for layer in classifier.layers:
        if hasattr(layer, "layers"):
            total += multiply_adds(layer)
        elif isinstance(layer, keras.layers.Dense | keras.layers.Conv2D):
            positions = layer.output.shape[1:-1]
            total += math.prod(layer.kernel.shape) * math.prod(positions)
    return total


__all__ = [
    "BUILDERS",
    "WHITENING",
    "airbench",
    "build",
    "logits",
    "multiply_adds",
    "resnet9",
    "resnet50",
    "resnext",
    "small_cnn",
    "whiten",
]
