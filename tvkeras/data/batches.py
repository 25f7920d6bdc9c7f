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


class Epochs(keras.utils.PyDataset):
    """Batches that are a pure function of (seed, epoch, index).

    Args:
        count: Images in an epoch.
        batch_size: Images in a batch, over all processes.
        seed: Shuffles each epoch in its own order; None keeps the order and the
            last, smaller batch (for evaluation), a seed drops it (for training).
        devices: What the batches are spread over: each process reads its own share
            of them, and evaluation drops the last few images that do not divide.

    Raises:
        ValueError: If a shuffled epoch has not one whole batch, or the devices cannot
            share one evenly.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None, devices: Devices) -> None:
        super().__init__()
        self.count = count
        self.batch_size = checks.whole_number("batch_size", batch_size, minimum=1)
        self.seed = seed
        self.devices = devices
        if batch_size % devices.total:
            raise ValueError(
                f"batch_size must be a multiple of the {devices.total} devices that share a batch, "
                f"got batch_size={batch_size}."
            )
        if seed is not None and count < batch_size:
            raise ValueError(
                f"batch_size must be <= {count}, the number of images to train on, "
                f"got batch_size={batch_size}."
            )
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Orders the images for `epoch`, of which `first_batch` batches are done."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Batches in an epoch, those that are done included."""
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (self.seed is None and rest >= self.devices.total)

    def batch_number(self, index: int) -> int:
        """Which batch of the epoch Keras's `index` is: it reads ahead of the epoch's end."""
        return (self.first_batch + index) % len(self)


class Batches(Epochs):
    """Batches of `Examples` in memory.

    Args:
        examples: What to draw from.
        batch_size: As for `Epochs`, with `seed` and `devices`.
        seed: None to evaluate.
        devices: By default one.
        augmentation: Says which images an epoch begins with mirrored, in training.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int | None = None,
        devices: Devices = Devices(),  # noqa: B008 (immutable)
        augmentation: Augmentation | None = None,
    ) -> None:
        self.examples = examples
        self.augmentation = augmentation
        super().__init__(len(examples), batch_size, seed, devices)

    def begin_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Orders the images for `epoch`, of which `first_batch` batches are done."""
        super().begin_epoch(epoch, first_batch)
        self._order, self._mirrored = np.arange(self.count), np.zeros(self.count, bool)
        if self.seed is not None:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self._order)
            if self.augmentation is not None:
                self._mirrored = self.augmentation.mirrored(self.seed, epoch, self.count)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 `(batch, height, width, channels)`, and labels `(batch,)`."""
        first = self.batch_number(index) * self.batch_size
        rows = self._order[first : first + self.batch_size]
        share = len(rows) // self.devices.total * self.devices.total // self.devices.processes
        rows = rows[self.devices.process * share : (self.devices.process + 1) * share]
        images, mirrored = self.examples.images[rows], self._mirrored[rows]
        images[mirrored] = images[mirrored, :, ::-1]
        return images, self.examples.labels[rows]


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
    image_size: int | None = None,
) -> Splits:
    """Splits of a data set that `load` holds as arrays.

    Args:
        name: As `load` has it.
        batch_size: Images in a batch.
        validation_fraction: Share of the training set to hold out.
        seed: Of the order of the training images.
        test_split: Split of the final measurement.
        download: Whether missing data may be downloaded.
        devices: What the batches are spread over.
        augmentation: Says which training images an epoch begins with mirrored.
        image_size: Side that the images of a folder are brought to.

    Raises:
        ValueError: As `load`; or for splits of different images or classes.
    """
    training, test = (
        load(name, split, download=download, image_size=image_size)
        for split in ("train", test_split)
    )
    kinds = [(part.images.shape[1:], part.num_classes) for part in (training, test)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"train and {test_split} of {name!r} must have the same image shape and classes, got "
            f"{kinds[0]} and {kinds[1]}."
        )
    examples, validation = held_out(training, validation_fraction)
    return Splits(
        train=Batches(examples, batch_size, seed=seed, devices=devices, augmentation=augmentation),
        validation=(
            Batches(validation, batch_size, devices=devices)
            if len(validation) >= devices.total
            else None
        ),
        test=test,
        checksums={"train": training.checksum, test_split: test.checksum},
    )
