"""Several attacks on the same images, and what they find together, example by example."""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tvkeras import checks
from tvkeras.attacks import AttackResult, AutoAttackResult
from tvkeras.checks import Radius
from tvkeras.evaluation.trials import Trial
from tvkeras.inference import CompiledClassifier

# A distance is measured in float32: it counts as within epsilon up to this.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A classifier, test images in its bounds, and the arguments of attacks on it.

    Attributes:
        model: The classifier.
        images: uint8, or floats in the classifier's bounds.
        labels: True classes, int64 `(count,)`.
        how: `batch_size`, `seed`, `progress` and `resume_dir`.
    """

    model: CompiledClassifier
    images: np.ndarray
    labels: np.ndarray
    how: dict[str, Any]

    def first(self, count: int) -> "Bench":
        """The bench of the first images."""
        return dataclasses.replace(self, images=self.images[:count], labels=self.labels[:count])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one trial found.

    Attributes:
        trial: The trial.
        results: By radius; None for an attack that takes none.
    """

    trial: Trial
    results: Mapping[Radius | None, AttackResult]

    @property
    def distance(self) -> np.ndarray:
        """Smallest perturbation found for each example, over the radii; inf where none."""
        return np.min([result.distance for result in self.results.values()], axis=0)

    @property
    def version(self) -> str:
        """What differs from AutoAttack where it had to do without a member; "" else."""
        found = {r.version for r in self.results.values() if isinstance(r, AutoAttackResult)}
        return "".join(version for version in found if version.startswith("custom"))

    @property
    def name(self) -> str:
        """The trial's, or that of a custom suite, which is not AutoAttack."""
        return f"custom suite {self.trial.attack.norm}" if self.version else self.trial.name

    @property
    def farthest(self) -> tuple[str, AttackResult]:
        """Name and result, at the largest radius if it has any."""
        radius = max(self.results, key=lambda radius: radius or 0.0)
        name = self.name if radius is None else f"{self.name}, ε = {radius}"
        return name, self.results[radius]


def run(
    classifier: keras.Model | CompiledClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    trials: Sequence[Trial],
    *,
    batch_size: int = 250,
    seed: int = 0,
    progress: bool = False,
    resume_dir: str | os.PathLike[str] | None = None,
) -> list[Outcome]:
    """Runs every trial at every radius.

    Args:
        classifier: Maps images to logits.
        images: Floats in the classifier's bounds, by default [0, 1], or uint8; shape
            `(count, height, width, channels)`.
        labels: True classes, shape `(count,)`.
        trials: The attacks, with their radii; their names differ (`trials.chosen`).
        batch_size: Images in a batch.
        seed: Of the attacks.
        progress: Whether to say what runs, and how long it takes.
        resume_dir: Folder that keeps each batch's result; an interrupted call goes on
            from there.

    Raises:
        ValueError: As attacks do.
    """
    model = CompiledClassifier.of(classifier)
    images = model.images(images)
    labels = model.labels(labels, images)
    outcomes = []
    for trial in trials:
        results: dict[Radius | None, AttackResult] = {}
        for given in trial.epsilons or (None,):
            epsilon = None if given is None else checks.epsilon(given)
            folder = "" if epsilon is None else str(epsilon).replace("/", "_")
            results[epsilon] = trial.attack(
                model,
                images[: trial.images],
                labels[: trial.images],
                epsilon=epsilon,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
                resume_dir=resume_dir and pathlib.Path(resume_dir) / trial.name / folder,
            )
        outcomes.append(Outcome(trial=trial, results=results))
    return outcomes


def worst_case(outcomes: Sequence[Outcome], norm: str) -> np.ndarray:
    """Smallest perturbation that any attack in `norm` found for each example.

    Over the first images that all of them attacked, but for supplementary trials: shape
    `(count,)`, inf where no attack succeeded; empty if no attack measures in `norm`.
    """
    measured = [o for o in outcomes if o.trial.attack.norm == norm]
    if not measured:
        return np.zeros(0)
    deciding = [o for o in measured if not o.trial.supplementary] or measured
    worst = np.full(min(len(o.distance) for o in deciding), np.inf)
    for outcome in measured:
        distance = outcome.distance[: len(worst)]
        worst[: len(distance)] = np.minimum(worst[: len(distance)], distance)
    return worst


def broken(distances: np.ndarray, epsilon: float) -> np.ndarray:
    """Which examples have an adversarial image within `epsilon`."""
    return distances <= epsilon * (1 + ROUNDING)


def write_csv(
    labels: np.ndarray, predicted: np.ndarray, outcomes: Sequence[Outcome], path: pathlib.Path
) -> None:
    """Writes the table of examples: label, prediction, and each trial's distance and queries.

    Distances are in the trial's norm; empty where the trial did not attack the image.
    "worst l2" is the smallest of all in l2, over the images that all of them attacked.
    """
    columns: dict[str, Sequence[Any]] = {
        "index": range(len(labels)),
        "label": labels.tolist(),
        "predicted": predicted.tolist(),
    }
    for outcome in outcomes:
        for radius, result in outcome.results.items():
            name = outcome.name if radius is None else f"{outcome.name}@{radius}"
            columns[f"{name} distance"] = _column(result.distance, len(labels))
            columns[f"{name} queries"] = _column(result.queries, len(labels))
    for norm in sorted({outcome.trial.attack.norm for outcome in outcomes}):
        columns[f"worst {norm}"] = _column(worst_case(outcomes, norm), len(labels))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_worst_cases(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The worst case of each norm from a table that `write_csv` wrote."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("worst ")]
    return {
        name.removeprefix("worst "): np.array([float(row[name]) for row in rows if row[name]])
        for name in names
    }


def _column(values: np.ndarray, length: int) -> list[str]:
    return [f"{value:.6g}" for value in values] + [""] * (length - len(values))
