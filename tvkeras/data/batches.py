"""Batches of arrays by index: a function of (seed, epoch, index)."""

from typing import NamedTuple

import keras
import numpy as np

from tvkeras import checks
from tvkeras.backends import Devices
from tvkeras.data.arrays import Examples, held_out, load
from tvkeras.data.augmentation import Augmentation


class Splits(NamedTuple):
    """What a training run draws from.

    Attributes:
        train: Shuffled batches.
        validation: Batches of the held-out part, or None.
        test: For the final measurement.
        checksums: Of the training and the test split.
    """

    train: keras.utils.PyDataset
    validation: keras.utils.PyDataset | None
    test: Examples
    checksums: dict[str, str]


class Batches(keras.utils.PyDataset):
    """Batches of `Examples`, each a pure function of (seed, epoch, index).

    Args:
        examples: What to draw from.
        batch_size: Images in a batch, over all processes.
        seed: Shuffles each epoch in its own order; None keeps the order and the
            last, smaller batch (for evaluation), a seed drops it (for training).
        devices: What the batches are spread over: each process reads its own share
            of them, and evaluation drops the last few images that do not divide.
        augmentation: Says which images an epoch begins with mirrored, in training.

    Raises:
        ValueError: If a shuffled epoch has not one whole batch, or the devices cannot
            share one evenly.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int | None = None,
        devices: Devices = Devices(),  # noqa: B008 (immutable)
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        self.examples = examples
        self.batch_size = shared_batch_size(batch_size, devices)
        self.seed = seed
        self.devices = devices
        self.augmentation = augmentation
        if seed is not None and len(examples) < batch_size:
            raise ValueError(
                f"batch_size must be <= {len(examples)}, the number of images of "
                f"{examples.name} {examples.split}, got batch_size={batch_size}."
            )
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Orders the images for `epoch`, of which `first_batch` batches are done."""
        count = len(self.examples)
        self._order, self._first = np.arange(count), first_batch
        self._mirrored = np.zeros(count, bool)
        if self.seed is not None:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self._order)
            if self.augmentation is not None:
                self._mirrored = self.augmentation.mirrored(self.seed, epoch, count)

    def __len__(self) -> int:
        """Batches in an epoch, those that are done included."""
        return batch_count(len(self.examples), self.batch_size, self.seed, self.devices)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 `(batch, height, width, channels)`, and labels `(batch,)`."""
        index = (self._first + index) % len(self)  # Keras reads ahead of the epoch's end
        rows = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        share = len(rows) // self.devices.total * self.devices.total // self.devices.processes
        rows = rows[self.devices.process * share : (self.devices.process + 1) * share]
        images, mirrored = self.examples.images[rows], self._mirrored[rows]
        images[mirrored] = images[mirrored, :, ::-1]
        return images, self.examples.labels[rows]


def batch_count(count: int, batch_size: int, seed: int | None, devices: Devices) -> int:
    """Batches in an epoch of `count` images: whole ones, for evaluation the rest too."""
    whole, rest = divmod(count, batch_size)
    return whole + (seed is None and rest >= devices.total)


def shared_batch_size(batch_size: int, devices: Devices) -> int:
    """Returns `batch_size` if the devices can share it evenly, or raises ValueError."""
    checks.whole_number("batch_size", batch_size, minimum=1)
    if batch_size % devices.total:
        raise ValueError(
            f"batch_size must be a multiple of the {devices.total} devices that share a batch, "
            f"got batch_size={batch_size}."
        )
    return batch_size


def in_memory(
    name: str,
    *,
    batch_size: int,
    validation_fraction: float,
    seed: int,
    test_split: str = "test",
    download: bool = False,
    devices: Devices = Devices(),  # noqa: B008 (immutable)
    augmentation: Augmentation | None = None,
) -> Splits:
    """Splits of a data set that `load` holds as arrays.

    Args:
        name: "digits" or a TFDS name.
        batch_size: Images in a batch.
        validation_fraction: Share of the training set to hold out.
        seed: Of the order of the training images.
        test_split: Split of the final measurement.
        download: Whether missing data may be downloaded.
        devices: What the batches are spread over.
        augmentation: Says which training images an epoch begins with mirrored.
    """
    test = load(name, test_split, download=download)
    examples, validation = held_out(load(name, "train", download=download), validation_fraction)
    return Splits(
        train=Batches(examples, batch_size, seed=seed, devices=devices, augmentation=augmentation),
        validation=(
            Batches(validation, batch_size, devices=devices)
            if len(validation) >= devices.total
            else None
        ),
        test=test,
        checksums={"train": examples.checksum, test_split: test.checksum},
    )
