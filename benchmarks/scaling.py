"""Seconds and memory as the work grows, with the exponents that fit them.

    python -m benchmarks.scaling [--axes=images,classes,pixels,devices]

Trains for an epoch under TV + Lipschitz, and attacks by ten steps of PGD, with one thing after
another made larger: the number of images, of classes, of pixels in an image, and of devices
(virtual ones, on the same cores: they share each batch, so that the whole work stays what it
is). Each point is measured in a process of its own: the second epoch or attack, which compiles
nothing, and the peak of memory over what the process held before. An exponent is the slope of
the logarithms: 1 where the cost grows as the work does, 0 where it stays.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags

import tvkeras
from benchmarks.common import resident
from tvkeras import attacks, backends, data

AXES = {
    "images": (1024, 2048, 4096, 8192),
    "classes": (10, 30, 100, 300),
    "pixels": (32**2, 45**2, 64**2, 90**2),
    "devices": (1, 2, 4),
}
BATCH = 64

_AXES = flags.DEFINE_list("axes", list(AXES), "What grows.")
_POINT = flags.DEFINE_string("point", None, "Internal: the job and sizes of one measurement.")


def training(images: np.ndarray, labels: np.ndarray, classes: int, devices: int) -> list[float]:
    """Seconds of two epochs."""
    with backends.spread(devices):
        robust = tvkeras.RobustClassifier(
            network(images, classes),
            tvkeras.TVLipschitz(norm="l2", tv_weight=0.1, lipschitz_weight=0.1, fd_step=0.1),
        )
        robust.compile(keras.optimizers.SGD(0.01, momentum=0.9))
        examples = data.Examples(
            name="random",
            split="train",
            images=images,
            labels=labels,
            num_classes=classes,
            checksum="",
        )
        batches = data.Batches(examples, BATCH, seed=0)
        return timed(lambda: robust.fit(batches, verbose=0))


def attack(images: np.ndarray, labels: np.ndarray, classes: int, devices: int) -> list[float]:
    """Seconds of two attacks."""
    model = tvkeras.inference.CompiledClassifier(network(images, classes))
    pgd = attacks.ProjectedGradient(norm="l2", steps=10)
    return timed(lambda: pgd(model, images, labels, epsilon=0.5, batch_size=BATCH))


def network(images: np.ndarray, classes: int) -> keras.Model:
    """A small ResNet-9."""
    keras.utils.set_random_seed(0)
    return tvkeras.models.build("resnet9", classes, input_shape=images.shape[1:], width=8)


def timed(job: Callable[[], object]) -> list[float]:
    """Seconds of a job, twice."""
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        job()
        seconds.append(time.monotonic() - start)
    return seconds


JOBS = {"training": training, "attack": attack}


def measured(job: str, sizes: dict[str, int]) -> tuple[float, float]:
    """Seconds and MiB of one point, in a process of its own."""
    point = json.dumps({"job": job, **sizes})
    flag = f"--xla_force_host_platform_device_count={sizes['devices']}"
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", f"--point={point}"],
        env={**os.environ, "XLA_FLAGS": flag},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    seconds, memory = map(float, output.split()[-2:])
    return seconds, memory


def print_point(job: str, images: int, classes: int, pixels: int, devices: int) -> None:
    """Body of the process that `measured` starts."""
    if devices > 1 and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        parts = [tf.config.LogicalDeviceConfiguration()] * devices
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    rng, side = np.random.default_rng(0), round(pixels**0.5)
    before = resident("VmRSS")
    arrays = rng.random((images, side, side, 3), "float32"), rng.integers(0, classes, images)
    seconds = JOBS[job](*arrays, classes, devices)
    print(seconds[-1], resident("VmHWM") - before)


def main(_: list[str]) -> None:
    """Prints a table."""
    if _POINT.value:
        print_point(**json.loads(_POINT.value))
        return
    first = {axis: values[0] for axis, values in AXES.items()}
    print(
        f"{keras.backend.backend()}, resnet9 of width 8, batches of {BATCH}, {os.cpu_count()} cores"
    )
    print(f"{'':10}{'':10}{'seconds':>32}{'exponent':>10}{'MiB':>28}{'exponent':>10}")
    for axis in _AXES.value:
        for job in JOBS:
            if (axis, job) == ("devices", "attack"):  # attacks run on one
                continue
            points = [measured(job, {**first, axis: value}) for value in AXES[axis]]
            row = f"{axis:10}{job:10}"
            for values, width in zip(zip(*points, strict=True), (8, 7), strict=True):
                slope = np.polyfit(np.log(AXES[axis]), np.log(values), 1)[0]
                text = "".join(f"{value:{width}.{1 if width == 8 else 0}f}" for value in values)
                row += f"{text:>{4 * width}}{slope:10.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    app.run(main)
