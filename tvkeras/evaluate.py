"""Evaluates a run: `python -m tvkeras.evaluate --gin_file=gin/evaluate_cifar.gin --model=RUN`."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from absl import flags

from tvkeras import attacks, bounds, checks, config, data, norms, runs, terminal, zoo
from tvkeras.attacks import AttackResult
from tvkeras.detection import GradientNormDetector, gradient_norms, roc
from tvkeras.evaluation import audit, card, figures, page, suite
from tvkeras.evaluation.case import ORDERS
from tvkeras.evaluation.corruptions import corrupted_classes
from tvkeras.inference import CompiledClassifier, loss_statistics
from tvkeras.inputs import as_float

FALSE_POSITIVE_RATES = (0.01, 0.05, 0.1)
SHOWN_EXAMPLES = 6

# Of `run.json`: what cards repeat, and what it takes to evaluate a run; its results come last.
MODEL_ENTRIES = ("model", "model_arguments", "num_classes", "parameters")
TRAINING_ENTRIES = ("defense", "dataset", "epochs", "data_sha256")
COST_ENTRIES = ("passes_per_step", "training_pflop", "train_seconds")  # where they were written
RUN_ENTRIES = {*MODEL_ENTRIES, *TRAINING_ENTRIES, "validation_fraction", "results"}


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
    audited_images: int = 100,
    batch_size: int = 250,
    seed: int = 0,
    twin: str | None = None,
    note: str = "",
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
        audited_images: How many of the first images the audit looks at, at the card's radii.
        batch_size: Images in a batch.
        seed: Of everything random.
        twin: Folder of another evaluation, such as the undefended network's: its curve
            is drawn beside this one's. If its run is there or in the folder around it, the
            audit tries that classifier's adversarial images on this one.
        note: For the card: what its readers should know besides the figures.
        command: What to state in the card as its origin.

    Raises:
        ValueError: For an illegal argument, a folder that is no finished run, or a twin
            that is no evaluation on the same images.
        tvkeras.data.DataNotFoundError: If the run's data is not on this machine.
    """
    # ---- What is evaluated -----------------------------------------------------------
    for name, count in (
        ("clean_images", clean_images),
        ("evasive_images", evasive_images),
        ("audited_images", audited_images),
    ):
        checks.whole_number(name, count, minimum=1)
    if not isinstance(note, str):
        raise ValueError(f"note must be text, got note={note!r}.")
    _check_trials(trials, epsilons, clean_images)
    folder, run = pathlib.Path(output), pathlib.Path(run_dir)
    classifier, about = load_run(run)
    model = CompiledClassifier(classifier)
    test = data.load(about["dataset"], test_split)
    test = test.take(np.arange(min(clean_images, len(test))), test_split)
    test_set = f"{about['dataset']} {test_split}"
    other = None if twin is None else _load_twin(pathlib.Path(twin), test_set)
    training = data.load(about["dataset"], "train")
    _, held_out = data.held_out(training, about["validation_fraction"])
    detectors = [
        GradientNormDetector.fit(
            model, held_out.images, false_positive_rate, statistic=statistic, batch_size=batch_size
        )
        for statistic in statistics
    ]
    folder.mkdir(parents=True, exist_ok=True)

    # ---- Clean images ----------------------------------------------------------------
    _, predicted, sizes = loss_statistics(model, test.images, test.labels, "l2", batch_size)
    gradients = {
        statistic: gradient_norms(model, test.images, "l2", statistic, batch_size)
        for statistic in {"model", *statistics}
    }

    spoiled = corrupted_classes(model, test.images, batch_size=batch_size, seed=seed)

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
    adversarial = dict(_farthest(outcome) for outcome in outcomes)
    detection, scores, curves = [], {}, {}
    for detector in detectors:
        evading = detector.adaptive_attack(**(evasive or {}))(
            model,
            test.images[:evasive_images],
            test.labels[:evasive_images],
            batch_size=batch_size,
            seed=seed,
            progress=True,
            resume_dir=folder / "attacks" / f"evasive-{detector.statistic}",
        )
        report, scores[detector.statistic], curves[detector.statistic] = _detection(
            detector,
            model,
            gradients[detector.statistic],
            as_float(test.images),
            {**adversarial, card.EVASIVE: evading},
            len(held_out),
        )
        detection.append(report)
    images, labels = as_float(test.images[:attacked]), test.labels[:attacked]
    estimate = bounds.estimated_bound(model, images, labels, batch_size=batch_size)

    # ---- Audit -----------------------------------------------------------------------
    audits = tuple(
        _audit(
            model,
            test.take(np.arange(min(audited_images, len(test))), test_split),
            norm,
            epsilons[norm],
            other,
            seed=seed,
            batch_size=batch_size,
        )
        for norm in attacked_norms
    )

    # ---- Card ------------------------------------------------------------------------
    result = card.Card(
        name=run.resolve().name,
        command=command,
        model={
            **{key: about[key] for key in MODEL_ENTRIES},
            "weights_sha256": hashlib.sha256((run / "best.weights.h5").read_bytes()).hexdigest(),
        },
        training={
            **{key: about[key] for key in TRAINING_ENTRIES},
            **{key: about[key] for key in COST_ENTRIES if key in about},
        },
        dataset=test_set,
        seed=seed,
        clean_error=card.rate(predicted != test.labels),
        gradient_norms={
            name: {"mean": float(values.mean()), "max": float(values.max())}
            for name, values in (("loss", sizes), ("model", gradients["model"]))
        },
        attacks=tuple(card.attack_report(o, epsilons[o.trial.attack.norm]) for o in outcomes),
        worst_case=tuple(
            card.worst_case_report(outcomes, norm, epsilons[norm]) for norm in attacked_norms
        ),
        audit=audits,
        detection=tuple(detection),
        bounds=(_bound_report(estimate, labels, epsilons[estimate.norm]),),
        figures=_draw(folder, outcomes, images, scores, curves, detection, other),
        versions=runs.versions(*_libraries(trials)),
        note=note,
        corruption_error={
            name: card.rate(classes != test.labels) for name, classes in spoiled.items()
        },
    )
    page.write(result, folder)
    return result


def load_run(run_dir: pathlib.Path) -> tuple[keras.Model, dict[str, Any]]:
    """`runs.load` of a run that has all that a card states.

    Raises:
        ValueError: If the run is not finished, or of an older version.
    """
    classifier, about = runs.load(run_dir)
    if missing := RUN_ENTRIES - about.keys():
        raise ValueError(
            f"{run_dir / 'run.json'} lacks {sorted(missing)}: the run is not finished, or of an "
            "older tvkeras."
        )
    return classifier, about


def _check_trials(
    trials: Sequence[suite.Trial],
    epsilons: Mapping[str, Sequence[float | str]],
    clean_images: int,
) -> None:
    for norm, radii in epsilons.items():
        argument = f"epsilons[{norm!r}]"
        checks.one_of("a norm of epsilons", norm, norms.DUALS)
        values = [checks.epsilon(radius, argument) for radius in checks.sequence(argument, radii)]
        if max(values, default=0) <= 0:
            raise ValueError(f"{argument} must hold a radius above 0, got {radii!r}.")
    needed = {"l2", *(trial.attack.norm for trial in trials)}  # l2 for the bounds
    if not trials or needed - epsilons.keys():
        raise ValueError(
            f"epsilons must give radii in {sorted(needed)} for at least one trial, got "
            f"epsilons={dict(epsilons)!r} and {len(trials)} trials."
        )
    attacked = max(trial.images for trial in trials)
    if attacked > clean_images:
        raise ValueError(
            f"clean_images must be at least the images of every trial, {attacked}, got "
            f"clean_images={clean_images}. Raise it, or lower Trial.images."
        )


@dataclasses.dataclass(frozen=True)
class _Twin:
    """Another evaluation: its name, worst-case distances by norm, and classifier."""

    name: str
    distances: Mapping[str, np.ndarray]
    classifier: keras.Model | None


def _load_twin(folder: pathlib.Path, test_set: str) -> _Twin:
    """Reads the evaluation in `folder`, which must be on the images of `test_set`."""
    path, table = folder / "card.json", folder / "examples.csv"
    if not path.exists() or not table.exists():
        raise ValueError(
            "twin must be the folder of an evaluation, with card.json and examples.csv, got "
            f"{str(folder)!r}. Evaluate that run first; its folder is <run>/evaluation."
        )
    about = json.loads(path.read_text())
    if about["dataset"] != test_set:
        raise ValueError(f"twin must be evaluated on {test_set!r}, got one on {about['dataset']!r}")
    near = (folder, folder.resolve().parent)  # a zoo entry, or a run's evaluation
    found = [run for run in near if (run / "run.json").exists()]
    classifier = runs.load(found[0])[0] if found else None
    return _Twin(about["name"], suite.read_worst_cases(table), classifier)


def _audit(
    model: CompiledClassifier,
    examples: data.Examples,
    norm: str,
    epsilons: Sequence[float | str],
    twin: _Twin | None,
    *,
    seed: int,
    batch_size: int,
) -> card.AuditReport:
    """The audit of the attacks in one norm; none in l1."""
    if norm not in ORDERS:
        return card.AuditReport(
            norm=norm, verdict="not audited", images=0, surrogate=None, checks=()
        )
    print(f"audit {norm}", flush=True)
    found = audit(
        model,
        examples.images,
        examples.labels,
        norm=norm,
        epsilons=[epsilon for epsilon in epsilons if checks.epsilon(epsilon) > 0],
        seed=seed,
        surrogate=twin and twin.classifier,
        batch_size=batch_size,
    )
    return card.AuditReport(
        norm=norm,
        verdict=found.verdict,
        images=len(examples),
        surrogate=twin.name if twin and twin.classifier else None,
        checks=found.checks,
    )


def _detection(
    detector: GradientNormDetector,
    model: CompiledClassifier,
    clean_scores: np.ndarray,
    images: np.ndarray,
    adversarial: Mapping[str, AttackResult],
    held_out: int,
) -> tuple[card.DetectionReport, dict[str, np.ndarray], dict[str, Any]]:
    """The report, the scores and the ROC curves, by attack."""
    scores = {"clean": clean_scores}
    distances = {}
    for name, result in adversarial.items():
        moved = result.success & (result.distance > 0)  # not those that were wrong without it
        if moved.any():
            scores[name] = detector.scores(model, result.x_adv[moved])
            changes = (result.x_adv - images[: len(moved)])[moved]
            distances[name] = float(
                np.median(np.linalg.norm(changes.reshape(len(changes), -1), axis=1))
            )
    curves = {
        name: roc(scores["clean"], scores[name]) for name in distances if name != card.EVASIVE
    }
    report = card.DetectionReport(
        statistic=detector.statistic,
        threshold=detector.threshold,
        held_out_images=held_out,
        false_positive_rate=card.rate(scores["clean"] >= detector.threshold),
        detected={name: card.rate(scores[name] >= detector.threshold) for name in distances},
        at={
            name: {str(rate): curve.true_positive_rate_at(rate) for rate in FALSE_POSITIVE_RATES}
            for name, curve in curves.items()
        },
        median_distance=distances,
        evasive_success=card.rate(adversarial[card.EVASIVE].success),
    )
    return report, scores, curves


def _libraries(trials: Sequence[suite.Trial]) -> list[str]:
    """The libraries whose attacks are among the trials."""
    homes = attacks.TENSORFLOW_ATTACKS
    names = {type(trial.attack).__name__ for trial in trials}
    return sorted({homes[name] for name in names & homes.keys()})


def _farthest(outcome: suite.Outcome) -> tuple[str, AttackResult]:
    """Name and result of a trial, at its largest radius if it has any."""
    radius = max(outcome.results, key=lambda text: checks.epsilon(text or 0))
    name = outcome.trial.name
    return f"{name}, ε = {radius}" if radius else name, outcome.results[radius]


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
    twin: _Twin | None,
) -> dict[str, str]:
    """Draws the figures; returns the file of each caption."""
    drawn = {}
    table = suite.read_worst_cases(folder / "examples.csv")
    lines = {norm: {"this model": distances} for norm, distances in table.items()}
    if twin is not None:
        for norm in lines.keys() & twin.distances.keys():
            lines[norm][twin.name] = twin.distances[norm]
    figures.distance_curves(lines, folder / "distances.png")
    drawn["Error against perturbation size, worst case over attacks"] = "distances.png"
    for report in detection:
        name = report.statistic
        figures.score_histograms(scores[name], report.threshold, folder / f"scores_{name}.png")
        drawn[f"Gradient norms ({name}), clean and attacked"] = f"scores_{name}.png"
        figures.roc_curves(curves[name], folder / f"roc_{name}.png")
        drawn[f"ROC of the detector ({name})"] = f"roc_{name}.png"
    nearest = min(
        (o for o in outcomes if not o.trial.attack.fixed_epsilon),
        key=lambda o: (o.trial.attack.norm != "l2", np.median(o.distance)),
        default=outcomes[-1],
    )
    name, result = _farthest(nearest)
    shown = np.flatnonzero(result.success & (result.distance > 0))[:SHOWN_EXAMPLES]
    if len(shown):
        titles = [f"{nearest.trial.attack.norm} {result.distance[i]:.2g}" for i in shown]
        path = folder / "examples.png"
        figures.adversarial_images(images[shown], result.x_adv[shown], titles, path)
        drawn[f"Adversarial images found by {name}"] = path.name
    return drawn


# ---- Command line --------------------------------------------------------------------
_MODEL = flags.DEFINE_string(
    "model", None, "A run folder, or the name of a zoo entry.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Where to write; default: <model>/evaluation.")


@functools.cache
def library_attacks() -> list[Callable[..., attacks.Attack]]:
    """CleverHans's and Foolbox's attacks; for one that cannot be had, what says why."""
    return [_library_attack(name) for name in attacks.TENSORFLOW_ATTACKS]


def _library_attack(name: str) -> Callable[..., attacks.Attack]:
    try:
        return getattr(attacks, name)
    except ImportError as error:
        why = str(error)

    def refuse(**_: Any) -> attacks.Attack:
        raise ValueError(f"{name} cannot be had: {why}")

    refuse.__name__ = name
    return refuse


def main(_: list[str]) -> None:
    """Parse, bind, call."""
    evaluate_configured = config.configurable(evaluate, library_attacks())
    output = _OUTPUT.value or str(pathlib.Path(_MODEL.value) / "evaluation")
    try:
        if not flags.FLAGS.gin_file:
            raise ValueError("--gin_file must name the attacks, such as gin/evaluate_cifar.gin.")
        config.bind(flags.FLAGS.gin_file, flags.FLAGS.gin_param)
        result = evaluate_configured(
            run_dir=str(zoo.find(_MODEL.value)),
            output=output,
            command=shlex.join(["python", "-m", "tvkeras.evaluate", *sys.argv[1:]]),
        )
    except (ValueError, OSError) as error:
        terminal.fail(error)
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on with what is in {output}/attacks.")
    for worst in result.worst_case:
        errors = ", ".join(f"{100 * r.value:.1f} % at {e}" for e, r in worst.error.items())
        print(f"worst case in {worst.norm}: {errors}")
    for report in result.audit:
        failed = ", ".join(report.named("fail"))
        print(f"audit in {report.norm}: {report.verdict}" + (f" ({failed})" if failed else ""))
    print(f"card: {output}/README.md")


if __name__ == "__main__":
    config.define_flags()
    terminal.run(main)
