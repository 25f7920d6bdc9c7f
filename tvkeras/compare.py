"""Compares evaluated models.

    python -m tvkeras.compare MODEL MODEL ... [--scatter=scatter.svg] [--figure=weights.png]

MODEL is a run folder or the name of a zoo entry. Prints, as Markdown, the paper's tables: errors,
distances and gradients; attack by attack; detection. The scatter shows clean error against error
under attack. The figure shows over-regularisation: both errors against the weights, of which too
little leaves the error under attack high, too much the clean error.

--scatter=FILE the scatter, as SVG
--norm=l2      of the scatter's attacks
--figure=FILE  the figure, as PNG
"""

import pathlib

from absl import flags

from tvkeras import terminal, zoo
from tvkeras.evaluation import card, comparison, figures
from tvkeras.evaluation.card import Card
from tvkeras.evaluation.scatter import scatter


def read(model: str) -> Card:
    """The card of a run folder, an evaluation's or a zoo entry.

    Raises:
        ValueError: If there is none.
    """
    if found := card.find(pathlib.Path(model)):
        return found
    if model in zoo.names():
        return zoo.card(model)
    raise ValueError(
        f"{model} is no zoo entry ({zoo.names()}) and has no card.json. Evaluate it: "
        f"python -m tvkeras.evaluate --model={model} ..."
    )


def main(arguments: list[str]) -> None:
    """Parse, call."""
    figure, points = flags.FLAGS.figure, flags.FLAGS.scatter
    if len(arguments) < 3:
        raise ValueError("name at least two evaluated models.")
    cards = {model: read(model) for model in arguments[1:]}
    print(comparison.tables(cards))
    if points:
        svg = scatter([*cards.values()], flags.FLAGS.norm)
        pathlib.Path(points).write_text(svg, encoding="utf-8")
        print(f"scatter: {points}")
    if figure:
        drawn = comparison.by_weights([*cards.values()])
        figures.over_regularisation(*drawn, pathlib.Path(figure))
        print(f"figure: {figure}")


if __name__ == "__main__":
    flags.DEFINE_string("scatter", None, "An SVG to write: error under attack against clean error.")
    flags.DEFINE_string("norm", "l2", "Of the scatter's attacks.")
    flags.DEFINE_string("figure", None, "A PNG to write: error against the weights.")
    terminal.run(main)
