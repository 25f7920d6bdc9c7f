"""Robust accuracy and speed of our AutoAttack and of the published PyTorch code.

    python -m benchmarks.autoattack_reference --reference_dir=CHECKOUT [--reference_python=PYTHON]
        [--attacked=zoo/airbench_undefended] [--alone]

Copies the weights of a network into PyTorch and runs both suites on the same test
images, in turns: our first run compiles, the others do not. The networks are a narrow
`small_cnn` trained on digits without and with TV + Lipschitz (kept in `--folder`), or
that of `--attacked`. An image that is broken meets no further member, or with `--alone`
every member meets all images. `taskset -c 0` in front gives each side one thread. CHECKOUT
is one of github.com/fra31/auto-attack; without it or without torch the comparison is skipped.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import keras
import numpy as np
from absl import app, flags

import tvkeras
import tvkeras.data
from benchmarks.common import Clock, described
from tvkeras import attacks, config, runs
from tvkeras.inference import CompiledClassifier
from tvkeras.training.loop import train

MODEL = {"activation": "gelu", "width": 8}
EXPERIMENTS = {
    "gin/digits_undefended.gin": {"l2": 0.4, "linf": 0.08},
    "gin/digits_tv_lip.gin": {"l2": 0.7, "linf": 0.15},
}
RADII = {"l2": 0.5, "linf": 8 / 255}

_REFERENCE_DIR = flags.DEFINE_string("reference_dir", None, "Checkout of the published code.")
_REFERENCE_PYTHON = flags.DEFINE_string("reference_python", sys.executable, "Python with torch.")
_FOLDER = flags.DEFINE_string("folder", "runs/autoattack_reference", "Where the runs go.")
_ATTACKED = flags.DEFINE_string("attacked", None, "A run folder, in place of those of digits.")
_NORMS = flags.DEFINE_list("norms", ["l2", "linf"], "Threat norms.")
_IMAGES = flags.DEFINE_integer("images", 200, "Test images.")
_BATCH = flags.DEFINE_integer("batch_size", 250, "Images in a batch, at most.")
_ALONE = flags.DEFINE_bool("alone", False, "Whether each member meets all images.")
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Timed runs of each side, in turns.")


class Case(NamedTuple):
    """What both sides attack, and the members each list of `flows` makes a suite of."""

    classifier: keras.Model
    images: np.ndarray
    labels: np.ndarray
    norm: str
    epsilon: float
    flows: list[list[str]]


class Outcome(NamedTuple):
    """What one side found: for each flow, which examples stand; by name, the seconds."""

    stands: np.ndarray
    seconds: dict[str, np.ndarray]


def folders() -> Iterator[tuple[pathlib.Path, dict[str, float]]]:
    """The runs and their radii, those of digits trained unless they were before."""
    if _ATTACKED.value:
        yield pathlib.Path(_ATTACKED.value), RADII
        return
    for file, radii in EXPERIMENTS.items():
        run_dir = pathlib.Path(_FOLDER.value) / pathlib.Path(file).stem
        config.bind([file], [f"Network.arguments={MODEL}"])
        train(run_dir, **config.settings())
        yield run_dir, radii


def ours(case: Case, model: CompiledClassifier) -> Outcome:
    """Runs our suites; the first call compiles."""
    suite = attacks.AutoAttack(norm=case.norm)
    version, members = suite.members(10)
    clock = Clock()
    run = clock.timed("suite", suite.__call__)
    stands = []
    for flow in case.flows:
        timed = {name: clock.timed(name, members[name].__call__) for name in flow}
        with mock.patch.object(attacks.AutoAttack, "members", return_value=(version, timed)):
            result = run(
                model, case.images, case.labels, epsilon=case.epsilon, batch_size=_BATCH.value
            )
        stands.append(~result.success)
    return Outcome(np.array(stands), clock.seconds)


def published(case: Case) -> Outcome:
    """Runs the published suites."""
    layers, weights = described(case.classifier)
    logits = case.classifier.predict(case.images, verbose=0)
    settings = {
        "layers": layers,
        "norm": case.norm,
        "epsilon": case.epsilon,
        "flows": case.flows,
        "batch_size": _BATCH.value,
    }
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "settings.json").write_text(json.dumps(settings))
        arrays = {"images": case.images, "labels": case.labels, "logits": logits}
        np.savez(pathlib.Path(folder, "arrays.npz"), **arrays, **weights)
        module = ["-m", "benchmarks.autoattack_torch", _REFERENCE_DIR.value, folder]
        subprocess.run([_REFERENCE_PYTHON.value, *module], check=True)
        seconds = dict(np.load(pathlib.Path(folder, "result.npz")))
    return Outcome(seconds.pop("stands"), seconds)


def compare(case: Case) -> None:
    """Prints a table."""
    model = CompiledClassifier(case.classifier)
    first = ours(case, model)
    turns = [(ours(case, model), published(case)) for _ in range(_ROUNDS.value)]
    seconds = [
        {name: np.median([turn.seconds[name] for turn in side], axis=0) for name in side[0].seconds}
        for side in zip(*turns, strict=True)
    ]
    stands = {"suite": [side.stands.all(axis=0) for side in turns[0]]}
    if len(case.flows) > 1:
        both = zip(*(side.stands for side in turns[0]), strict=True)
        stands |= {name: pair for (name,), pair in zip(case.flows, both, strict=True)}

    print(f"{'':<18}{'robust accuracy, %':^26}{'seconds':^20}{'times as fast':^18}")
    print(f"{'':<18}{'tvkeras':>9}{'published':>10}{'differ':>7}", end="")
    print(f"{'tvkeras':>10}{'published':>10}{'by clock':>10}{'by CPU':>8}")

    def row(name: str, own: np.ndarray, other: np.ndarray, pair: list[np.ndarray]) -> None:
        accuracies = "".join(f"{100 * side.mean():9.1f} " for side in pair)
        differ = f"{np.sum(pair[0] != pair[1]):6} " if pair else ""
        wall, cpu = other / own
        times = f"{own[0]:10.1f}{other[0]:10.1f}{wall:10.2f}{cpu:8.2f}"
        print(f"{name:<18}{accuracies + differ:26}{times}", flush=True)

    own, other = seconds
    for name in filter(other.__contains__, own):
        row(name, own[name], other[name], stands.get(name, []))
    row("and compilation", first.seconds["suite"], other["suite"], stands["suite"])


def main(_: list[str]) -> None:
    """Prints a table for each network and norm."""
    has_torch = [_REFERENCE_PYTHON.value, "-c", "import torch"]
    if not _REFERENCE_DIR.value or subprocess.run(has_torch, capture_output=True).returncode:
        print("No --reference_dir, or no torch in --reference_python: skipped.")
        return
    for run_dir, radii in folders():
        run = runs.Run.open(run_dir)
        classifier = run.classifier()
        test = tvkeras.data.load(run.about["dataset"], "test").take(
            np.arange(_IMAGES.value), "attacked"
        )
        images, labels = test.images.astype("float32") / 255, test.labels.astype("int64")
        for norm in _NORMS.value:
            names = list(attacks.AutoAttack(norm=norm).members(10)[1])
            flows = [[name] for name in names] if _ALONE.value else [names]
            print(f"\n{run_dir.name}, {norm} {radii[norm]:.4g}, {len(labels)} images", flush=True)
            compare(Case(classifier, images, labels, norm, radii[norm], flows))


if __name__ == "__main__":
    app.run(main)
