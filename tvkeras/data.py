"""Image-classification data: cached arrays, batches by index, augmentation, streams.

Images are kept as uint8 and become float32 in [0, 1] once, inside the compiled
step. Everything random is a function of (seed, epoch or step), so that a run can
be repeated or continued exactly.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from tvkeras import checks

Tensor = Any

_BUFFER = 1 << 20


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


class DataNotFoundError(FileNotFoundError):
    """The data set is not on this machine; the message says where it was looked for."""


def load(
    name: str,
    split: str = "train",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Examples:
    """Loads a split as memory-mapped arrays, from the cache after the first time.

    The first load prepares "digits" (8x8, scikit-learn, embedded) or any TFDS data
    set of equally large images ("cifar10", "cifar100", "svhn_cropped", ...), in the
    order of their ids where they have ids. Later ones need neither TFDS nor
    TensorFlow and check the sha256 of what they read.

    Args:
        name: "digits" or a TFDS name.
        split: "train", "test", or another split that TFDS has.
        cache_dir: Folder of the cache; by default `TVKERAS_DATA_DIR`, else
            `~/.cache/tvkeras/data`.
        download: Whether TFDS may download what is missing, with a progress bar.

    Raises:
        DataNotFoundError: If the data is missing and must not be downloaded.
        ValueError: For an unknown split, a data set that is not of equally large
            uint8 images, or a damaged cache.
    """
    folder = _cache(cache_dir) / name.replace("/", "-").replace(":", "-") / split
    if not (folder / "meta.json").exists():
        images, labels, num_classes = (
            _digits(split) if name == "digits" else _from_tfds(name, split, download)
        )
        _write_cache(folder, images, labels, num_classes)
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


class Batches(keras.utils.PyDataset):
    """Batches of `Examples`, each a pure function of (seed, epoch, index).

    Args:
        examples: What to draw from.
        batch_size: Images in a batch.
        seed: Shuffles each epoch in its own order; None keeps the order and the
            last, smaller batch (for evaluation), a seed drops it (for training).

    Raises:
        ValueError: If a shuffled epoch has not one whole batch.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int | None = None) -> None:
        super().__init__()
        self.examples = examples
        self.batch_size = checks.whole_number("batch_size", batch_size, minimum=1)
        self.seed = seed
        if seed is not None and len(examples) < batch_size:
            raise ValueError(
                f"batch_size must be <= {len(examples)}, the number of images of "
                f"{examples.name} {examples.split}, got batch_size={batch_size}."
            )
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Orders the images for `epoch`; `RobustClassifier.fit` calls it."""
        self._order = np.arange(len(self.examples))
        if self.seed is not None:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self._order)

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.examples), self.batch_size)
        return whole + (rest > 0 and self.seed is None)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 `(batch, height, width, channels)`, and labels `(batch,)`."""
        rows = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.examples.images[rows], self.examples.labels[rows]


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop, flip and cutout of a batch, in `keras.ops`, stateless.

    Attributes:
        crop: Pixels padded on every side before a random crop of the old size.
        fill: Value of the padding.
        flip: Whether to mirror half of the images.
        cutout: Side of the square, centred anywhere, that is replaced by its own
            mean colour; 0 for none.

    Reference: DeVries & Taylor (2017), arXiv:1708.04552, for cutout.
    """

    crop: int = 4
    fill: float = 0.5
    flip: bool = True
    cutout: int = 16

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.whole_number("crop", self.crop)
        checks.number("fill", self.fill, minimum=0.0, maximum=1.0)
        checks.whole_number("cutout", self.cutout)

    def __call__(self, images: Tensor, seed: keras.random.SeedGenerator) -> Tensor:
        """Augmented images, shape and dtype of `images`."""
        batch = ops.shape(images)[0]
        height, width, channels = images.shape[1:]

        def draw(limit: int) -> Tensor:
            return keras.random.randint((batch, 1), 0, limit, seed=seed)

        rows = draw(2 * self.crop + 1) + ops.arange(height)
        columns = ops.arange(width)
        if self.flip:
            columns = ops.where(draw(2) == 1, width - 1 - columns, columns)
        columns = columns + draw(2 * self.crop + 1)
        pad = (self.crop, self.crop)
        padded = ops.pad(images, ((0, 0), pad, pad, (0, 0)), constant_values=self.fill)
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
        return images

    def _near(self, positions: Tensor, centre: Tensor) -> Tensor:
        offset = positions - centre + self.cutout // 2
        return ops.logical_and(offset >= 0, offset < self.cutout)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras's serialisation."""
        return dataclasses.asdict(self)


def in_memory(
    name: str,
    *,
    batch_size: int,
    validation_fraction: float,
    seed: int,
    test_split: str = "test",
    download: bool = False,
) -> Splits:
    """Splits of a data set that `load` holds as arrays.

    Args:
        name: "digits" or a TFDS name.
        batch_size: Images in a batch.
        validation_fraction: Share of the training set to hold out.
        seed: Of the order of the training images.
        test_split: Split of the final measurement.
        download: Whether missing data may be downloaded.
    """
    test = load(name, test_split, download=download)
    examples, validation = held_out(load(name, "train", download=download), validation_fraction)
    return Splits(
        train=Batches(examples, batch_size, seed=seed),
        validation=Batches(validation, batch_size) if len(validation) else None,
        test=test,
        checksums={"train": examples.checksum, test_split: test.checksum},
    )


def streamed(
    name: str,
    *,
    image_size: int,
    batch_size: int,
    validation_fraction: float,
    seed: int,
    test_split: str = "validation",
    test_images: int = 1000,
    download: bool = False,
) -> Splits:
    """Splits of a prepared TFDS data set that does not fit in memory.

    Args:
        name: A TFDS name.
        image_size: Side of the square images.
        batch_size: Images in a batch.
        validation_fraction: Share of the split "train" to hold out, at its end.
        seed: Of the order and the crops of the training images.
        test_split: Split of the final measurement; ImageNet's is "validation".
        test_images: How many of its first images are measured.
        download: Whether missing data may be downloaded.
    """
    checks.number("validation_fraction", validation_fraction, minimum=0.0, maximum=0.999)
    builder = _builder(name, download)
    infos = builder.info.splits
    checks.one_of("test_split", test_split, infos)
    if builder.info.supervised_keys is None:
        raise ValueError(f"data set {name!r} has no supervised (image, label) pair.")
    count = infos["train"].num_examples
    kept = count - round(validation_fraction * count)
    measured = min(test_images, infos[test_split].num_examples)
    if kept < batch_size:
        raise ValueError(f"batch_size must be <= {kept}, got batch_size={batch_size}.")

    def stream(split: str, seed: int | None = None) -> Stream:
        return Stream(builder, split, batch_size=batch_size, image_size=image_size, seed=seed)

    test = stream(f"{test_split}[:{measured}]")
    images, labels = zip(*(test[index] for index in range(len(test))), strict=True)
    return Splits(
        train=stream(f"train[:{kept}]", seed),
        validation=stream(f"train[{kept}:]") if kept < count else None,
        test=Examples(
            name=name,
            split=test_split,
            images=np.concatenate(images),
            labels=np.concatenate(labels),
            num_classes=builder.info.features[builder.info.supervised_keys[1]].num_classes,
            checksum=builder.info.full_name,
        ),
        checksums={"streamed": builder.info.full_name},
    )


class Stream(keras.utils.PyDataset):
    """Batches of a prepared TFDS data set, read by `tf.data` in constant memory.

    Training (a `seed`) draws a random crop of 8 to 100 % of the area and a flip for
    each image, a function of (seed, epoch, index), and drops an epoch's last, smaller
    batch; evaluation crops the centre and keeps it.

    Args:
        builder: A TFDS builder whose data is prepared.
        split: A TFDS split, such as "train[:1000]".
        batch_size: Images in a batch.
        image_size: Side of the square images.
        seed: Seed of order and augmentation; None for evaluation.
        shuffle_buffer: Encoded images among which the next one is drawn.
    """

    def __init__(
        self,
        builder: Any,
        split: str,
        *,
        batch_size: int,
        image_size: int,
        seed: int | None = None,
        shuffle_buffer: int = 10_000,
    ) -> None:
        super().__init__()
        self.builder = builder
        self.split = split
        self.batch_size = checks.whole_number("batch_size", batch_size, minimum=1)
        self.image_size = checks.whole_number("image_size", image_size, minimum=1)
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Orders the images for `epoch`; `RobustClassifier.fit` calls it."""
        self._epoch, self._next, self._iterator = epoch, 0, iter(())

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(self.builder.info.splits[self.split].num_examples, self.batch_size)
        return whole + (rest > 0 and self.seed is None)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 `(batch, image_size, image_size, channels)`, and labels `(batch,)`.

        Batches are read one after the other; a jump starts the pipeline anew.
        """
        if index != self._next or index == 0:
            self._iterator = self._pipeline(index).as_numpy_iterator()
        self._next = index + 1
        return next(self._iterator)

    def _pipeline(self, first_batch: int) -> Any:
        import tensorflow as tf
        import tensorflow_datasets as tfds

        image_key, label_key = self.builder.info.supervised_keys
        image_feature = self.builder.info.features[image_key]
        encoded = {image_key: tfds.decode.SkipDecoding()}
        dataset = self.builder.as_dataset(split=self.split, shuffle_files=False, decoders=encoded)
        dataset = dataset.enumerate()

        def prepare(index: Tensor, example: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            image = image_feature.decode_example(example[image_key])
            if self.seed is None:
                side = tf.reduce_min(tf.shape(image)[:2])
                image = tf.image.resize_with_crop_or_pad(image, side, side)
            else:
                key = tf.stack([tf.constant(self.seed + (self._epoch << 32), tf.int64), index])
                begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
                    tf.shape(image),
                    tf.zeros((1, 0, 4)),
                    seed=key,
                    area_range=(0.08, 1.0),
                    use_image_if_no_bounding_boxes=True,
                )
                image = tf.slice(image, begin, size)
                image = tf.image.stateless_random_flip_left_right(image, key)
            image = tf.image.resize(image, (self.image_size, self.image_size), antialias=True)
            image = tf.cast(tf.round(tf.clip_by_value(image, 0.0, 255.0)), tf.uint8)
            return image, example[label_key]

        if self.seed is not None:
            order = int(np.random.default_rng((self.seed, self._epoch)).integers(2**31))
            dataset = dataset.shuffle(self.shuffle_buffer, order, reshuffle_each_iteration=False)
        dataset = dataset.skip(first_batch * self.batch_size)
        dataset = dataset.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return dataset.batch(self.batch_size).prefetch(tf.data.AUTOTUNE)


def _cache(cache_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    default = os.environ.get("TVKERAS_DATA_DIR", "~/.cache/tvkeras/data")
    return pathlib.Path(cache_dir or default).expanduser()


def _digits(split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """scikit-learn's 1,797 digits, a fixed random fifth of them for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    checks.one_of("split", split, ("train", "test"))
    order = np.random.default_rng(0).permutation(len(images))
    chosen = np.sort(order[:360] if split == "test" else order[360:])
    return images[chosen], bunch.target[chosen].astype(np.int64), 10


def _builder(name: str, download: bool = False) -> Any:
    """The TFDS builder of a data set that is prepared on this machine."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"dataset must be 'digits' or a name of tfds.list_builders(), got dataset={name!r}."
        ) from error
    if download:
        builder.download_and_prepare()
    if not os.path.exists(builder.data_dir):
        raise DataNotFoundError(
            f"data set {name!r} is neither cached nor prepared on this machine (looked in "
            f"{_cache(None)} and {builder.data_dir}). Either set TFDS_DATA_DIR to a "
            "folder that holds it, or allow the download: train.download=True "
            "(tvkeras.data.load(..., download=True))."
        )
    return builder


def _from_tfds(name: str, split: str, download: bool) -> tuple[np.ndarray, np.ndarray, int]:
    import tensorflow_datasets as tfds

    builder = _builder(name, download)
    checks.one_of("split", split, builder.info.splits)
    features = builder.info.features
    image, label = builder.info.supervised_keys or (None, None)
    shape = features[image].shape if image in features else None
    if shape is None or None in shape or features[image].np_dtype != np.uint8:
        raise ValueError(
            f"data set {name!r} has no equally large uint8 images to hold in memory "
            f"(its features: {list(features)}, image shape {shape}). "
            "Stream it: train.image_size=224."
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
            while block := file.read(_BUFFER):
                digest.update(block)
    return digest.hexdigest()
