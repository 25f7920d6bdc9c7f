"""The parts of a card, summed up from what was found."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from tvkeras.bounds import Bound
from tvkeras.checks import Radius
from tvkeras.evaluation import suite
from tvkeras.evaluation.card import AttackReport, BoundReport, Rate, WorstCase
from tvkeras.evaluation.suite import Outcome


def rate(which: np.ndarray) -> Rate:
    """Share of true entries of `which`, shape `(count,)`."""
    count = int(np.sum(which))
    interval = stats.binomtest(count, len(which)).proportion_ci(method="wilson")
    return Rate(
        value=count / len(which),
        low=float(interval.low),
        high=float(interval.high),
        n=len(which),
    )


def attack_report(outcome: Outcome, epsilons: Sequence[Radius]) -> AttackReport:
    """Sums up one trial; `epsilons` are the card's radii in its norm."""
    attack = outcome.trial.attack
    if attack.fixed_epsilon:
        error = {str(e): rate(result.success) for e, result in outcome.results.items()}
    else:
        error = {str(e): rate(suite.broken(outcome.distance, e)) for e in epsilons}
    queries = np.concatenate([result.queries for result in outcome.results.values()])
    asked = queries[queries > 0]
    return AttackReport(
        name=outcome.name,
        settings=outcome.version or str(attack),
        norm=attack.norm,
        error=error,
        median_distance=None if attack.fixed_epsilon else _median(outcome.distance),
        median_queries=float(np.median(asked)) if len(asked) else 0.0,
    )


def worst_cases(
    outcomes: Sequence[Outcome], epsilons: Mapping[str, Sequence[Radius]]
) -> tuple[WorstCase, ...]:
    """Sums up all trials in each norm; `epsilons` are the card's radii by norm."""
    found = []
    for norm, radii in epsilons.items():
        distances = suite.worst_case(outcomes, norm)
        searches = [
            o for o in outcomes if o.trial.attack.norm == norm and not o.trial.attack.fixed_epsilon
        ]
        report = WorstCase(
            norm=norm,
            clean_error=rate(suite.broken(distances, 0)),
            error={str(e): rate(suite.broken(distances, e)) for e in radii},
            median_distance=_median(distances) if searches else None,
        )
        found.append(report)
    return tuple(found)


def bound_report(bound: Bound, labels: np.ndarray, epsilons: Sequence[Radius]) -> BoundReport:
    """Sums up one bound; `epsilons` are the card's radii in its norm."""
    right = bound.classes == labels
    return BoundReport(
        kind=bound.kind,
        norm=bound.norm,
        median_radius=float(np.median(np.where(right, bound.radius, 0.0))),
        error={str(e): float(1 - np.mean(right & (bound.radius >= e))) for e in epsilons},
        assumptions=bound.assumptions,
    )


def _median(distances: np.ndarray) -> float | None:
    middle = float(np.median(distances))
    return middle if math.isfinite(middle) else None
