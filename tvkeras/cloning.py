"""Clones of a classifier that compute the same function by other layers."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
from keras import ops

Layer: TypeAlias = keras.layers.Layer
Tensor = Any

TOLERANCE = 1e-5  # of the largest logit, in float32: networks up to ResNet-152 show 3e-6


class CloningError(Exception):
    """A classifier has no clone: it is no graph of layers, or one hides its configuration."""


def clone(classifier: keras.Model, replaced: Callable[[Layer], Layer]) -> keras.Model:
    """A Functional or Sequential model of other layers, nested models included.

    Raises:
        CloningError: If there is none.
    """
    if not is_graph(classifier):
        raise CloningError
    try:
        return keras.models.clone_model(classifier, clone_function=replaced, recursive=True)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise CloningError from error


def is_graph(model: Any) -> bool:
    """Whether a model is Functional or Sequential, as Keras's own cloning asks."""
    return isinstance(model, keras.Sequential) or hasattr(model, "operations")


def flatten(model: keras.Model) -> list[Layer]:
    """All layers, those of nested models too."""
    nested = [flatten(layer) for layer in model.layers if is_graph(layer)]
    return [*model.layers, *(layer for layers in nested for layer in layers)]


def graphs(model: keras.Model) -> list[keras.Model]:
    """A model, and those nested in it, that are graphs of layers."""
    return [layer for layer in (model, *flatten(model)) if is_graph(layer)]


def probe(classifier: keras.Model) -> Tensor:
    """Two random images of a classifier's shape; sides that it leaves open are 64."""
    sides = (side or 64 for side in classifier.input_shape[1:])
    return keras.random.uniform((2, *sides), seed=0)


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two functions that gave these logits are the same."""
    one, other = (ops.cast(logits, "float32") for logits in (one, other))
    difference = ops.max(ops.abs(one - other))
    return bool(difference <= TOLERANCE * ops.max(ops.abs(other)))
