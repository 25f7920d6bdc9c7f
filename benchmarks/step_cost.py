"""Cost of a training step under each defence, as a multiple of a plain one.

    python -m benchmarks.step_cost [--model=airbench] [--precision=mixed_bfloat16]
        [--torch_python=PYTHON]

Times whole optimizer steps of the same network on the same batch, in turns, so that a change of
the machine's speed meets all alike; quotes medians, of the mean step where steps differ. Peak
memory is that of the step's tensors (see `benchmarks.trace`). With a Python that has torch,
plain and penalised steps of the network's copy in PyTorch (channels last, autograd's three
passes; with and without `torch.compile`) are timed in the same turns.

The rate is that of the arithmetic alone (see `models.multiply_adds`), three forward passes'
worth for each pass, beside that of a large product of matrices in the same precision. Where
TensorFlow's time goes is said by kind of operation, of those with 2 % or more.
"""

import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags

import tvkeras
from benchmarks import trace
from benchmarks.common import described
from tvkeras import backends

PENALTY = {"norm": "l2", "tv_weight": 0.1, "lipschitz_weight": 0.1, "fd_step": 0.1}
PENALISED = tvkeras.TVLipschitz(**PENALTY)
VARIANTS = {
    "plain": {"defense": tvkeras.Undefended()},
    "plain, recomputed": {"defense": tvkeras.Undefended(), "recompute": True},
    "TV + Lipschitz": {"defense": PENALISED},
    "TV + Lipschitz, recomputed": {"defense": PENALISED, "recompute": True},
    "TV + Lipschitz, fraction 1/4": {
        "defense": tvkeras.TVLipschitz(**PENALTY, penalty_fraction=0.25)
    },
    "TV + Lipschitz, one step in 4": {"defense": tvkeras.TVLipschitz(**PENALTY, penalty_every=4)},
    "TV + Lipschitz, double backprop": {
        "defense": tvkeras.TVLipschitz(**PENALTY, method="double_backprop")
    },
    "7-step adversarial training": {"defense": tvkeras.AdversarialTraining(norm="linf", steps=7)},
}
IN_TORCH = {
    f"{name}{', compiled' if compiled else ''}, PyTorch": {
        "penalised": penalised,
        "compiled": compiled,
    }
    for compiled in (False, True)
    for name, penalised in {"plain": False, "TV + Lipschitz": True}.items()
}
PASSES = {"plain": 1, "TV + Lipschitz": 2}  # of those whose arithmetic is known
CYCLES = {"TV + Lipschitz, one step in 4": 4}  # steps after which the same comes again

_MODEL = flags.DEFINE_string("model", "resnext34", "A name of tvkeras.models.BUILDERS.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images in a batch.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each variant.")
_ARGUMENTS = flags.DEFINE_string("arguments", "{}", "For the model's builder, as JSON.")
_PRECISION = flags.DEFINE_string("precision", "float32", "A dtype policy of Keras.")
_TORCH = flags.DEFINE_string("torch_python", None, "Python with torch.")


def network() -> keras.Model:
    """The network whose steps are timed."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(_PRECISION.value)
    arguments = {"input_shape": (32, 32, 3), **json.loads(_ARGUMENTS.value)}
    return tvkeras.models.build(_MODEL.value, 10, **arguments)


def trained(variant: str) -> tuple[tvkeras.RobustClassifier, tuple[np.ndarray, np.ndarray]]:
    """The classifier that a variant trains, and the batch it is trained on."""
    rng = np.random.default_rng(0)
    images = rng.random((_BATCH_SIZE.value, 32, 32, 3), "float32")
    labels = rng.integers(0, 10, _BATCH_SIZE.value)
    robust = tvkeras.RobustClassifier(network(), seed=0, **VARIANTS[variant])
    robust.compile(keras.optimizers.SGD(0.01, momentum=0.9))
    return robust, (images, labels)


def keras_step(variant: str) -> Callable[[], object]:
    """One optimizer step of a variant."""
    robust, batch = trained(variant)
    return lambda: robust.train_on_batch(*batch)


class TorchStep:
    """One step of the copy in PyTorch, in a process of its own."""

    def __init__(self, folder: str, settings: dict[str, bool]) -> None:
        low = "bfloat16" in _PRECISION.value
        chosen = json.dumps({**settings, "bfloat16": low, "batch_size": _BATCH_SIZE.value})
        self._process = subprocess.Popen(
            [_TORCH.value, "-m", "benchmarks.torch_step", folder, chosen],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> None:
        """Asks for a step and waits until it is done."""
        print("step", file=self._process.stdin, flush=True)
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError(f"the step in PyTorch failed with {self._process.wait()}.")


def product_rate() -> float:
    """GFLOP/s of a large product of matrices, now."""
    side, dtype = 4096, keras.config.dtype_policy().compute_dtype
    one = keras.ops.ones((side, side), dtype)
    multiply = backends.compiled(lambda a, b: keras.ops.sum(keras.ops.matmul(a, b)))
    seconds = []
    for _ in range(4):
        start = time.monotonic()
        float(multiply(one, one))
        seconds.append(time.monotonic() - start)
    return 2 * side**3 / min(seconds) / 1e9


def main(_: list[str]) -> None:
    """Times every variant in turns and prints a table."""
    steps: dict[str, Callable[[], object]] = {name: keras_step(name) for name in VARIANTS}
    if _TORCH.value:
        folder = pathlib.Path(tempfile.mkdtemp())
        layers, arrays = described(network())
        (folder / "layers.json").write_text(json.dumps(layers))
        np.savez(folder / "arrays.npz", **arrays)
        steps |= {name: TorchStep(str(folder), settings) for name, settings in IN_TORCH.items()}
    else:
        print("No --torch_python: PyTorch is skipped.")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(_ROUNDS.value + 2):  # two to compile and to warm up
        for name, step in steps.items():
            cycle = CYCLES.get(name, 1)
            start = time.monotonic()
            for _ in range(cycle):
                step()
            if number >= 2:
                seconds[name].append((time.monotonic() - start) / cycle)
    print(
        f"{_MODEL.value}, batch {_BATCH_SIZE.value}, {_PRECISION.value}, "
        f"{keras.backend.backend()}, {os.cpu_count()} cores, median of {_ROUNDS.value} steps"
    )
    pass_gflop = 6 * _BATCH_SIZE.value * tvkeras.models.multiply_adds(network()) / 1e9
    print(f"{'':<34}{'x plain':>8}{'images/s':>10}{'GFLOP/s':>10}")
    for name, values in seconds.items():
        pairs = zip(values, seconds["plain"], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        speed = _BATCH_SIZE.value / statistics.median(values)
        passes = PASSES.get(name)
        rate = f"{passes * pass_gflop / statistics.median(values):10.0f}" if passes else ""
        print(f"{name:<34}{ratio:8.2f}{speed:10.1f}{rate}", flush=True)
    print(f"{'a product of matrices':<52}{product_rate():10.0f}")
    print(f"{'peak memory':<34}{'x plain':>8}{'MiB':>10}")
    memory: dict[str, float] = {}
    for name in VARIANTS:
        memory[name] = trace.peak_memory(*trained(name))
        ratio = memory[name] / memory["plain"]
        print(f"{name:<34}{ratio:8.2f}{memory[name]:10.0f}", flush=True)
    if keras.backend.backend() == "tensorflow":
        print(f"{'where the time goes':<34}{'plain':>8}{'TV + Lipschitz':>18}")
        plain, penalised = (trace.shares_of_time(*trained(name)) for name in PASSES)
        for kind, share in plain.items():
            if share >= 0.02:
                print(f"{kind:<34}{share:8.0%}{penalised.get(kind, 0):18.0%}")


if __name__ == "__main__":
    app.run(main)
