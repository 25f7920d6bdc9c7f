"""Several attacks on the same images, and what they find together, example by example."""

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tvkeras import checks
from tvkeras.attacks import Attack, AttackResult
from tvkeras.inference import CompiledClassifier

# A distance is measured in float32: it counts as within epsilon up to this.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One attack of a suite.

    Attributes:
        name: Short, the same in tables, cards and figures.
        attack: The attack.
        epsilons: Radii for an attack that takes one: numbers, or text such as "8/255".
        images: How many of the first images it attacks; all if there are fewer.
        supplementary: Whether the worst case is over the images of the other trials, and
            this one counts where it attacked them: for a slow attack on a few.

    Raises:
        ValueError: For an illegal argument.
    """

    name: str
    attack: Attack
    epsilons: tuple[float | str, ...] = ()
    images: int = 1000
    supplementary: bool = False

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.whole_number("images", self.images, minimum=1)
        for epsilon in checks.sequence("epsilons", self.epsilons):
            checks.epsilon(epsilon, "epsilons")
        if bool(self.epsilons) != self.attack.fixed_epsilon:
            needed = "be given for" if self.attack.fixed_epsilon else "be empty for"
            raise ValueError(
                f"epsilons of trial {self.name!r} must {needed} {type(self.attack).__name__}, "
                f"got epsilons={self.epsilons!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one trial found.

    Attributes:
        trial: The trial.
        results: By radius as text; "" for an attack that takes none.
    """

    trial: Trial
    results: Mapping[str, AttackResult]

    @property
    def distance(self) -> np.ndarray:
        """Smallest perturbation found for each example, over the radii; inf where none."""
        return np.min([result.distance for result in self.results.values()], axis=0)


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
        trials: The attacks; their names must differ.
        batch_size: Images in a batch.
        seed: Of the attacks.
        progress: Whether to say what runs, with progress bars.
        resume_dir: Folder that keeps each batch's result; an interrupted call goes on
            from there.

    Raises:
        ValueError: If two trials have the same name, and as attacks do.
    """
    names = [trial.name for trial in trials]
    if len(set(names)) < len(names):
        raise ValueError(f"trials must have different names, got {names}.")
    model = CompiledClassifier.of(classifier)
    images = model.images(images)
    labels = model.labels(labels, images)
    outcomes = []
    for trial in trials:
        results = {}
        for epsilon in trial.epsilons or (None,):
            text = "" if epsilon is None else str(epsilon)
            if progress:
                print(f"{trial.name} {text}".rstrip(), flush=True)
            folder = text.replace("/", "_")
            results[text] = trial.attack(
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


def broken(distances: np.ndarray, epsilon: float | str) -> np.ndarray:
    """Which examples have an adversarial image within `epsilon`."""
    return distances <= checks.epsilon(epsilon) * (1 + ROUNDING)


def as_csv(labels: np.ndarray, predicted: np.ndarray, outcomes: Sequence[Outcome]) -> bytes:
    """The table of examples: label, prediction, and each trial's distance and queries.

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
            name = f"{outcome.trial.name}@{radius}".rstrip("@")
            columns[f"{name} distance"] = _column(result.distance, len(labels))
            columns[f"{name} queries"] = _column(result.queries, len(labels))
    for norm in sorted({outcome.trial.attack.norm for outcome in outcomes}):
        columns[f"worst {norm}"] = _column(worst_case(outcomes, norm), len(labels))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def read_worst_cases(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The worst case of each norm from a table that `as_csv` wrote."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("worst ")]
    return {
        name.removeprefix("worst "): np.array([float(row[name]) for row in rows if row[name]])
        for name in names
    }


def _column(values: np.ndarray, length: int) -> list[str]:
    return [f"{value:.6g}" for value in values] + [""] * (length - len(values))
