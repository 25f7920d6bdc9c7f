"""Trains digits with and without a defence and compares; about a minute of training.

    python -m tvkeras.quickstart

--folder=runs/quickstart where the runs and the figure go
"""

import pathlib

from absl import flags

from tvkeras import config, evaluation, terminal
from tvkeras.evaluation import Card
from tvkeras.training.loop import train

EXPERIMENTS = {
    "undefended": "gin/digits_undefended.gin",
    "TV + Lipschitz": "gin/digits_tv_lip.gin",
}


def main(_: list[str]) -> None:
    """Trains both, prints a table, writes a figure."""
    folder = pathlib.Path(flags.FLAGS.folder)
    cards: dict[str, Card] = {}
    for name, file in EXPERIMENTS.items():
        run_dir = folder / pathlib.Path(file).stem
        print(f"\nTraining {name} ({file})", flush=True)
        try:
            config.bind([file])
        except config.ConfigError as error:
            raise ValueError(f"{error}\nRun the quickstart in a checkout of tvkeras.") from error
        card = train(run_dir, **config.settings(), configuration=config.operative)
        if card is not None:
            cards[name] = card
    figure = folder / "comparison.png"
    evaluation.error_curves(cards, figure)
    print(f"\n{_table(cards)}\n\nfigure: {figure}\nrun folders: {folder}/*")


def _table(cards: dict[str, Card]) -> str:
    radii = list(next(iter(cards.values())).worst_case[0].error)
    heading = "".join(f"{f'PGD l2 {radius}':>13}" for radius in radii)
    lines = [f"{'test error, %':<16}{'clean':>7}{heading}{'mean |grad|':>13}{'max |grad|':>12}"]
    for name, card in cards.items():
        errors = "".join(
            f"{100 * error.value:13.1f}" for error in card.worst_case[0].error.values()
        )
        sizes = card.gradient_norms["loss"]
        lines.append(
            f"{name:<16}{100 * card.clean_error.value:7.1f}{errors}"
            f"{sizes['mean']:13.3f}{sizes['max']:12.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_string("folder", "runs/quickstart", "Where the runs and the figure go.")
    terminal.run(main)
