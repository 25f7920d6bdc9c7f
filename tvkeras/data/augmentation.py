"""Random crop, flip, cutout and noise, inside the compiled training step."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from tvkeras import checks

Tensor = Any


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop, flip, cutout and noise of a batch, in `keras.ops`, stateless.

    Attributes:
        crop: Pixels padded on every side before a random crop of the old size.
        fill: Value of the padding, or "reflect" for the image mirrored at its border.
        flip: Whether to mirror half of the images. "alternating" mirrors an image in
            every other epoch, which half of them begin with: in two epochs the network
            sees each image both ways. Only the data knows image and epoch, and does it
            (`tvkeras.data.Batches`).
        cutout: Side of the square, centred anywhere, that is replaced by its own
            mean colour; 0 for none.
        noise: Standard deviation of Gaussian noise, in units of [0, 1], added last and not
            clipped, for `tvkeras.bounds.Smoothed`; 0 for none. A defence's passes all see
            the same draw.

    Reference: DeVries & Taylor (2017), arXiv:1708.04552, for cutout; Jordan (2024),
    arXiv:2404.00498, for the alternating flip; Cohen et al. (2019), arXiv:1902.02918, for
    the noise.
    """

    crop: int = 4
    fill: float | str = 0.5
    flip: bool | str = True
    cutout: int = 16
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.whole_number("crop", self.crop)
        if self.fill != "reflect":
            checks.number("fill", self.fill, minimum=0.0, maximum=1.0)
        if not isinstance(self.flip, bool):
            checks.one_of("flip", self.flip, ("alternating",))
        checks.whole_number("cutout", self.cutout)
        checks.number("noise", self.noise, minimum=0.0, maximum=10.0)

    def __call__(self, images: Tensor, seed: keras.random.SeedGenerator) -> Tensor:
        """Augmented images, shape and dtype of `images`."""
        batch = ops.shape(images)[0]
        height, width, channels = images.shape[1:]

        def draw(limit: int) -> Tensor:
            return keras.random.randint((batch, 1), 0, limit, seed=seed)

        rows = draw(2 * self.crop + 1) + ops.arange(height)
        columns = ops.arange(width)
        if self.flip is True:
            columns = ops.where(draw(2) == 1, width - 1 - columns, columns)
        columns = columns + draw(2 * self.crop + 1)
        pad = ((0, 0), (self.crop, self.crop), (self.crop, self.crop), (0, 0))
        if self.fill == "reflect":
            padded = ops.pad(images, pad, mode="reflect")
        else:
            padded = ops.pad(images, pad, constant_values=self.fill)
        padded_height, padded_width = height + 2 * self.crop, width + 2 * self.crop
        first = ops.arange(batch)[:, None, None] * (padded_height * padded_width)
        pixels = first + rows[:, :, None] * padded_width + columns[:, None, :]
        images = ops.take(ops.reshape(padded, (-1, channels)), pixels, axis=0)
        if self.cutout:
            inside_rows = self._near(ops.arange(height), draw(height))
            inside_columns = self._near(ops.arange(width), draw(width))
            square = ops.logical_and(inside_rows[:, :, None], inside_columns[:, None, :])[..., None]
            mask = ops.cast(square, images.dtype)
            total = ops.sum(images * mask, axis=(1, 2), keepdims=True)
            mean = total / ops.sum(mask, axis=(1, 2), keepdims=True)
            images = ops.where(square, mean, images)
        if self.noise:
            draws = keras.random.normal(ops.shape(images), dtype=images.dtype, seed=seed)
            images = images + self.noise * draws
        return images

    def mirrored(self, seed: int, epoch: int, count: int) -> np.ndarray:
        """Which of a data set's `count` images are mirrored before an epoch, as booleans."""
        if self.flip != "alternating":
            return np.zeros(count, bool)
        return (np.random.default_rng((seed, count)).integers(2, size=count) + epoch) % 2 == 1

    def _near(self, positions: Tensor, centre: Tensor) -> Tensor:
        offset = positions - centre + self.cutout // 2
        return ops.logical_and(offset >= 0, offset < self.cutout)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras's serialisation."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Augmentation":
        """The inverse of `get_config`."""
        return cls(**config)
