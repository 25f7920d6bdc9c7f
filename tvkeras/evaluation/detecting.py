"""The gradient-norm detectors of a card: made, met by the attacks, and evaded."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvkeras import checks, norms
from tvkeras.detection import ROC, GradientNormDetector, roc
from tvkeras.evaluation.card import EVASIVE, DetectionReport
from tvkeras.evaluation.reports import rate
from tvkeras.evaluation.suite import Bench, Outcome
from tvkeras.inference import STATISTICS
from tvkeras.inputs import as_float

FALSE_POSITIVE_RATES = (0.01, 0.05, 0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection:
    """How the gradient-norm detectors are made and attacked.

    Attributes:
        norm: Threat norm, whose dual measures the gradients.
        statistics: Of the detectors, a detector each.
        false_positive_rate: Share of held-out clean images that a detector may reject.
        evasive_images: How many of the first images the attack on the detector attacks.
        evasive: Arguments of `attacks.EvasiveCarliniWagner`, such as {"steps": 200}.

    Raises:
        ValueError: For an illegal argument.
    """

    norm: str = "l2"
    statistics: tuple[str, ...] = ("loss",)
    false_positive_rate: float = 0.05
    evasive_images: int = 50
    evasive: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"steps": 100, "search_steps": 5}
    )

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, norms.DUALS)
        for statistic in checks.sequence("statistics", self.statistics):
            checks.one_of("statistics", statistic, STATISTICS)
        checks.whole_number("evasive_images", self.evasive_images, minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detected:
    """What a detector notices.

    Attributes:
        report: The card's part.
        scores: Of clean images, and of the adversarial ones of each attack.
        curves: By attack, but for the evasive one, which is made for one threshold.
    """

    report: DetectionReport
    scores: Mapping[str, np.ndarray]
    curves: Mapping[str, ROC]


def fitted(
    bench: Bench, held_out_images: np.ndarray | None, detection: Detection
) -> list[GradientNormDetector]:
    """A detector for each statistic; none without images to choose its threshold on.

    Raises:
        ValueError: As `GradientNormDetector.fit`.
    """
    if held_out_images is None:
        return []
    clean = bench.model.images(held_out_images, "held_out_images")
    settings: dict[str, Any] = {"norm": detection.norm, "batch_size": bench.how["batch_size"]}
    share = detection.false_positive_rate
    return [
        GradientNormDetector.fit(bench.model, clean, share, statistic=statistic, **settings)
        for statistic in detection.statistics
    ]


def met(
    detector: GradientNormDetector,
    bench: Bench,
    outcomes: Sequence[Outcome],
    detection: Detection,
    held_out_images: int,
) -> Detected:
    """What a detector notices of the attacks, and of one that evades it."""
    folder = bench.how["resume_dir"]
    kept = folder and pathlib.Path(folder) / f"evasive-{detector.statistic}"
    few = bench.first(detection.evasive_images)
    evading = detector.adaptive_attack(**detection.evasive)(
        few.model, few.images, few.labels, **{**few.how, "resume_dir": kept}
    )
    bounds, size = bench.model.bounds, bench.how["batch_size"]
    scores, distances = {"clean": detector.scores(bench.model, bench.images, size)}, {}
    for name, result in (*(outcome.farthest for outcome in outcomes), (EVASIVE, evading)):
        moved = result.success & (result.distance > 0)  # not those that were wrong without it
        if moved.any():
            scores[name] = detector.scores(bench.model, result.x_adv[moved], size)
            before = as_float(bench.images[: len(moved)][moved], bounds)
            changes = as_float(result.x_adv[moved], bounds) - before
            lengths = np.linalg.norm(changes.reshape(len(changes), -1), axis=1)
            distances[name] = float(np.median(lengths))
    curves = {name: roc(scores["clean"], scores[name]) for name in distances if name != EVASIVE}
    report = DetectionReport(
        statistic=detector.statistic,
        norm=detector.norm,
        threshold=detector.threshold,
        held_out_images=held_out_images,
        false_positive_rate=rate(scores["clean"] >= detector.threshold),
        detected={name: rate(scores[name] >= detector.threshold) for name in distances},
        at={
            name: {str(share): curve.true_positive_rate_at(share) for share in FALSE_POSITIVE_RATES}
            for name, curve in curves.items()
        },
        median_distance=distances,
        evasive_success=rate(evading.success),
    )
    return Detected(report=report, scores=scores, curves=curves)
