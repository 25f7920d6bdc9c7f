"""Clean error against error under attack, a point for each card, as an SVG."""

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from tvkeras import checks
from tvkeras.evaluation.card import Card, Rate

LEFT, RIGHT, TOP, BOTTOM = 44, 340, 12, 210  # of the plot, in the drawing's units
LINE = 15  # height of a label
COLOURS = ("#3b82c4", "#d9662b", "#3c9a5f", "#a85cc0", "#a08a1c", "#d14a78")  # on white and black

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def scatter(cards: Sequence[Card], norm: str, page: str = "") -> Markup:
    """Draws clean error against error under attack at one radius, in colours by network.

    Args:
        cards: Of one test set.
        norm: Of the attacks. The radius is the middle one of those that most cards have;
            cards without it are left out.
        page: Address of a card's page, such as "{name}/index.html", to link to.

    Raises:
        ValueError: If no card has an error under attacks in that norm.
    """
    errors = {
        card.name: worst.error for card in cards for worst in card.worst_case if worst.norm == norm
    }
    counts = collections.Counter(radius for error in errors.values() for radius in error)
    if not counts:
        raise ValueError(f"cards must have an error under attacks in {norm!r}; none has.")
    most = max(counts.values())
    shared = sorted((r for r, count in counts.items() if count == most), key=checks.epsilon)
    radius = shared[len(shared) // 2]
    shown = [card for card in cards if radius in errors.get(card.name, {})]
    limit = max(0.01, 1.1 * max(card.clean_error.value for card in shown))
    networks = sorted({card.model["model"] for card in shown})
    points: list[dict[str, Any]] = [
        {
            "card": card,
            "attacked": errors[card.name][radius],
            "x": LEFT + (RIGHT - LEFT) * card.clean_error.value / limit,
            "y": BOTTOM - (BOTTOM - TOP) * errors[card.name][radius].value,
            "colour": COLOURS[networks.index(card.model["model"]) % len(COLOURS)],
            "page": page.format(name=card.name),
        }
        for card in shown
    ]
    lowest = TOP - LINE
    for point in sorted(points, key=lambda point: point["y"]):  # labels that do not overlap
        lowest = point["label"] = max(point["y"] + 4, lowest + LINE)
    step = next(s for s in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 1) if limit / s <= 6)
    ticks = [
        (n * step, LEFT + (RIGHT - LEFT) * n * step / limit) for n in range(int(limit / step) + 1)
    ]
    return Markup(
        _TEMPLATES.get_template("scatter.svg").render(
            points=points,
            norm=norm,
            radius=radius,
            ticks=ticks,
            levels=[(share, BOTTOM - (BOTTOM - TOP) * share) for share in (0, 0.25, 0.5, 0.75, 1)],
            box=(LEFT, RIGHT, TOP, BOTTOM),
            percent=_percent,
        )
    )


def _percent(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
