"""The gate that images and labels pass before anything is computed with them. NumPy alone."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Tensor = Any

_8_BITS = 100  # bounds from 0 to this or more are not those of images in [0, 1]


WITH_BOUNDS = (
    "Give its bounds, as in tvkeras.inference.CompiledClassifier(classifier, bounds=(0, 255))"
)


class Bounds(NamedTuple):
    """Pixel values of black and white, Foolbox's word.

    A classifier is given images in its own bounds; radii, steps and distances are in
    units of [0, 1], whatever they are. uint8 pixels reach from 0 to 255 always.
    """

    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, value: Any) -> "Bounds":
        """`value`, a pair such as (0, 255).

        Raises:
            ValueError: If it is no pair of finite numbers, the smaller one first.
        """
        try:
            low, high = (float(number) for number in value)
        except (TypeError, ValueError):
            low, high = math.nan, math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"bounds must be a pair such as (0, 255), got bounds={value!r}.")
        return cls(low, high)

    def native(self, images: Tensor) -> Tensor:
        """Images in [0, 1], of any array library, in these bounds."""
        return images if self == UNIT else self.low + images * (self.high - self.low)

    def unit(self, images: Tensor) -> Tensor:
        """The inverse of `native`."""
        return images if self == UNIT else (images - self.low) / (self.high - self.low)

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


UNIT = Bounds()


def as_float(images: np.ndarray, bounds: Bounds = UNIT) -> np.ndarray:
    """float32 images in [0, 1]: uint8 pixels over 255, others from their bounds."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    images = images.astype(np.float32, copy=False)
    return images if bounds == UNIT else np.clip(bounds.unit(images), 0, 1)


def images(
    value: Any,
    *,
    bounds: Bounds = UNIT,
    shape: Sequence[int | None] | None = None,
    argument: str = "images",
    hint: str | None = None,
) -> np.ndarray:
    """`value` as an array, if it holds images: at least one, of floats in the bounds or uint8.

    Args:
        value: Anything that NumPy makes an array of: a list, a tensor of any library.
        bounds: Of pixels that are floats.
        shape: `(height, width, channels)` of the classifier's images; None for any, of
            one side or of all.
        argument: The name to put into the error.
        hint: What to do about images out of bounds; default: what helps with a classifier.

    Returns:
        uint8 or floats as they came, shape `(count, height, width, channels)`.

    Raises:
        ValueError: If it holds anything else.
    """
    array = _array(argument, value)
    check_dtype(array.dtype.name, bounds, argument)
    if array.ndim != 4 or not array.size:
        raise ValueError(
            f"{argument} must have the shape (count, height, width, channels) with at least one "
            f"image, got {array.shape}.{_axis_hint(argument, array.shape, shape)}"
        )
    sides = tuple(array.shape[1:]) if shape is None else tuple(shape)
    if any(side not in (None, found) for side, found in zip(sides, array.shape[1:], strict=True)):
        raise ValueError(
            f"{argument} must be images of the classifier's shape {sides}, got {array.shape}. "
            "Resize them, or build the classifier for their shape."
        )
    if array.dtype != np.uint8:
        _check_range(argument, array, bounds, hint or out_of_bounds_hint(bounds))
    return array


def labels(
    value: Any, count: int, num_classes: int | None = None, argument: str = "labels"
) -> np.ndarray:
    """`value` as class numbers, int64 of shape `(count,)`; a column of them is flattened.

    Args:
        value: Anything that NumPy makes an array of; floats must be whole numbers.
        count: Number of images.
        num_classes: The labels must be less; None for any.
        argument: The name to put into the error.

    Raises:
        ValueError: If it holds anything else, such as one-hot rows.
    """
    array = _array(argument, value)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (count,):
        one_hot = array.ndim == 2 and len(array) == count
        hint = f" Of one-hot rows, pass {argument}.argmax(axis=1)." if one_hot else ""
        raise ValueError(
            f"images and {argument} must be as many, with {argument} of shape (count,), got "
            f"{count} images and {argument} of shape {array.shape}.{hint}"
        )
    if array.dtype.kind not in "iuf" or not (np.isfinite(array) & (np.rint(array) == array)).all():
        raise ValueError(
            f"{argument} must be whole numbers, the classes, got {_sample(array)} of type "
            f"{array.dtype}."
        )
    low, high = array.min(), array.max()
    if low < 0 or (num_classes is not None and high >= num_classes):
        legal = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
        outputs = "" if num_classes is None else f" (the classifier has {num_classes} outputs)"
        raise ValueError(f"{argument} must lie in {legal}{outputs}, got {low:g} to {high:g}.")
    return array.astype(np.int64)


def soft_labels(value: Any, count: int, num_classes: int, argument: str = "labels") -> np.ndarray:
    """`value` as rows of class weights, shape `(count, num_classes)`.

    Raises:
        ValueError: If it has another shape, or numbers that are negative or not finite.
    """
    array = _array(argument, value)
    if array.shape != (count, num_classes):
        raise ValueError(
            f"{argument} must have the shape {(count, num_classes)}, a row for each image, as the "
            f"loss wants it, got {array.shape}. Of class numbers: keras.utils.to_categorical, or "
            "the loss SparseCategoricalCrossentropy."
        )
    if array.dtype.kind not in "iufb" or not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(
            f"{argument} must be finite and not negative, got {_sample(array)} of type "
            f"{array.dtype}."
        )
    return array


def check_dtype(name: str, bounds: Bounds = UNIT, argument: str = "images") -> None:
    """Raises ValueError unless images may have the dtype of that name."""
    if name != "uint8" and "float" not in name:
        raise ValueError(
            f"{argument} must be floats in {bounds}, or uint8 from 0 to 255, got {name}. "
            f"Of 8-bit pixels, pass {argument}.astype('uint8')."
        )


def _array(argument: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception as error:  # of whatever library the value is from
        raise ValueError(
            f"{argument} must be an array, or what NumPy can make one of, got a "
            f"{type(value).__name__}: {error}"
        ) from error
    if array.dtype.kind in "OSUMm":
        raise ValueError(
            f"{argument} must be an array of numbers, got a {type(value).__name__} of type "
            f"{array.dtype}."
        )
    # What NumPy does not know, as JAX's and TensorFlow's bfloat16.
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _axis_hint(argument: str, found: tuple[int, ...], shape: Sequence[int | None] | None) -> str:
    if len(found) != 3:
        return ""
    if shape is not None and shape[-1] == 1 and found[-1] != 1:
        return f" Greyscale images need an axis for their channel: {argument}[..., None]."
    return f" A single image is {argument}[None]."


def _check_range(argument: str, array: np.ndarray, bounds: Bounds, hint: str) -> None:
    low, high = array.min(), array.max()
    black, white = (array.dtype.type(end) for end in bounds)
    if black <= low and high <= white:  # neither is true of NaN
        if bounds.low == 0 and bounds.high >= _8_BITS and 0 < high <= 1:
            raise ValueError(
                f"{argument} must lie in the classifier's bounds {bounds}, got values from "
                f"{low:.9g} to {high:.9g}: these are images in [0, 1]. Multiply them by "
                f"{bounds.high:g}."
            )
        return
    found = "NaN" if np.isnan(low) else f"values from {low:.9g} to {high:.9g}"
    raise ValueError(f"{argument} must be finite and lie in {bounds}, got {found}. {hint}")


def out_of_bounds_hint(bounds: Bounds) -> str:
    """What to do about images that lie outside the bounds."""
    if bounds != UNIT:
        return "These are the bounds that the classifier was given; uint8 is from 0 to 255 always."
    return (
        "Divide 0-255 images by 255 (or pass them as uint8), and put any normalisation into the "
        f"classifier as a layer. If it has its rescaling inside: {WITH_BOUNDS}."
    )


def _sample(array: np.ndarray) -> str:
    return np.array2string(array.ravel()[:4], threshold=4, separator=", ")
