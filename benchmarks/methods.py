"""Methods beside each other on one network: branches of a few epochs from one plain trunk.

    python -m tvkeras.train --gin_file=gin/cifar_undefended.gin --gin_file=gin/airbench.gin \
        --run_dir=runs/trunk
    python -m benchmarks.methods --trunk=runs/trunk --folder=runs/methods [--rows=tv_01,fgsm]

Trains the rows that are asked for, one after the other, or goes on with them; each prints
the command that it is. Then prints a table of all rows in the folder: clean error, error
under 20-step PGD in l2, sizes of the loss's gradient, and the cost of the branch, as passes
a step and as training time over that of the plain branch. All rows choose their best epoch
by held-out robust accuracy, the plain one too, so that all times hold that measurement.
"""

import json
import pathlib
import shlex
import subprocess
import sys

from absl import app, flags

EPSILONS = ("0.1", "0.25", "100/255", "0.5")
FILES = ("gin/airbench.gin", "gin/branch.gin")


def _tv(**settings: object) -> tuple[str, ...]:
    values = {"norm": "'l2'", "fd_step": 0.1, **settings}
    bindings = (f"TVLipschitz.{name}={value}" for name, value in values.items())
    return ("Recipe.defense=@TVLipschitz()", *bindings)


def _attack(kind: str, **settings: object) -> tuple[str, ...]:
    return (f"Recipe.defense=@{kind}()", *(f"{kind}.{k}={v}" for k, v in settings.items()))


# The paper's Lipschitz weights of 0.1 and 1 are read as weights on an image's own loss, or on
# the mean loss of a batch of 128.
ROWS = {
    "undefended": ("Recipe.defense=@Undefended()",),
    "tv_001": _tv(tv_weight=0.01),
    "tv_01": _tv(tv_weight=0.1),
    "tv_01_lip_01": _tv(tv_weight=0.1, lipschitz_weight=0.1),
    "tv_01_lip_1": _tv(tv_weight=0.1, lipschitz_weight=1.0),
    "tv_01_lip_01_of_mean": _tv(tv_weight=0.1, lipschitz_weight=0.1 / 128),
    "tv_01_lip_1_of_mean": _tv(tv_weight=0.1, lipschitz_weight=1 / 128),
    "fgsm_8_255": _attack(
        "AdversarialTraining", norm="'linf'", epsilon="'8/255'", steps=1, random_start=False
    ),
    "one_step_l2_05": _attack(
        "AdversarialTraining", norm="'l2'", epsilon=0.5, steps=1, random_start=False
    ),
    **{
        f"tv_05_step_{str(step).replace('.', '')}": _tv(tv_weight=0.5, fd_step=step)
        for step in (0.1, 0.25, 0.5, 1.0)
    },
    "pgd_7_l2_05": _attack("AdversarialTraining", norm="'l2'", epsilon=0.5, steps=7),
    "trades_l2_05": _attack("TRADES", norm="'l2'", epsilon=0.5, steps=7),
    "tv_05_quarter": _tv(tv_weight=0.5, fd_step=0.5, penalty_fraction=0.25),
    "tv_05_eighth": _tv(tv_weight=0.5, fd_step=0.5, penalty_fraction=0.125),
    "tv_05_every_second": _tv(tv_weight=0.5, fd_step=0.5, penalty_every=2),
    "tv_05_every_fourth": _tv(tv_weight=0.5, fd_step=0.5, penalty_every=4),
}

_TRUNK = flags.DEFINE_string("trunk", None, "Run folder, or zoo entry, that the branches leave.")
_FOLDER = flags.DEFINE_string("folder", "runs/methods", "Where the branches' run folders go.")
_NAMES = flags.DEFINE_list("rows", [], f"Rows to train, of {', '.join(ROWS)}.")


def command(name: str, trunk: str, folder: pathlib.Path) -> list[str]:
    """What trains one row."""
    bindings = (
        *ROWS[name],
        f"Network.initial_weights={trunk!r}",
        "Task.validation_epsilon=0.25",
        f"Task.epsilons={EPSILONS}",
    )
    return [
        *("python", "-m", "tvkeras.train", "--gin_file=gin/cifar.gin"),
        *(f"--gin_file={file}" for file in FILES),
        *(f"--gin_param={binding}" for binding in bindings),
        f"--run_dir={folder / name}",
    ]


def table(folder: pathlib.Path) -> str:
    """The rows that are finished, in the order of `ROWS`."""
    finished = {}
    for name in ROWS:
        path = folder / name / "run.json"
        about = json.loads(path.read_text()) if path.exists() else {}
        if "results" in about:
            finished[name] = about
    plain = finished.get("undefended", {}).get("train_seconds")
    heading = "".join(f"{f'PGD {epsilon}':>12}" for epsilon in EPSILONS)
    lines = [
        f"{'error, %':<22}{'clean':>7}{heading}{'mean |grad|':>13}{'max':>8}{'passes':>8}"
        f"{'time':>7}"
    ]
    for name, about in finished.items():
        results = about["results"]
        errors = "".join(f"{100 * results['pgd_error'][epsilon]:12.1f}" for epsilon in EPSILONS)
        time = f"{about['train_seconds'] / plain:7.2f}" if plain else ""
        lines.append(
            f"{name:<22}{100 * results['clean_error']:7.1f}{errors}"
            f"{results['gradient_norm_mean']:13.3f}{results['gradient_norm_max']:8.2f}"
            f"{about['passes_per_step']:8.2f}{time}"
        )
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Trains the rows that are asked for, and prints all."""
    folder = pathlib.Path(_FOLDER.value)
    if unknown := set(_NAMES.value) - ROWS.keys():
        sys.exit(f"error: rows must be of {sorted(ROWS)}, got {sorted(unknown)}.")
    if _NAMES.value and not _TRUNK.value:
        sys.exit("error: --trunk must name the run folder that the branches leave.")
    for name in _NAMES.value:
        words = command(name, _TRUNK.value, folder)
        print(shlex.join(words), flush=True)
        subprocess.run([sys.executable, *words[1:]], check=True)
    print(table(folder))


if __name__ == "__main__":
    app.run(main)
