"""What does not fit in memory: batches of a prepared TFDS data set, read by `tf.data`."""

import threading
from typing import Any

import numpy as np

from tvkeras import checks
from tvkeras.backends import Devices
from tvkeras.data import arrays
from tvkeras.data.arrays import Examples
from tvkeras.data.batches import Epochs, Splits

Tensor = Any

SHUFFLED = 10_000  # encoded images among which the next one is drawn
MEASURED = 1000  # images of the final measurement, the first ones


def streamed(
    name: str,
    *,
    image_size: int,
    batch_size: int,
    validation_fraction: float,
    seed: int,
    test_split: str = "validation",
    download: bool = False,
    devices: Devices = Devices(),  # noqa: B008 (immutable)
) -> Splits:
    """Splits of a prepared TFDS data set that does not fit in memory.

    Args:
        name: A TFDS name.
        image_size: Side of the square images.
        batch_size: As for `in_memory`, with `download` and `devices`.
        validation_fraction: Share of the split "train" to hold out, at its end.
        seed: Of the order and the crops of the training images.
        test_split: Split of the final measurement; ImageNet's is "validation".
        download: As for `in_memory`.
        devices: As for `in_memory`.
    """
    checks.number("validation_fraction", validation_fraction, minimum=0.0, maximum=0.999)
    builder = arrays.prepared_builder(name, download)
    infos = builder.info.splits
    checks.one_of("test_split", test_split, infos)
    if builder.info.supervised_keys is None:
        raise ValueError(f"data set {name!r} has no supervised (image, label) pair.")
    count = infos["train"].num_examples
    kept = count - round(validation_fraction * count)
    measured = min(MEASURED, infos[test_split].num_examples)

    def stream(split: str, seed: int | None = None, devices: Devices = devices) -> Stream:
        return Stream(builder, split, batch_size, image_size, seed=seed, devices=devices)

    test = stream(f"{test_split}[:{measured}]", devices=Devices())
    images, labels = zip(*(test[index] for index in range(len(test))), strict=True)
    return Splits(
        train=stream(f"train[:{kept}]", seed),
        validation=stream(f"train[{kept}:]") if count - kept >= devices.total else None,
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


class Stream(Epochs):
    """Batches of a prepared TFDS data set, read by `tf.data` in constant memory.

    Training (a `seed`) draws a random crop of 8 to 100 % of the area and a flip for
    each image; evaluation crops the centre.

    Args:
        builder: A TFDS builder whose data is prepared.
        split: A TFDS split, such as "train[:1000]".
        batch_size: As for `Epochs`, with `seed` and `devices`.
        image_size: Side of the square images.
        seed: None to evaluate.
        devices: By default one; each process decodes its own share of a batch.
    """

    def __init__(
        self,
        builder: Any,
        split: str,
        batch_size: int,
        image_size: int,
        *,
        seed: int | None = None,
        devices: Devices = Devices(),  # noqa: B008 (immutable)
    ) -> None:
        self.builder = builder
        self.split = split
        self.image_size = checks.whole_number("image_size", image_size, minimum=1)
        self._lock = threading.Lock()  # Keras may leave an old reader running beside the new one
        super().__init__(builder.info.splits[split].num_examples, batch_size, seed, devices)

    def begin_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Orders the images for `epoch`, of which `first_batch` batches are done."""
        with self._lock:
            super().begin_epoch(epoch, first_batch)
            self._next, self._iterator = -1, iter(())

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 `(batch, image_size, image_size, channels)`, and labels `(batch,)`.

        Batches are read one after the other; a jump starts the pipeline anew.
        """
        with self._lock:
            number = self.batch_number(index)
            if number != self._next:
                self._iterator = self._pipeline(number).as_numpy_iterator()
            self._next = number + 1
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
                key = tf.stack([tf.constant(self.seed + (self.epoch << 32), tf.int64), index])
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

        def own_share(*batch: Any) -> Any:
            share = tf.shape(batch[0])[0] // self.devices.processes
            first = self.devices.process * share
            return tf.nest.map_structure(lambda rows: rows[first : first + share], batch)

        if self.seed is not None:
            order = int(np.random.default_rng((self.seed, self.epoch)).integers(2**31))
            dataset = dataset.shuffle(SHUFFLED, order, reshuffle_each_iteration=False)
        else:
            dataset = dataset.take(self.count // self.devices.total * self.devices.total)
        dataset = dataset.skip(first_batch * self.batch_size)
        dataset = dataset.batch(self.batch_size).map(own_share).unbatch()
        dataset = dataset.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return dataset.batch(self.batch_size // self.devices.processes).prefetch(tf.data.AUTOTUNE)
