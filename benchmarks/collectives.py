"""What a step sends between devices: the compiled program's collectives, against BUILD's sum.

    KERAS_BACKEND=jax python -m benchmarks.collectives [--model=resnext34] [--batch_size=16]

Compiles the training step for two virtual devices of this machine and adds up the
results of its collective operations, which the cost model puts at four bytes a
parameter. Then times the step on one device and on two.
"""

import os
import re
import statistics
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import keras
import numpy as np
from absl import app, flags

import tvkeras
from benchmarks.xla import compiled_step
from tvkeras import backends

VARIANTS = {
    "plain": tvkeras.Undefended(),
    "TV": tvkeras.TVLipschitz(fd_step=0.1),
    "TV + Lipschitz": tvkeras.TVLipschitz(fd_step=0.1, lipschitz_weight=0.1),
}
BYTES = {"pred": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|collective-permute|all-to-all)\(")
ROUNDS = 3

_MODEL = flags.DEFINE_string("model", "resnext34", "A name of tvkeras.models.BUILDERS.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images in a batch, over both devices.")


def measured(variant: str, devices: int) -> tuple[dict[str, int], float, int]:
    """Bytes by kind of collective, seconds a step, and parameters."""
    rng = np.random.default_rng(0)
    images = rng.random((_BATCH_SIZE.value, 32, 32, 3), "float32")
    labels = rng.integers(0, 10, _BATCH_SIZE.value)
    with backends.spread(devices):
        model = tvkeras.models.build(_MODEL.value, 10, input_shape=(32, 32, 3))
        robust = tvkeras.RobustClassifier(model, VARIANTS[variant])
        robust.compile(keras.optimizers.SGD(0.01, momentum=0.9))
        batch = jax.device_put((images, labels), _over_devices(devices))
        step, state = compiled_step(robust, batch)
        sent: dict[str, int] = {}
        for shapes, kind in COLLECTIVE.findall(step.as_text()):
            sent[kind] = sent.get(kind, 0) + _bytes(shapes)
        seconds = []
        for _ in range(ROUNDS):
            start = time.monotonic()
            jax.block_until_ready(step(state, batch))
            seconds.append(time.monotonic() - start)
    return sent, statistics.median(seconds), model.count_params()


def _over_devices(devices: int) -> jax.sharding.Sharding:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("batch",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))


def _bytes(shapes: str) -> int:
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(
        BYTES[dtype] * int(np.prod([int(side) for side in sides.split(",") if side] or [1]))
        for dtype, sides in found
    )


def main(_: list[str]) -> None:
    """Print the table."""
    print(f"{_MODEL.value}, batch {_BATCH_SIZE.value} over two virtual devices, kB a step")
    print(
        f"{'':16}{'4 bytes/parameter':>20}{'all-reduce':>12}{'all-gather':>12}{'other':>8}", end=""
    )
    print(f"{'s, one device':>16}{'s, two':>10}")
    for variant in VARIANTS:
        _, alone, _ = measured(variant, 1)
        sent, together, parameters = measured(variant, 2)
        reduced, gathered = sent.pop("all-reduce", 0), sent.pop("all-gather", 0)
        sizes = (4 * parameters, reduced, gathered, sum(sent.values()))
        row = "".join(
            f"{size / 1e3:{w}.1f}" for size, w in zip(sizes, (20, 12, 12, 8), strict=True)
        )
        print(f"{variant:16}{row}{alone:16.3f}{together:10.3f}", flush=True)


if __name__ == "__main__":
    app.run(main)
