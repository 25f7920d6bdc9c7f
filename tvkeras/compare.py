"""Compares evaluated runs: `python -m tvkeras.compare RUN RUN ... --figure=comparison.png`.

Prints a table, and draws clean and worst-case error against the regularisation's weights: too
little leaves the worst case high, too much the clean error.
"""

import ast
import pathlib
import sys
from typing import Any

from absl import app, flags

from tvkeras import checks
from tvkeras.evaluation import figures
from tvkeras.evaluation.card import Card, Rate, find

_FIGURE = flags.DEFINE_string("figure", "comparison.png", "The PNG to write.")


def compare(cards: list[Card], path: pathlib.Path) -> str:
    """Draws the errors of several cards, ordered by their weights.

    Args:
        cards: Of runs trained without a defence, which has weights 0, or with a
            `TVLipschitz`.
        path: The PNG to write.

    Returns:
        The errors in %, as a Markdown table.

    Raises:
        ValueError: If the cards are of different test sets, share no radius, or have no
            weights.
    """
    if len({card.dataset for card in cards}) != 1:
        raise ValueError(f"runs must be of one data set, got {[card.dataset for card in cards]}.")
    ordered = sorted(cards, key=lambda card: tuple(_weights(card).values()))
    rows = [_errors(card) for card in ordered]
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    if shared == ["clean"]:
        raise ValueError("runs share no norm and radius; evaluate them with the same gin files.")
    labels = [f"{t:g} / {lip:g}" for t, lip in (_weights(card).values() for card in ordered)]
    lines = {name: [row[name] for row in rows] for name in shared}
    figures.over_regularisation(labels, lines, path)
    table = [["run", "tv / lipschitz weight", *shared], ["---"] * (2 + len(shared))]
    for card, label, row in zip(ordered, labels, rows, strict=True):
        table.append([card.name, label, *(f"{100 * row[name].value:.1f}" for name in shared)])
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def read(folder: pathlib.Path) -> Card:
    """The card in a run folder, an evaluation's or a zoo entry's.

    Raises:
        ValueError: If there is none.
    """
    if found := find(folder):
        return found
    raise ValueError(
        f"{folder} has no card.json. Evaluate it: python -m tvkeras.evaluate --model={folder} ..."
    )


def _errors(card: Card) -> dict[str, Rate]:
    """Clean and worst-case errors, by what they are."""
    worst = {
        f"{report.norm} {radius}": error
        for report in card.worst_case
        for radius, error in report.error.items()
    }
    return {"clean": card.clean_error, **worst}


def _weights(card: Card) -> dict[str, float]:
    """The weights of the total variation and of the Lipschitz term."""
    text = card.training["defense"]
    call: Any = ast.parse(text, mode="eval").body
    if call.func.id not in ("Undefended", "TVLipschitz"):
        raise ValueError(f"runs must be undefended or of a TVLipschitz, got {card.name}: {text}.")
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    names = ("tv_weight", "lipschitz_weight")
    return {name: checks.epsilon(arguments.get(name, 0), name) for name in names}


def main(arguments: list[str]) -> None:
    """Parse, call."""
    try:
        if len(arguments) < 3:
            raise ValueError("name at least two evaluated runs.")
        cards = [read(pathlib.Path(folder)) for folder in arguments[1:]]
        print(compare(cards, pathlib.Path(_FIGURE.value)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"\nfigure: {_FIGURE.value}")


if __name__ == "__main__":
    app.run(main)
