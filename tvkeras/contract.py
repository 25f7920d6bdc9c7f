"""The gate for classifiers: built, from images of floats to the logits of two classes or more."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tvkeras.inputs import UNIT, WITH_BOUNDS, Bounds

Tensor = Any

# A layer that divides by this or more is made for 8-bit pixels.
_RESCALED = 100


class Wrapper:
    """A model around a classifier of images in known bounds.

    Attributes:
        classifier: The plain Keras model.
        bounds: Of its images.
    """

    classifier: keras.Model
    bounds: Bounds


def unwrapped(classifier: Any, bounds: Any = None) -> tuple[keras.Model, Bounds]:
    """A classifier that passes `check`, out of its `Wrapper`, and the bounds of its images.

    Args:
        classifier: A `keras.Model` or a `Wrapper`.
        bounds: Of its images; by default the wrapper's, or [0, 1].

    Raises:
        ValueError: As `check`; or for bounds that are not the wrapper's.
    """
    given = None if bounds is None else Bounds.of(bounds)
    if isinstance(classifier, Wrapper):
        if given not in (None, classifier.bounds):
            raise ValueError(
                f"bounds must be those of {type(classifier).__name__}, {classifier.bounds}, got "
                f"bounds={bounds!r}. Leave them out."
            )
        return classifier.classifier, classifier.bounds
    check(classifier, given or UNIT)
    return classifier, given or UNIT


def check(classifier: Any, bounds: Bounds = UNIT) -> None:
    """Checks what can be seen of a classifier before it is called.

    Raises:
        ValueError: If it is no built `keras.Model`, takes integers (which have no
            gradient), is made for images in other bounds, or ends in a softmax or sigmoid.
    """
    if not isinstance(classifier, keras.Model) or not classifier.built:
        raise ValueError(
            f"classifier must be a built keras.Model, got classifier={classifier!r}. "
            "Give it an Input layer, or call it once on a batch."
        )
    for tensor in _inputs(classifier):
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if "float" not in dtype:
            raise ValueError(
                f"classifier must take images of floats, got an Input of {dtype}, through which no "
                'gradient flows. Give it Input(shape, dtype="float32"); for images from 0 to 255, '
                "with bounds=(0, 255)."
            )
    if bounds == UNIT and (layer := _rescaling(classifier)) is not None:
        raise ValueError(
            f"classifier must take images in [0, 1], but its first layer {layer.name!r} is made "
            f"for 8-bit pixels. {WITH_BOUNDS}, with images in them or uint8; or drop that layer."
        )
    name, kind = last_activation(classifier)
    if kind in ("softmax", "sigmoid"):
        raise ValueError(_PROBABILITIES.format(f"its last layer {name!r} is a {kind}", _WAYS[kind]))


def check_logits(logits: np.ndarray) -> None:
    """Checks what a classifier says of some images.

    Args:
        logits: Shape `(count, num_classes)`.

    Raises:
        ValueError: If they are of fewer than two classes, or not finite.
    """
    _check_output_shape(logits.shape)
    if not np.isfinite(logits).all():
        raise ValueError(
            "classifier must return finite logits, got "
            f"{np.mean(~np.isfinite(logits)):.0%} that are not. Find the layer that overflows."
        )


def are_probabilities(outputs: np.ndarray) -> bool:
    """Whether all rows are non-negative and sum to 1, as far as float16 can tell."""
    outputs = np.asarray(outputs, np.float64)
    sums = outputs.sum(axis=-1)
    return bool(outputs.min() >= 0 and np.allclose(sums, 1, atol=1e-2))


def probabilities_error() -> ValueError:
    """What to raise where `are_probabilities`."""
    reason = "the classifier's outputs are probabilities"
    return ValueError(_PROBABILITIES.format(reason, _WAYS["softmax"]))


def image_shape(classifier: keras.Model) -> tuple[int | None, ...] | None:
    """`(height, width, channels)` of its images, None for any; None if it has no fixed one."""
    shape = getattr(classifier, "input_shape", None)
    return tuple(shape[1:]) if isinstance(shape, tuple) and len(shape) == 4 else None


def num_classes(classifier: keras.Model, shape: tuple[int, ...]) -> int:
    """Number of logits, for images of a shape.

    Raises:
        ValueError: If there are fewer than two, or it does not map to `(batch, logits)`.
    """
    try:
        outputs = classifier.compute_output_shape((None, *shape))
    except NotImplementedError:  # a subclass that does not say
        outputs = tuple(classifier(np.zeros((1, *shape), "float32"), training=False).shape)
    _check_output_shape(outputs)
    return int(outputs[1])


def last_activation(classifier: keras.Model) -> tuple[str, str]:
    """Name of the last operation, in nested models too, and of its activation; "" for none."""
    operation = last_operation(classifier)
    if isinstance(operation, keras.Model):
        return last_activation(operation)
    activation = getattr(getattr(operation, "activation", None), "__name__", "")
    kind = type(operation).__name__.lower()  # the layer Softmax, or the operation
    return operation.name, kind if kind in ("softmax", "sigmoid") else activation


def last_operation(classifier: keras.Model) -> Any:
    """The layer or operation that makes the outputs."""
    try:
        return classifier.outputs[0]._keras_history.operation
    except (AttributeError, IndexError, TypeError):  # no functional model: the last that it has
        return classifier.layers[-1] if classifier.layers else classifier


def _check_output_shape(shape: Any) -> None:
    if not isinstance(shape, tuple) or len(shape) != 2 or (shape[1] or 0) < 2:
        raise ValueError(
            "classifier must return logits of shape (batch, num_classes) with two classes or "
            f"more, got {shape}. Of one sigmoid's output z, return [0, z]."
        )


def _inputs(classifier: keras.Model) -> list[Any]:
    try:
        return keras.tree.flatten(classifier.inputs or [])
    except AttributeError:  # a subclass that Keras knows no graph of
        return []


def _first_layers(classifier: keras.Model) -> Iterator[Any]:
    """The first layer; of a nested model, its first one too."""
    for layer in classifier.layers:
        if not isinstance(layer, keras.layers.InputLayer):
            yield layer
            if isinstance(layer, keras.Model):
                yield from _first_layers(layer)
            return


def _rescaling(classifier: keras.Model) -> Any:
    """The first layer, if it brings 8-bit pixels to the size of 1."""
    for layer in _first_layers(classifier):
        if isinstance(layer, keras.layers.Rescaling):
            if 0 < np.max(np.abs(layer.scale)) <= 1 / _RESCALED:
                return layer
        if isinstance(layer, keras.layers.Normalization) and not layer.invert:
            if layer.built and np.max(keras.ops.convert_to_numpy(layer.mean)) > 1:
                return layer
    return None


_PROBABILITIES = "classifier must return logits, but {}. {}"
_WAYS = {
    "softmax": "Drop the final softmax (activation=None), which the loss applies: "
    "tvkeras.logits(classifier) is the same classifier without it.",
    "sigmoid": "Drop the final sigmoid (activation=None).",
}
