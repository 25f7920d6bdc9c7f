"""Trains digits with and without a defence and compares: `python -m tvkeras.quickstart`."""

import pathlib
import sys
from typing import Any

from absl import flags

from tvkeras import config, evaluation, terminal
from tvkeras.training.loop import train

EXPERIMENTS = {
    "undefended": "gin/digits_undefended.gin",
    "TV + Lipschitz": "gin/digits_tv_lip.gin",
}


def main(_: list[str]) -> None:
    """Trains both, prints a table, writes a figure."""
    folder = pathlib.Path(flags.FLAGS.folder)
    reports: dict[str, dict[str, Any]] = {}
    for name, file in EXPERIMENTS.items():
        run_dir = folder / pathlib.Path(file).stem
        print(f"\nTraining {name} ({file})", flush=True)
        try:
            config.bind([file])
        except config.ConfigError as error:
            sys.exit(f"error: {error}\nRun the quickstart in a checkout of tvkeras.")
        try:
            reports[name] = train(run_dir, **config.settings())  # goes on with an earlier one
        except (ValueError, OSError) as error:
            terminal.fail(error)
    figure = folder / "comparison.png"
    evaluation.error_curves(reports, figure)
    print(f"\n{_table(reports)}\n\nfigure: {figure}\nrun folders: {folder}/*")


def _table(reports: dict[str, dict[str, Any]]) -> str:
    radii = list(next(iter(reports.values()))["pgd_error"])
    heading = "".join(f"{f'PGD l2 {radius}':>13}" for radius in radii)
    lines = [f"{'test error, %':<16}{'clean':>7}{heading}{'mean |grad|':>13}{'max |grad|':>12}"]
    for name, report in reports.items():
        errors = "".join(f"{100 * report['pgd_error'][radius]:13.1f}" for radius in radii)
        lines.append(
            f"{name:<16}{100 * report['clean_error']:7.1f}{errors}"
            f"{report['gradient_norm_mean']:13.3f}{report['gradient_norm_max']:12.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_string("folder", "runs/quickstart", "Where the runs and the figure go.")
    terminal.run(main)
