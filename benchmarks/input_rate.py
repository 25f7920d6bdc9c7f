"""Images a second that the input pipelines deliver alone, and their memory.

    python -m benchmarks.input_rate [--images=2000 --side=320]

Streams a synthetic TFDS data set of JPEG photographs' size, prepared in a temporary
folder, as `gin/imagenet_tv.gin` does (decode, random crop to 224, flip), and draws
batches of arrays of CIFAR-10's shape. No network takes part.
"""

import os
import pathlib
import tempfile
import time

import keras
import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags

from tvkeras import data

_IMAGES = flags.DEFINE_integer("images", 2000, "Images in the synthetic data set.")
_SIDE = flags.DEFINE_integer("side", 320, "Their side.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images in a batch.")


class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Smooth random images with some noise, which compress about as photographs do."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, manager: object) -> dict[str, object]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> object:
        rng = np.random.default_rng(0)
        for index in range(_IMAGES.value):
            coarse = rng.integers(0, 256, (_SIDE.value // 16, _SIDE.value // 16, 3))
            image = np.kron(coarse, np.ones((16, 16, 1))) + rng.normal(
                0, 8, (_SIDE.value,) * 2 + (1,)
            )
            yield index, {"image": image.clip(0, 255).astype(np.uint8), "label": index % 10}


def rate(batches: keras.utils.PyDataset, epochs: int) -> float:
    """Images a second over some epochs, the first batch of each left out."""
    seconds, count = 0.0, 0
    for epoch in range(epochs):
        batches.begin_epoch(epoch)
        _ = batches[0]
        start = time.monotonic()
        count += sum(len(batches[index][1]) for index in range(1, len(batches)))
        seconds += time.monotonic() - start
    return count / seconds


def resident_mib() -> float:
    """MiB that this process holds, on Linux."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def main(_: list[str]) -> None:
    """Prepares, reads, prints."""
    rng = np.random.default_rng(0)
    arrays = data.Examples(
        name="arrays",
        split="train",
        images=rng.integers(0, 256, (20_000, 32, 32, 3), np.uint8),
        labels=rng.integers(0, 10, 20_000),
        num_classes=10,
        checksum="",
    )
    print(f"{os.cpu_count()} cores, batch {_BATCH_SIZE.value}")
    speed = rate(data.Batches(arrays, _BATCH_SIZE.value, seed=0), epochs=3)
    print(f"arrays, 32x32: {speed:.0f} images/s")
    with tempfile.TemporaryDirectory() as folder:
        Photographs(data_dir=folder).download_and_prepare()
        builder = Photographs(data_dir=folder)
        size = builder.info.dataset_size / _IMAGES.value
        stream = data.Stream(builder, "train", batch_size=_BATCH_SIZE.value, image_size=224, seed=0)
        first = rate(stream, epochs=1)
        memory = resident_mib()
        later = rate(stream, epochs=3)
        print(
            f"stream, {_SIDE.value}x{_SIDE.value} JPEG of {size / 1e3:.0f} kB to 224x224: "
            f"{first:.0f} images/s in the first epoch, {later:.0f} in three more, which added "
            f"{resident_mib() - memory:.0f} MiB of memory"
        )


if __name__ == "__main__":
    app.run(main)
