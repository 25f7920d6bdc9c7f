"""Evaluates a run: `python -m tvkeras.evaluate --gin_file=gin/evaluate_cifar.gin --model=RUN`."""

import contextlib
import hashlib
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from absl import app, flags

from tvkeras import attacks, bounds, checks, config, data, runs, zoo
from tvkeras.attacks import AttackedClassifier, AttackResult
from tvkeras.attacks.base import as_float
from tvkeras.attacks.statistics import loss_statistics
from tvkeras.detection import GradientNormDetector, gradient_norms, roc
from tvkeras.evaluation import card, figures, suite

FALSE_POSITIVE_RATES = (0.01, 0.05, 0.1)
SHOWN_EXAMPLES = 6


def evaluate(
    *,
    run_dir: str,
    output: str,
    trials: Sequence[suite.Trial],
    epsilons: Mapping[str, Sequence[float | str]],
    test_split: str = "test",
    clean_images: int = 10_000,
    statistics: tuple[str, ...] = ("loss", "model"),
    false_positive_rate: float = 0.05,
    evasive_images: int = 100,
    evasive: Mapping[str, Any] | None = None,
    batch_size: int = 250,
    seed: int = 0,
    twin: str | None = None,
    command: str = "tvkeras.evaluate.evaluate",
) -> card.Card:
    """Attacks a trained run and writes its card; goes on with an interrupted evaluation.

    Args:
        run_dir: The run folder.
        output: Folder of `card.json`, `README.md`, the table of examples and figures.
        trials: The attacks.
        epsilons: The card's radii, by norm.
        test_split: Split of the run's data set that is attacked.
        clean_images: How many of its first images give clean error and gradient norms.
        statistics: Of the gradient-norm detectors.
        false_positive_rate: Share of held-out clean images that a detector may reject.
        evasive_images: How many images the attack on the detector attacks.
        evasive: Arguments of `attacks.EvasiveCarliniWagner`, such as {"steps": 200}.
        batch_size: Images in a batch.
        seed: Of everything random.
        twin: Folder of another evaluation whose curve is drawn beside this one's, such
            as that of the undefended network.
        command: What to state in the card as its origin.

    Raises:
        ValueError: For an illegal argument, or a folder that is no finished run.
        tvkeras.data.DataNotFoundError: If the run's data is not on this machine.
    """
    for norm, radii in epsilons.items():
        for epsilon in checks.sequence("epsilons", radii):
            checks.epsilon(epsilon, f"epsilons[{norm!r}]")
    needed = {"l2", *(trial.attack.norm for trial in trials)}  # l2 for the bounds
    if not trials or needed - epsilons.keys():
        raise ValueError(
            f"epsilons must give radii in {sorted(needed)} for at least one trial, got "
            f"epsilons={dict(epsilons)!r} and {len(trials)} trials."
        )
    folder, run = pathlib.Path(output), pathlib.Path(run_dir)
    classifier, about = runs.load(run)
    model = AttackedClassifier(classifier)
    test = data.load(about["dataset"], test_split)
    test = test.take(np.arange(min(clean_images, len(test))), test_split)
    training = data.load(about["dataset"], "train")
    _, held_out = data.held_out(training, about["validation_fraction"])
    folder.mkdir(parents=True, exist_ok=True)

    # ---- Clean images ----------------------------------------------------------------
    _, predicted, sizes = loss_statistics(model, test.images, test.labels, "l2", batch_size)
    rows = gradient_norms(model, test.images, "l2", "model", batch_size)

    # ---- Attacks ---------------------------------------------------------------------
    outcomes = suite.run(
        model,
        test.images,
        test.labels,
        trials,
        batch_size=batch_size,
        seed=seed,
        progress=True,
        resume_dir=folder / "attacks",
    )
    (folder / "examples.csv").write_bytes(suite.as_csv(test.labels, predicted, outcomes))
    attacked_norms = sorted({trial.attack.norm for trial in trials})
    attacked = max(trial.images for trial in trials)

    # ---- Detection and bounds ---------------------------------------------------------
    adversarial = {
        outcome.trial.name: list(outcome.results.values())[-1]  # at the largest radius
        for outcome in outcomes
    }
    detection, scores, curves = [], {}, {}
    for statistic in statistics:
        detector = GradientNormDetector.fit(
            model, held_out.images, false_positive_rate, statistic=statistic, batch_size=batch_size
        )
        evading = detector.adaptive_attack(**(evasive or {}))(
            model,
            test.images[:evasive_images],
            test.labels[:evasive_images],
            batch_size=batch_size,
            seed=seed,
            progress=True,
            resume_dir=folder / "attacks" / f"evasive-{statistic}",
        )
        report, scores[statistic], curves[statistic] = _detection(
            detector, model, test.images[:attacked], {**adversarial, "evasive": evading}, evading
        )
        detection.append(report)
    images, labels = as_float(test.images[:attacked]), test.labels[:attacked]
    proved = [
        bounds.estimated_bound(model, images, labels, batch_size=batch_size),
        bounds.certified_bound(model, images, batch_size=batch_size),
    ]

    # ---- Card ------------------------------------------------------------------------
    result = card.Card(
        name=run.name,
        command=command,
        model={
            **{key: about[key] for key in ("model", "model_arguments", "parameters")},
            "weights_sha256": hashlib.sha256((run / "best.weights.h5").read_bytes()).hexdigest(),
        },
        training={key: about[key] for key in ("defense", "dataset", "epochs", "data_sha256")},
        dataset=f"{about['dataset']} {test_split}",
        seed=seed,
        clean_error=card.rate(predicted != test.labels),
        gradient_norms={
            name: {"mean": float(values.mean()), "max": float(values.max())}
            for name, values in (("loss", sizes), ("model", rows))
        },
        attacks=tuple(card.attack_report(o, epsilons[o.trial.attack.norm]) for o in outcomes),
        worst_case=tuple(
            card.worst_case_report(outcomes, norm, epsilons[norm]) for norm in attacked_norms
        ),
        detection=tuple(detection),
        bounds=tuple(_bound_report(bound, labels, epsilons[bound.norm]) for bound in proved),
        figures=_draw(folder, outcomes, images, scores, curves, detection, twin),
        versions=runs.versions(),
    )
    card.write(result, folder)
    return result


def _detection(
    detector: GradientNormDetector,
    model: AttackedClassifier,
    images: np.ndarray,
    adversarial: Mapping[str, AttackResult],
    evading: AttackResult,
) -> tuple[card.DetectionReport, dict[str, np.ndarray], dict[str, Any]]:
    """The report, the scores and the ROC curves, by attack."""
    scores = {"clean": detector.scores(model, images)}
    distances = {}
    for name, result in adversarial.items():
        moved = result.success & (result.distance > 0)  # not those that were wrong without it
        if moved.any():
            scores[name] = detector.scores(model, result.x_adv[moved])
            distances[name] = float(np.median(result.distance[moved]))
    curves = {name: roc(scores["clean"], scores[name]) for name in distances}
    report = card.DetectionReport(
        statistic=detector.statistic,
        threshold=detector.threshold,
        false_positive_rate=card.rate(scores["clean"] >= detector.threshold),
        detected={name: card.rate(scores[name] >= detector.threshold) for name in distances},
        at={
            name: {str(rate): curve.true_positive_rate_at(rate) for rate in FALSE_POSITIVE_RATES}
            for name, curve in curves.items()
        },
        median_distance=distances,
        evasive_success=card.rate(evading.success),
    )
    return report, scores, curves


def _bound_report(
    bound: bounds.Bound, labels: np.ndarray, epsilons: Sequence[float | str]
) -> card.BoundReport:
    right = bound.classes == labels
    return card.BoundReport(
        kind=bound.kind,
        norm=bound.norm,
        median_radius=float(np.median(np.where(right, bound.radius, 0.0))),
        error={
            str(epsilon): float(1 - np.mean(right & (bound.radius >= checks.epsilon(epsilon))))
            for epsilon in epsilons
        },
        assumptions=bound.assumptions,
    )


def _draw(
    folder: pathlib.Path,
    outcomes: Sequence[suite.Outcome],
    images: np.ndarray,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    curves: Mapping[str, Mapping[str, Any]],
    detection: Sequence[card.DetectionReport],
    twin: str | None,
) -> dict[str, str]:
    """Draws the figures; returns the file of each caption."""
    drawn = {}
    table = suite.read_worst_cases(folder / "examples.csv")
    lines = {norm: {"this model": distances} for norm, distances in table.items()}
    if twin is not None:
        other = suite.read_worst_cases(pathlib.Path(twin) / "examples.csv")
        for norm in lines.keys() & other.keys():
            lines[norm][pathlib.Path(twin).parent.name or twin] = other[norm]
    figures.distance_curves(lines, folder / "distances.png")
    drawn["Error against perturbation size, worst case over attacks"] = "distances.png"
    for report in detection:
        name = report.statistic
        figures.score_histogram(scores[name], report.threshold, folder / f"scores_{name}.png")
        drawn[f"Gradient norms ({name}), clean and attacked"] = f"scores_{name}.png"
        figures.roc_curves(curves[name], folder / f"roc_{name}.png")
        drawn[f"ROC of the detector ({name})"] = f"roc_{name}.png"
    nearest = min(
        (o for o in outcomes if not o.trial.attack.fixed_epsilon),
        key=lambda outcome: np.median(outcome.distance),
        default=outcomes[-1],
    )
    result = list(nearest.results.values())[-1]
    shown = np.flatnonzero(result.success & (result.distance > 0))[:SHOWN_EXAMPLES]
    if len(shown):
        titles = [f"{nearest.trial.attack.norm} {result.distance[i]:.2g}" for i in shown]
        path = folder / "examples.png"
        figures.adversarial_images(images[shown], result.x_adv[shown], titles, path)
        drawn[f"Adversarial images found by {nearest.trial.name}"] = path.name
    return drawn


# ---- Command line --------------------------------------------------------------------
_MODEL = flags.DEFINE_string(
    "model", None, "A run folder, or the name of a zoo entry.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Where to write; default: <model>/evaluation.")


def library_attacks() -> list[type[attacks.Attack]]:
    """CleverHans's and Foolbox's attacks, where they can be had."""
    found = []
    if keras.backend.backend() == "tensorflow":
        for name in attacks.TENSORFLOW_ATTACKS:
            with contextlib.suppress(ImportError):  # Foolbox is an extra
                found.append(getattr(attacks, name))
    return found


def main(_: list[str]) -> None:
    """Parse, bind, call."""
    evaluate_configured = config.configurable(evaluate, library_attacks())
    output = _OUTPUT.value or str(pathlib.Path(_MODEL.value) / "evaluation")
    try:
        config.bind(config.GIN_FILE.value, config.GIN_PARAM.value)
        result = evaluate_configured(
            run_dir=str(zoo.find(_MODEL.value)),
            output=output,
            command=shlex.join(["python", "-m", "tvkeras.evaluate", *sys.argv[1:]]),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on with what is in {output}/attacks.")
    for worst in result.worst_case:
        errors = ", ".join(f"{100 * r.value:.1f} % at {e}" for e, r in worst.error.items())
        print(f"worst case in {worst.norm}: {errors}")
    print(f"card: {output}/README.md")


if __name__ == "__main__":
    app.run(main)
