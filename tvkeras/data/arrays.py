"""Labelled images as memory-mapped arrays, in a checksummed cache."""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from tvkeras import checks
from tvkeras.data import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled images of one split.

    Attributes:
        name: Name of the data set.
        split: "train", "test" or a part of one, for messages.
        images: uint8, shape `(count, height, width, channels)`.
        labels: int64, shape `(count,)`.
        num_classes: Number of classes.
        checksum: sha256 of images and labels of the whole split.
    """

    name: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    checksum: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def take(self, indices: np.ndarray, split: str) -> "Examples":
        """The images at `indices`, copied into memory, as a part named `split`."""
        images, labels = self.images[indices], self.labels[indices]
        return dataclasses.replace(self, images=images, labels=labels, split=split)


class DataNotFoundError(FileNotFoundError):
    """The data set is not on this machine; the message says where it was looked for."""


def load(
    name: str, split: str = "train", *, download: bool = False, image_size: int | None = None
) -> Examples:
    """Loads a split as memory-mapped arrays, from the cache after the first time.

    The first load prepares "digits" (8x8, scikit-learn, embedded) or any TFDS data
    set of equally large images ("cifar10", "cifar100", "svhn_cropped", ...), in the
    order of their ids where they have ids. Later ones need neither TFDS nor
    TensorFlow and check the sha256 of what they read. The cache is
    `TVKERAS_DATA_DIR`, by default `~/.cache/tvkeras/data`.

    Args:
        name: "digits", a TFDS name, or one's own files: an `.npz`, or a folder of class
            folders for each split (`tvkeras.data.files`), which are read anew each time.
        split: "train", "test", or another split that is there.
        download: Whether TFDS may download what is missing, with a progress bar.
        image_size: Side that the images of a folder are brought to.

    Raises:
        DataNotFoundError: If the data is missing and must not be downloaded.
        FileNotFoundError: If there is no such file, folder or split of one's own.
        ValueError: For an unknown split, a data set that is not of equally large
            uint8 images, or a damaged cache.
    """
    if files.is_path(name):
        images, labels, num_classes = files.read(name, split, image_size)
        return Examples(
            name=name,
            split=split,
            images=images,
            labels=labels,
            num_classes=num_classes,
            checksum=hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
        )
    folder = _cache() / name.replace("/", "-").replace(":", "-") / split
    if not (folder / "meta.json").exists():
        _write_cache(folder, *_read(name, split, download))
    meta = json.loads((folder / "meta.json").read_text())
    checksum = _checksum(folder)
    if checksum != meta["sha256"]:
        raise ValueError(
            f"the cached data in {folder} is damaged: its sha256 is {checksum}, "
            f"expected {meta['sha256']}. Remove that folder; the next load prepares it anew."
        )
    return Examples(
        name=name,
        split=split,
        images=np.load(folder / "images.npy", mmap_mode="r"),
        labels=np.load(folder / "labels.npy"),
        num_classes=meta["num_classes"],
        checksum=checksum,
    )


def held_out(examples: Examples, fraction: float, seed: int = 0) -> tuple[Examples, Examples]:
    """Splits off a random part for model selection.

    Args:
        examples: A training split.
        fraction: Share to hold out, in [0, 1).
        seed: The same seed holds out the same images, whatever else changes.

    Returns:
        The images to train on, and the held-out ones.
    """
    checks.number("fraction", fraction, minimum=0.0, maximum=0.999)
    order = np.random.default_rng((seed, len(examples))).permutation(len(examples))
    count = round(fraction * len(examples))
    validation, train = np.sort(order[:count]), np.sort(order[count:])
    return examples.take(train, "train"), examples.take(validation, "validation")


def _cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("TVKERAS_DATA_DIR", "~/.cache/tvkeras/data")).expanduser()


def _read(name: str, split: str, download: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Images, labels and the number of classes, from where a data set of that name is."""
    return _digits(split) if name == "digits" else _from_tfds(name, split, download)


def _digits(split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """scikit-learn's 1,797 digits, a fixed random fifth of them for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    checks.one_of("split", split, ("train", "test"))
    order = np.random.default_rng(0).permutation(len(images))
    chosen = np.sort(order[:360] if split == "test" else order[360:])
    return images[chosen], bunch.target[chosen].astype(np.int64), 10


def prepared_builder(name: str, download: bool = False) -> Any:
    """The TFDS builder of a data set that is prepared on this machine."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"dataset must be 'digits' or a name of tfds.list_builders(), got dataset={name!r}."
        ) from error
    if download:
        builder.download_and_prepare()
    if not os.path.exists(builder.data_dir):
        raise DataNotFoundError(
            f"data set {name!r} is neither cached nor prepared on this machine (looked in "
            f"{_cache()} and {builder.data_dir}). Either set TFDS_DATA_DIR to a "
            "folder that holds it, or allow the download: Task.download=True "
            "(tvkeras.data.load(..., download=True))."
        )
    return builder


def _from_tfds(name: str, split: str, download: bool) -> tuple[np.ndarray, np.ndarray, int]:
    import tensorflow_datasets as tfds

    builder = prepared_builder(name, download)
    checks.one_of("split", split, builder.info.splits)
    features = builder.info.features
    image, label = builder.info.supervised_keys or (None, None)
    shape = features[image].shape if image in features else None
    if shape is None or None in shape or features[image].np_dtype != np.uint8:
        raise ValueError(
            f"data set {name!r} has no equally large uint8 images to hold in memory "
            f"(its features: {list(features)}, image shape {shape}). "
            "Stream it: Task.image_size=224."
        )
    records = list(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))
    if "id" in features:
        records.sort(key=lambda record: record["id"])
    images = np.stack([record[image] for record in records])
    labels = np.array([record[label] for record in records], np.int64)
    return images, labels, features[label].num_classes


def _write_cache(
    folder: pathlib.Path, images: np.ndarray, labels: np.ndarray, num_classes: int
) -> None:
    """Writes into a temporary folder and renames it, so that no reader sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = pathlib.Path(temporary) / folder.name
        work.mkdir()
        np.save(work / "images.npy", images)
        np.save(work / "labels.npy", labels)
        meta = {"num_classes": num_classes, "sha256": _checksum(work)}
        (work / "meta.json").write_text(json.dumps(meta))
        try:
            work.rename(folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process was faster
                raise


def _checksum(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for name in ("images.npy", "labels.npy"):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
