"""What several cards measured, side by side."""

from collections.abc import Callable, Mapping, Sequence

from tvkeras import checks
from tvkeras.evaluation.card import Card, Rate
from tvkeras.evaluation.page import number


def tables(cards: Mapping[str, Card]) -> str:
    """What the cards measured, side by side: errors and rates in %, as Markdown.

    Args:
        cards: Of one test set, by the name to show. "-" where one lacks a figure.

    Raises:
        ValueError: If the cards are of different test sets.
    """
    if len(sets := {about.dataset for about in cards.values()}) != 1:
        raise ValueError(f"models must be of one test set, got {sorted(sets)}.")
    lines = []
    for title, figures_of in (
        ("Worst case over attacks, distances, gradients", _robustness),
        ("Attack by attack", _attacks),
        ("Detection by gradient norm", _detection),
    ):
        lines += [f"### {title}", "", *_table(cards, figures_of)]
    return "\n".join(lines)


def by_weights(cards: Sequence[Card]) -> tuple[list[str], dict[str, list[Rate]]]:
    """What `figures.over_regularisation` draws: the weights in order, and errors at shared radii.

    Args:
        cards: Of runs trained without a defence, which has weights 0, or with a
            `TVLipschitz`.

    Raises:
        ValueError: If the cards share no radius, or have no weights.
    """
    ordered = sorted(cards, key=_weights)
    rows = [_errors(card) for card in ordered]
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    if shared == ["clean"]:
        raise ValueError("models share no norm and radius: evaluate them with the same gin files.")
    labels = [" / ".join(f"{weight:g}" for weight in _weights(card)) for card in ordered]
    return labels, {name: [row[name] for row in rows] for name in shared}


# ---- Figures by name --------------------------------------------------------------------
def _errors(about: Card) -> dict[str, Rate]:
    worst = {
        f"{report.norm} {radius}": error
        for report in about.worst_case
        for radius, error in report.error.items()
    }
    return {"clean": about.clean_error, **worst}


def _robustness(about: Card) -> dict[str, str]:
    sizes = {
        f"{statistic} ‖∇{function}‖": number(about.gradient_norms[key][statistic])
        for key, function in (("loss", "loss"), ("model", "f"))
        for statistic in ("mean", "max")
        if key in about.gradient_norms
    }
    return {
        **{name: _percent(error) for name, error in _errors(about).items()},
        **{f"median {r.norm}": number(r.median_distance) for r in about.worst_case},
        **{f"images, {r.norm}": f"{r.clean_error.n:,}" for r in about.worst_case},
        **{f"audit, {r.norm}": r.verdict for r in about.audit},
        **sizes,
    }


def _attacks(about: Card) -> dict[str, str]:
    found = {}
    for report in about.attacks:
        for radius, error in report.error.items():
            found[f"{report.name} ({report.norm}) {radius}"] = _percent(error)
        found[f"{report.name} ({report.norm}) queries"] = f"{report.median_queries:.0f}"
    return found


def _detection(about: Card) -> dict[str, str]:
    found = {}
    for report in about.detection:
        found[f"clean ({report.statistic})"] = _percent(report.false_positive_rate)
        for name, rate in report.detected.items():
            found[f"{name} ({report.statistic})"] = _percent(rate)
            found[f"{name} ({report.statistic}), distance"] = number(report.median_distance[name])
        found[f"images that evade ({report.statistic})"] = _percent(report.evasive_success)
    return found


def _table(cards: Mapping[str, Card], figures_of: Callable[[Card], dict[str, str]]) -> list[str]:
    """A column for each card, a row for each figure that any of them has."""
    columns = [figures_of(about) for about in cards.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "-") for column in columns)] for name in names]
    lines = [["", *cards], ["---"] * (1 + len(cards)), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _weights(about: Card) -> tuple[float, ...]:
    """The weights of the total variation and of the Lipschitz term."""
    defense = about.training.get("defense", {"class_name": "unknown training"})
    if defense["class_name"] not in ("Undefended", "TVLipschitz"):
        raise ValueError(
            f"models must be undefended or of a TVLipschitz, got one of {defense['class_name']}."
        )
    names = ("tv_weight", "lipschitz_weight")
    return tuple(checks.epsilon(defense["config"].get(name, 0), name) for name in names)


def _percent(rate: Rate) -> str:
    return f"{100 * rate.value:.1f}"
