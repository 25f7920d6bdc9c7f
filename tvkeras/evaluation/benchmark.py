"""`tvkeras.benchmark`: attacks a classifier, asks whether to believe it, and makes a card."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tvkeras import attacks, checks, norms, runs
from tvkeras.attacks import Attack
from tvkeras.bounds import Bound, SmoothedBound, estimated_bound
from tvkeras.checks import Radius
from tvkeras.detection import gradient_norms
from tvkeras.evaluation import detecting, figures, reports, trials
from tvkeras.evaluation.auditing import audit
from tvkeras.evaluation.card import AuditReport, BoundReport, Card, Rate
from tvkeras.evaluation.case import ORDERS
from tvkeras.evaluation.certified import Certification
from tvkeras.evaluation.corruptions import corrupted_classes
from tvkeras.evaluation.detecting import Detection
from tvkeras.evaluation.suite import Bench, Outcome, run, worst_case, write_csv
from tvkeras.evaluation.trials import Trial
from tvkeras.inference import CompiledClassifier, loss_statistics
from tvkeras.inputs import UNIT

Epsilons = Sequence[float | str]

DETECTION = Detection()
BATCH_SIZE = 250
BATCH_VALUES = 2_500_000  # pixel values in a batch: 16 images of 224x224


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twin:
    """The undefended network beside the one that is measured.

    Attributes:
        name: What to call it.
        classifier: Whose adversarial images the audit tries too.
        distances: Its worst case, by norm: a second curve in the figure.
    """

    name: str
    classifier: keras.Model | None = None
    distances: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def benchmark(
    model: keras.Model | CompiledClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epsilons: Epsilons | Mapping[str, Epsilons],
    norm: str | None = None,
    suite: str | Sequence[str | Attack | Trial] = "quick",
    bounds: tuple[float, float] | None = None,
    attacked_images: int = 250,
    audited_images: int = 100,
    corruptions: bool = True,
    jacobian: bool = False,
    twin: keras.Model | Twin | None = None,
    held_out_images: np.ndarray | None = None,
    detection: Detection | None = DETECTION,
    certification: Certification | None = None,
    name: str = "",
    dataset: str = "",
    note: str = "",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
    resume_dir: str | os.PathLike[str] | None = None,
) -> Card:
    """Attacks a Keras classifier, audits the attacks, and sums it up on a card.

    Clean error, gradients and corruptions are over all images; attacks and bounds over
    the first `attacked_images`. Nothing counts as adversarial but what the classifier,
    asked again, misclassifies.

    Args:
        model: Maps images to logits; any normalisation is inside of it.
        images: Test images: floats in the classifier's bounds, by default [0, 1], or
            uint8; shape `(count, height, width, channels)`.
        labels: True classes, shape `(count,)`.
        epsilons: Radii in units of [0, 1], numbers or text such as "8/255"; or, without
            `norm`, such radii by norm.
        norm: Threat norm of the radii: "l2", "linf" or "l1".
        suite: "quick", "standard" (with AutoAttack) or "talk" (the paper's), see
            `tvkeras.evaluation.trials`; or a list of such names, attacks and trials.
        bounds: Of the classifier's images, such as (0, 255); by default (0, 1).
        attacked_images: How many of the first images are attacked.
        audited_images: How many of them the audit looks at; 0 for no audit, which the
            card then says.
        corruptions: Whether to measure the error on spoiled images too.
        jacobian: Whether to state ||grad f||_{2,inf} too: a gradient for each class.
        twin: An undefended network of the same images: the audit tries its adversarial
            images on this one.
        held_out_images: Images that neither trained the classifier nor are among
            `images`: with them a gradient-norm detector is made, and attacked.
        detection: How; None for no detector.
        certification: How the classifier under noise is certified, such as
            `Certification(sigma=0.25)`, which takes hours; None for not at all.
        name: What to call the model.
        dataset: What to call the images.
        note: For the card: what its readers should know besides the figures.
        batch_size: Images in a batch; by default 250, or fewer where they are large.
        seed: Of everything random.
        progress: Whether to say what runs, and how long it takes.
        resume_dir: Folder that keeps each batch of each attack; an interrupted call goes
            on from there.

    Returns:
        The card: `print` it for a short table, `card.save(folder)` for its page, the
        table of images and figures.

    Raises:
        ValueError: For an illegal argument, images or labels that are none of the
            classifier's, or a classifier of other than logits.

    Example:
    ```python
    card = tvkeras.benchmark(classifier, images, labels, norm="l2", epsilons=(0.25, 0.5))
    print(card)
    card.save("my_card")
    ```
    """
    radii = _radii(norm, epsilons)
    checks.whole_number("attacked_images", attacked_images, minimum=1)
    checks.whole_number("audited_images", audited_images)
    if not isinstance(note, str):
        raise ValueError(f"note must be text, got note={note!r}.")
    chosen = trials.chosen(suite, radii)
    radii = {norm: radii[norm] for norm in sorted({trial.attack.norm for trial in chosen})}
    how = {"batch_size": batch_size, "seed": seed, "progress": progress, "resume_dir": resume_dir}
    bench = _bench(model, bounds, images, labels, how)
    if detection is None:
        held_out_images, detection = None, DETECTION
    detectors = detecting.fitted(bench, held_out_images, detection)

    predicted, gradients = _clean(bench, jacobian)
    attacked = bench.first(attacked_images)
    outcomes = run(bench.model, attacked.images, attacked.labels, chosen, **bench.how)
    audits = _audit(bench.first(audited_images), radii, twin, outcomes) if audited_images else ()
    held_out = 0 if held_out_images is None else len(held_out_images)
    detected = [detecting.met(d, bench, outcomes, detection, held_out) for d in detectors]
    certified = certification.certify(bench) if certification is not None else None
    beside = {twin.name: twin.distances} if isinstance(twin, Twin) else {}
    drawn = figures.of_card(outcomes, attacked, detected, beside, certified)
    return Card(
        name=name or bench.model.classifier.name,
        command="tvkeras.benchmark",
        model=_described(bench),
        training={},
        dataset=dataset,
        seed=seed,
        clean_error=reports.rate(predicted != bench.labels),
        gradient_norms=gradients,
        attacks=tuple(reports.attack_report(o, radii[o.trial.attack.norm]) for o in outcomes),
        worst_case=reports.worst_cases(outcomes, radii),
        audit=audits,
        detection=tuple(found.report for found in detected),
        bounds=_bounds(attacked, radii, certified),
        figures={caption: file for file, (caption, _) in drawn.items()},
        versions=runs.versions(*_libraries(chosen)),
        note=note,
        corruption_error=_corruptions(bench) if corruptions else {},
        suite=suite if isinstance(suite, str) else "custom",
        files={
            "examples.csv": functools.partial(write_csv, bench.labels, predicted, outcomes),
            **{file: draw for file, (_, draw) in drawn.items()},
        },
    )


def _bench(
    model: Any, bounds: tuple[float, float] | None, images: Any, labels: Any, how: dict[str, Any]
) -> Bench:
    """What passes the gate for classifiers, images and labels."""
    given = CompiledClassifier.of(model) if bounds is None else CompiledClassifier(model, bounds)
    images = given.images(images)
    fitting = max(1, min(BATCH_SIZE, BATCH_VALUES // images[0].size))
    if how["batch_size"] is None:
        how = {**how, "batch_size": fitting}
    return Bench(model=given, images=images, labels=given.labels(labels, images), how=how)


def _radii(
    norm: str | None, epsilons: Epsilons | Mapping[str, Epsilons]
) -> dict[str, tuple[Radius, ...]]:
    """The radii by norm, each of which has one above 0."""
    if isinstance(epsilons, Mapping):
        if norm is not None:
            raise ValueError(f"norm must be left out beside epsilons by norm, got norm={norm!r}.")
        by_norm = dict(epsilons)
    else:
        by_norm = {checks.one_of("norm", norm, norms.DUALS): epsilons}
    radii = {}
    for name, given in by_norm.items():
        checks.one_of("a norm of epsilons", name, norms.DUALS)
        argument = f"epsilons[{name!r}]" if norm is None else "epsilons"
        radii[name] = tuple(checks.epsilon(e, argument) for e in checks.sequence(argument, given))
        if max(radii[name], default=0) <= 0:
            raise ValueError(f"{argument} must hold a radius above 0, got {given!r}.")
    return radii


def _clean(bench: Bench, jacobian: bool) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """Predicted classes, and the gradients' mean and maximum, of all images."""
    model, images, size = bench.model, bench.images, bench.how["batch_size"]
    _, predicted, sizes = loss_statistics(model, images, bench.labels, "l2", size)
    found = {"loss": sizes}
    if jacobian:
        found["model"] = gradient_norms(model, images, "l2", "model", size)
    return predicted, {
        name: {"mean": float(values.mean()), "max": float(values.max())}
        for name, values in found.items()
    }


def _audit(
    bench: Bench,
    radii: Mapping[str, Sequence[Radius]],
    twin: keras.Model | Twin | None,
    outcomes: Sequence[Outcome],
) -> tuple[AuditReport, ...]:
    """The audit of the attacks in each norm; none in l1."""
    other = twin.classifier if isinstance(twin, Twin) else twin
    found = []
    for norm, given in radii.items():
        if norm not in ORDERS:
            unknown: dict[str, Any] = {"images": 0, "surrogate": None, "checks": ()}
            found.append(AuditReport(norm=norm, verdict="not audited", **unknown))
            continue
        worst = worst_case(outcomes, norm)[: len(bench.labels)]
        report = audit(
            bench.model,
            bench.images,
            bench.labels,
            norm=norm,
            epsilons=[epsilon for epsilon in given if epsilon > 0],
            seed=bench.how["seed"],
            surrogate=other,
            worst_case=np.pad(worst, (0, len(bench.labels) - len(worst)), constant_values=np.inf),
            batch_size=bench.how["batch_size"],
            progress=bench.how["progress"],
        )
        name = twin.name if twin is not None and other is not None else None
        found.append(dataclasses.replace(report, surrogate=name))
    return tuple(found)


def _bounds(
    bench: Bench,
    radii: Mapping[str, Sequence[Radius]],
    certified: tuple[SmoothedBound, np.ndarray] | None,
) -> tuple[BoundReport, ...]:
    size, labels = bench.how["batch_size"], bench.labels
    found: list[tuple[Bound, np.ndarray]] = [
        (estimated_bound(bench.model, bench.images, labels, norm=norm, batch_size=size), labels)
        for norm in radii
    ]
    if certified is not None:
        found.append(certified)
    return tuple(
        reports.bound_report(bound, labels, radii.get(bound.norm, ())) for bound, labels in found
    )


def _corruptions(bench: Bench) -> dict[str, Rate]:
    size, seed = bench.how["batch_size"], bench.how["seed"]
    classes = corrupted_classes(bench.model, bench.images, batch_size=size, seed=seed)
    return {name: reports.rate(found != bench.labels) for name, found in classes.items()}


def _described(bench: Bench) -> dict[str, Any]:
    """What a card says of a classifier that it knows nothing else of."""
    model = bench.model
    about = {
        "model": model.classifier.name,
        "model_arguments": {"input_shape": list(bench.images.shape[1:])},
        "num_classes": model.num_classes(bench.images),
        "parameters": model.classifier.count_params(),
        "weights_sha256": model.fingerprint().hex(),
    }
    return about if model.own_bounds == UNIT else {**about, "bounds": list(model.own_bounds)}


def _libraries(chosen: Sequence[Trial]) -> list[str]:
    """The libraries whose attacks are among the trials."""
    homes = attacks.TENSORFLOW_ATTACKS
    names = {type(trial.attack).__name__ for trial in chosen}
    return sorted({homes[name] for name in names & homes.keys()})
