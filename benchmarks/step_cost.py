"""Cost of a training step under each defence, as a multiple of a plain one.

    python -m benchmarks.step_cost [--reference_dir=CHECKOUT]

Times whole optimizer steps of the same network on the same batch, in turns, so
that a change of the machine's speed meets all alike; quotes medians. Peak memory is
that of a process of its own for each variant, over what it held before its first
step. With torch installed and a checkout of the paper's public code (its folder
with `cifar10/`), its plain and penalised steps are timed in the same turns (its
penalty is the squared total variation, without a Lipschitz term).
"""

import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags

import tvkeras
from benchmarks.common import resident

PENALTY = {"norm": "l2", "tv_weight": 0.1, "lipschitz_weight": 0.1, "fd_step": 1e-2}
VARIANTS = {
    "plain": lambda: tvkeras.Undefended(),
    "TV + Lipschitz": lambda: tvkeras.TVLipschitz(**PENALTY),
    "TV + Lipschitz, fraction 1/4": lambda: tvkeras.TVLipschitz(**PENALTY, penalty_fraction=0.25),
    "TV + Lipschitz, double backprop": lambda: tvkeras.TVLipschitz(
        **PENALTY, method="double_backprop"
    ),
    "7-step adversarial training": lambda: tvkeras.AdversarialTraining(norm="linf", steps=7),
}
REFERENCE = {"plain": False, "squared TV": True}

_MODEL = flags.DEFINE_string("model", "resnext34", "A name of tvkeras.models.BUILDERS.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images in a batch.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each variant.")
_REFERENCE_DIR = flags.DEFINE_string("reference_dir", None, "Checkout of the paper's code.")
_REFERENCE_PYTHON = flags.DEFINE_string("reference_python", sys.executable, "Python with torch.")
_MEMORY_OF = flags.DEFINE_string("memory_of", None, "Internal: measure one variant's memory.")


def keras_step(variant: str) -> Callable[[], object]:
    """One optimizer step of a variant, compiled and warm."""
    rng = np.random.default_rng(0)
    images = rng.random((_BATCH_SIZE.value, 32, 32, 3), "float32")
    labels = rng.integers(0, 10, _BATCH_SIZE.value)
    keras.utils.set_random_seed(0)
    robust = tvkeras.RobustClassifier(
        tvkeras.models.build(_MODEL.value, 10), VARIANTS[variant](), seed=0
    )
    robust.compile(keras.optimizers.SGD(0.01, momentum=0.9))
    return lambda: robust.train_on_batch(images, labels)


class ReferenceStep:
    """One step of the paper's public PyTorch code, in a process of its own."""

    def __init__(self, penalised: bool) -> None:
        script = pathlib.Path(__file__).with_name("reference_step.py")
        settings = [_REFERENCE_DIR.value, str(_BATCH_SIZE.value), str(int(penalised))]
        self._process = subprocess.Popen(
            [_REFERENCE_PYTHON.value, script, *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> None:
        """Asks for a step and waits until it is done."""
        print("step", file=self._process.stdin, flush=True)
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError(f"the reference failed with {self._process.wait()}.")


def peak_memory(variant: str) -> float:
    """MiB that three steps of a variant add to a fresh process at the most."""
    command = [sys.executable, "-m", "benchmarks.step_cost", f"--memory_of={variant}"]
    settings = [f"--model={_MODEL.value}", f"--batch_size={_BATCH_SIZE.value}"]
    output = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
    return float(output.stdout.split()[-1])


def print_own_memory(variant: str) -> None:
    """Body of the process that `peak_memory` starts."""
    step = keras_step(variant)
    before = resident("VmRSS")
    for _ in range(3):
        step()
    print(resident("VmHWM") - before)


def main(_: list[str]) -> None:
    """Times every variant in turns and prints a table."""
    if _MEMORY_OF.value:
        print_own_memory(_MEMORY_OF.value)
        return
    steps: dict[str, Callable[[], object]] = {name: keras_step(name) for name in VARIANTS}
    if _REFERENCE_DIR.value:
        names = {f"{name}, PyTorch reference": penalised for name, penalised in REFERENCE.items()}
        steps |= {name: ReferenceStep(penalised) for name, penalised in names.items()}
    else:
        print("No --reference_dir: the PyTorch reference is skipped.")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(_ROUNDS.value + 2):  # two to compile and to warm up
        for name, step in steps.items():
            start = time.monotonic()
            step()
            if number >= 2:
                seconds[name].append(time.monotonic() - start)
    print(
        f"{_MODEL.value}, batch {_BATCH_SIZE.value}, {keras.backend.backend()}, "
        f"{os.cpu_count()} cores, median of {_ROUNDS.value} steps"
    )
    print(f"{'':<34}{'x plain':>8}{'images/s':>10}")
    for name, values in seconds.items():
        pairs = zip(values, seconds["plain"], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        speed = _BATCH_SIZE.value / statistics.median(values)
        print(f"{name:<34}{ratio:8.2f}{speed:10.1f}", flush=True)
    print(f"{'peak memory':<34}{'x plain':>8}{'MiB':>10}")
    memory: dict[str, float] = {}
    for name in VARIANTS:
        memory[name] = peak_memory(name)
        ratio = memory[name] / memory["plain"]
        print(f"{name:<34}{ratio:8.2f}{memory[name]:10.0f}", flush=True)


if __name__ == "__main__":
    app.run(main)
