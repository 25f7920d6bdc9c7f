"""What a step sends between devices, and what a second device costs or gains, under JAX.

    KERAS_BACKEND=jax python -m benchmarks.scaling [--model=resnext10 --width=12]

Compiles one optimizer step for one and for two devices (virtual ones on a CPU, which
share its cores: the ratio then shows the overhead of splitting, not a gain), counts
the bytes of every collective operation in the compiled program, and times both in
turns on the same batch.
"""

import collections
import math
import os
import re
import statistics
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import tvkeras  # isort: skip  (first: it chooses TensorFlow's kernels)
import jax
import keras
import numpy as np
from absl import app, flags

from tvkeras import backends

DEFENSES = {
    "plain": lambda: tvkeras.Undefended(),
    "TV": lambda: tvkeras.TVLipschitz(fd_step=0.1),
    "TV + Lipschitz": lambda: tvkeras.TVLipschitz(fd_step=0.1, lipschitz_weight=0.1),
}
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)
ARRAY = re.compile(r"(f64|f32|f16|bf16|s64|u64|s32|u32|s8|u8|pred)\[([\d,]*)\]")
WIDTHS = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "f16": 2, "bf16": 2}

_MODEL = flags.DEFINE_string("model", "resnext10", "A name of tvkeras.models.BUILDERS.")
_WIDTH = flags.DEFINE_integer("width", 12, "The network's width.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images in a batch, over all devices.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each variant.")


class Step:
    """One compiled optimizer step on some devices, and what it sends."""

    def __init__(self, defense: str, devices: int) -> None:
        rng = np.random.default_rng(0)
        images = rng.random((_BATCH_SIZE.value, 32, 32, 3), "float32")
        labels = rng.integers(0, 10, _BATCH_SIZE.value)
        keras.utils.set_random_seed(0)
        with backends.spread(devices):
            classifier = tvkeras.models.build(_MODEL.value, 10, width=_WIDTH.value)
            robust = tvkeras.RobustClassifier(classifier, DEFENSES[defense]())
            robust.compile(keras.optimizers.SGD(0.01, momentum=0.9))
            robust.optimizer.build(robust.trainable_variables)
            self.parameters = classifier.count_params()
            distribution = keras.distribution.distribution()
            if distribution:
                images, labels = (
                    jax.device_put(array, distribution.get_data_layout(array.shape).backend_layout)
                    for array in (images, labels)
                )
            groups = (
                robust.trainable_variables,
                robust.non_trainable_variables,
                robust.optimizer.variables,
                robust.metrics_variables,
            )
            self._state = tuple([variable.value for variable in group] for group in groups)
            self._data = (images, labels)
            step = jax.jit(lambda state, data: robust.train_step(state, data))
            self._compiled = step.lower(self._state, self._data).compile()

    def __call__(self) -> Any:
        """Runs the step and waits for it."""
        return jax.block_until_ready(self._compiled(self._state, self._data))

    def sent(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of the collective operations, by kind."""
        counts: dict[str, list[int]] = collections.defaultdict(list)
        for shapes, kind in COLLECTIVE.findall(self._compiled.as_text()):
            size = sum(
                WIDTHS.get(dtype, 1) * math.prod(map(int, filter(None, shape.split(","))))
                for dtype, shape in ARRAY.findall(shapes)
            )
            counts[kind].append(size)
        return {kind: (len(sizes), sum(sizes)) for kind, sizes in counts.items()}


def main(_: list[str]) -> None:
    """Counts, times, prints."""
    steps = {(name, devices): Step(name, devices) for name in DEFENSES for devices in (1, 2)}
    parameters = steps["plain", 1].parameters
    print(f"{_MODEL.value} width {_WIDTH.value}: {parameters} parameters, {4 * parameters} bytes")
    print(f"{'two devices':<16}{'collective':>20}{'number':>8}{'bytes':>12}")
    for name in DEFENSES:
        for kind, (number, size) in sorted(steps[name, 2].sent().items()):
            print(f"{name:<16}{kind:>20}{number:8d}{size:12d}")
    seconds = collections.defaultdict(list)
    for _ in range(_ROUNDS.value + 1):
        for key, step in steps.items():
            start = time.monotonic()
            step()
            seconds[key].append(time.monotonic() - start)
    print(f"{'':<16}{'two devices / one':>20}")
    for name in DEFENSES:
        pairs = zip(seconds[name, 2][1:], seconds[name, 1][1:], strict=True)
        print(f"{name:<16}{statistics.median(two / one for two, one in pairs):20.2f}")


if __name__ == "__main__":
    app.run(main)
