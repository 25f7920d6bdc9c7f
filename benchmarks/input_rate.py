"""Images a second that the input pipelines deliver, with nothing behind them.

    python -m benchmarks.input_rate [--images=512] [--seconds=10]

`Batches` of CIFAR-10's shape from memory, and a `Stream` of JPEG files of ImageNet's
usual size (500 by 375 pixels), made here, decoded, cropped and resized to 224.
"""

import pathlib
import tempfile
import time

import keras
import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags
from scipy import ndimage

from tvkeras import data

_IMAGES = flags.DEFINE_integer("images", 512, "JPEG files.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "How long each pipeline is read.")


class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """JPEG files of smooth noise, which are about as large as photographs."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent  # else TFDS looks for the module __main__

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, manager: object) -> dict[str, object]:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        rng = np.random.default_rng(0)
        for index in range(_IMAGES.value):
            noise = ndimage.zoom(rng.normal(128, 60, (75, 100, 3)), (5, 5, 1), order=1)
            image = (noise + rng.normal(0, 8, noise.shape)).clip(0, 255).astype("uint8")
            yield index, {"image": image, "label": index % 10}


def rate(batches: keras.utils.PyDataset) -> float:
    """Images a second over whole epochs, after a first batch."""
    count, epoch = 0, 0
    batches.begin_epoch(0)
    batches[0]
    start = time.monotonic()
    while time.monotonic() - start < _SECONDS.value:
        epoch += 1
        batches.begin_epoch(epoch)
        for index in range(len(batches)):
            count += len(batches[index][0])
    return count / (time.monotonic() - start)


def main(_: list[str]) -> None:
    """Print the rates."""
    rng = np.random.default_rng(0)
    examples = data.Examples(
        name="random",
        split="train",
        images=rng.integers(0, 256, (50_000, 32, 32, 3), "uint8"),
        labels=rng.integers(0, 10, 50_000),
        num_classes=10,
        checksum="",
    )
    print(f"Batches, 32x32 from memory: {rate(data.Batches(examples, 128, seed=0)):8.0f} images/s")
    with tempfile.TemporaryDirectory() as folder:
        builder = Pictures(data_dir=folder)
        builder.download_and_prepare()
        size = sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*.tfrecord*"))
        stream = data.Stream(builder, "train", batch_size=64, image_size=224, seed=0)
        print(
            f"Stream, 224x224 from JPEG:  {rate(stream):8.0f} images/s "
            f"({size / _IMAGES.value / 1e3:.0f} kB each)"
        )


if __name__ == "__main__":
    app.run(main)
