"""The evaluation card: figures that were measured, as JSON, and a page made of them."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from tvkeras.evaluation import suite
from tvkeras.evaluation.case import Check
from tvkeras.evaluation.suite import Outcome

SCHEMA = 3  # 1 had no audit, 2 no note
READABLE = (2, 3)
EVASIVE = "evasive"  # name of the attack that is made for one threshold of the detector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of examples, with its 95 % Wilson interval.

    Attributes:
        value: In [0, 1].
        low: Lower end of the interval.
        high: Upper end.
        n: Number of examples.
    """

    value: float
    low: float
    high: float
    n: int


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackReport:
    """What one attack found.

    Attributes:
        name: The trial's.
        settings: The attack with all its arguments.
        norm: Norm of its perturbations.
        error: By radius as text: share of examples misclassified within it. For an
            attack that looks for the smallest perturbation: at the card's radii.
        median_distance: Half of the examples have an adversarial image at most this
            far; None if fewer than half, or for an attack at fixed radii.
        median_queries: Model calls, over the attacked examples that were right.
    """

    name: str
    settings: str
    norm: str
    error: dict[str, Rate]
    median_distance: float | None
    median_queries: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorstCase:
    """What all attacks in one norm found together: an example falls if any breaks it.

    Attributes:
        norm: Norm of the perturbations.
        clean_error: Share of the same examples misclassified without an attack.
        error: Share of examples misclassified, by radius as text.
        median_distance: As in `AttackReport`, over all attacks.
    """

    norm: str
    clean_error: Rate
    error: dict[str, Rate]
    median_distance: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionReport:
    """What a `GradientNormDetector` notices.

    Attributes:
        statistic: "loss" or "model".
        threshold: Rejected from this size on.
        held_out_images: How many clean training images it was chosen on.
        false_positive_rate: Share of clean test images rejected.
        detected: By attack: share of its adversarial images rejected at that threshold.
        at: By attack other than the evasive one, then by false-positive rate on the test
            images as text: the share rejected.
        median_distance: By attack, l2 distance of its adversarial images.
        evasive_success: Share of images for which the evasive attack found a
            misclassified one that is not rejected.
    """

    statistic: str
    threshold: float
    held_out_images: int
    false_positive_rate: Rate
    detected: dict[str, Rate]
    at: dict[str, dict[str, float]]
    median_distance: dict[str, float]
    evasive_success: Rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundReport:
    """A lower bound on distances, over the attacked images.

    Attributes:
        kind: "estimated", "probabilistic" or "certified".
        norm: Norm of the radius.
        median_radius: Of all images; 0 where nothing is claimed.
        error: By radius as text: share of images not proved right within it.
        assumptions: What the claim takes for granted.
    """

    kind: str
    norm: str
    median_radius: float
    error: dict[str, float]
    assumptions: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What `evaluation.audit` says of the attacks in one norm.

    Attributes:
        norm: Norm of the perturbations.
        verdict: "reliable", "unreliable" or "not audited".
        images: How many of the first test images it looked at.
        surrogate: Name of the model whose adversarial images were tried too, if any.
        checks: In the order they were made.
    """

    norm: str
    verdict: str
    images: int
    surrogate: str | None
    checks: tuple[Check, ...]

    def named(self, status: str) -> list[str]:
        """Names of the checks of one status."""
        return [check.name for check in self.checks if check.status == status]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """All that was measured on one model, with what it takes to measure it again.

    Attributes:
        name: The model's.
        command: The command that made the card.
        model: What was measured: builder, arguments, parameters, sha256 of the weights.
        training: Defence, data set, epochs and the like, from the run folder.
        dataset: Name and split of the test images.
        seed: Of the attacks.
        clean_error: On all test images.
        gradient_norms: Mean and maximum over the test images: `loss` is
            ||grad l||_2 at the true label, `model` ||grad f||_{2,inf}.
        attacks: One report for each attack.
        worst_case: One for each norm.
        audit: One for each norm.
        detection: One for each statistic.
        bounds: One for each kind.
        figures: File beside the card, by caption.
        versions: Of the packages.
        note: What a reader should know besides the figures, such as why they fall short.
        schema: Version of this format.
    """

    name: str
    command: str
    model: dict[str, Any]
    training: dict[str, Any]
    dataset: str
    seed: int
    clean_error: Rate
    gradient_norms: dict[str, dict[str, float]]
    attacks: tuple[AttackReport, ...]
    worst_case: tuple[WorstCase, ...]
    audit: tuple[AuditReport, ...]
    detection: tuple[DetectionReport, ...]
    bounds: tuple[BoundReport, ...]
    figures: dict[str, str]
    versions: dict[str, str]
    note: str = ""
    schema: int = SCHEMA

    @property
    def unreliable(self) -> bool:
        """Whether the audit found that the attacks miss adversarial images."""
        return any(report.verdict == "unreliable" for report in self.audit)

    def to_json(self) -> str:
        """The card as JSON text; `from_json` is the inverse."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Reads a card.

        Raises:
            ValueError: If the text is of another format.
        """
        content = json.loads(text)
        if content.get("schema") not in READABLE:
            raise ValueError(
                f"the card has schema={content.get('schema')!r}, this tvkeras reads {READABLE}. "
                "Use the tvkeras that wrote it, or run the evaluation again: results of attacks "
                "that it kept are used."
            )
        content["clean_error"] = Rate(**content["clean_error"])
        for report in content["audit"]:
            report["checks"] = tuple(Check(**check) for check in report["checks"])
        for field, kind in _PARTS.items():
            content[field] = tuple(kind(**_rates(part)) for part in content[field])
        return cls(**content)


_PARTS: dict[str, Any] = {
    "attacks": AttackReport,
    "worst_case": WorstCase,
    "audit": AuditReport,
    "detection": DetectionReport,
    "bounds": BoundReport,
}


def _rates(content: Any) -> Any:
    """JSON content with `Rate` wherever one was written."""
    if not isinstance(content, dict):
        return content
    if content.keys() == {field.name for field in dataclasses.fields(Rate)}:
        return Rate(**content)
    return {name: _rates(value) for name, value in content.items()}


def attack_report(outcome: Outcome, epsilons: Sequence[float | str]) -> AttackReport:
    """Sums up one trial; `epsilons` are the card's radii in its norm."""
    attack = outcome.trial.attack
    if attack.fixed_epsilon:
        error = {radius: rate(result.success) for radius, result in outcome.results.items()}
    else:
        error = {str(e): rate(suite.broken(outcome.distance, e)) for e in epsilons}
    queries = np.concatenate([result.queries for result in outcome.results.values()])
    asked = queries[queries > 0]
    return AttackReport(
        name=outcome.trial.name,
        settings=str(attack),
        norm=attack.norm,
        error=error,
        median_distance=None if attack.fixed_epsilon else _median(outcome.distance),
        median_queries=float(np.median(asked)) if len(asked) else 0.0,
    )


def worst_case_report(
    outcomes: Sequence[Outcome], norm: str, epsilons: Sequence[float | str]
) -> WorstCase:
    """Sums up all trials in one norm."""
    distances = suite.worst_case(outcomes, norm)
    fixed_only = all(o.trial.attack.fixed_epsilon for o in outcomes if o.trial.attack.norm == norm)
    return WorstCase(
        norm=norm,
        clean_error=rate(suite.broken(distances, 0)),
        error={str(e): rate(suite.broken(distances, e)) for e in epsilons},
        median_distance=None if fixed_only else _median(distances),
    )


def _median(distances: np.ndarray) -> float | None:
    middle = float(np.median(distances))
    return middle if math.isfinite(middle) else None


# ---- The page --------------------------------------------------------------------------


def render(card: Card) -> str:
    """The card as Markdown, with the metadata that model hubs read."""
    lines = [
        *_metadata(card),
        f"# {card.name}" + (": unreliable" if card.unreliable else ""),
        "",
        *_warning(card),
        *_introduction(card),
        *_worst_case(card),
        *_audit(card),
        *_attacks(card),
        *_gradients(card),
        *_detection(card),
        *_bounds(card),
    ]
    for caption, file in card.figures.items():
        lines += [f"![{caption}]({file})", "", f"*{caption}*", ""]
    lines += ["## How it was made", "", "```", card.command, "```", ""]
    about = {**card.training, **card.model, **card.versions, "seed": card.seed}
    lines += [f"- {name}: `{value}`" for name, value in about.items()]
    return "\n".join(lines) + "\n"


def _warning(card: Card) -> list[str]:
    """What an unreliable card says before anything else."""
    if not card.unreliable:
        return []
    failed = [f"`{name}` ({report.norm})" for report in card.audit for name in report.named("fail")]
    return [
        "> **Unreliable: quote no robust accuracy of this page.** The audit failed: "
        f"{', '.join(failed)}. The attacks miss adversarial images that exist, or cannot be "
        "trusted to report them.",
        "",
    ]


def _introduction(card: Card) -> list[str]:
    about = card.model
    shape = about["model_arguments"].get("input_shape")
    return [
        f"`{about['model']}`, {about['parameters']:,} parameters, trained for "
        f"{card.training['epochs']} epochs on {card.training['dataset']} with "
        f"`{card.training['defense']}`.",
        "",
        f"Input: float32 images in [0, 1]{f' of shape {tuple(shape)}' if shape else ''}; any "
        f"normalisation is inside the model. Output: logits of {about['num_classes']} classes. "
        "Radii (ε) and distances are in units of the pixels.",
        "",
        f"Clean error: **{_percent(card.clean_error)} %** on {card.clean_error.n:,} images of "
        f"{card.dataset}. Attacks meet the first of these images, as many as each table says; "
        f"seed {card.seed}. Errors are in % of images; in parentheses 95 % Wilson intervals, for "
        "the choice of test images alone.",
        "",
        *([card.note, ""] if card.note else []),
    ]


def _worst_case(card: Card) -> list[str]:
    lines = [
        "## Worst case over the attacks",
        "",
        "The figure to quote. An image counts as soon as any attack in the norm breaks it, or if "
        "it is misclassified without (ε = 0); over the first images, those that all of the "
        "attacks met. Other attacks may find more.",
        "",
    ]
    for worst in card.worst_case:
        lines += table(
            [worst.norm, "ε = 0", *(f"ε = {e}" for e in worst.error), "median distance", "images"],
            [
                [
                    "error, %",
                    *map(_percent, (worst.clean_error, *worst.error.values())),
                    number(worst.median_distance),
                    f"{worst.clean_error.n:,}",
                ]
            ],
        )
    return lines


def _audit(card: Card) -> list[str]:
    """The verdict of each norm, a table of the checks, and advice on those that do not pass."""
    audited = [report for report in card.audit if report.checks]
    lines = ["## Can these errors be believed?", ""]
    lines += [f"- {report.norm}: **{report.verdict}**{_counts(report)}" for report in card.audit]
    lines += [""]
    if not audited:
        return lines
    surrogate = audited[0].surrogate
    lines += [
        "The audit checks classifier and attack, and compares 20-step PGD with other attacks"
        f"{f' and with adversarial images of {surrogate}' if surrogate else ''} on the first "
        f"{audited[0].images:,} images, for signs that the gradient misleads. `reliable` means "
        "that no check failed. Each figure is what the function of that name in "
        "`tvkeras.evaluation.sanity` or `tvkeras.evaluation.masking` says.",
        "",
    ]
    names = dict.fromkeys(check.name for report in audited for check in report.checks)
    rows = [[f"`{name}`", *(_figure(report, name) for report in audited)] for name in names]
    lines += table(["check", *(report.norm for report in audited)], rows)
    advice = [
        f"- `{check.name}` ({report.norm}, {check.status}): {check.advice}"
        for report in audited
        for check in report.checks
        if check.status != "pass"
    ]
    return [*lines, *advice, ""] if advice else lines


def _counts(report: AuditReport) -> str:
    if not report.checks:
        return ": the audit knows l2 and linf alone"
    counts = {status: len(report.named(status)) for status in ("pass", "warn", "fail")}
    return f" ({', '.join(f'{count} {status}' for status, count in counts.items() if count)})"


def _figure(report: AuditReport, name: str) -> str:
    for check in report.checks:
        if check.name == name:
            status = "" if check.status == "pass" else f" **{check.status}**"
            return f"{number(check.figure)}{status}"
    return ""


def _attacks(card: Card) -> list[str]:
    rows = [
        [
            report.name,
            report.norm,
            ", ".join(f"{100 * r.value:.1f} @ {e}" for e, r in report.error.items()),
            number(report.median_distance),
            f"{report.median_queries:.0f}",
            f"{next(iter(report.error.values())).n:,}",
        ]
        for report in card.attacks
    ]
    return [
        "## Attack by attack",
        "",
        "Median distance: half of the images have an adversarial one at most that far away, 0 if "
        "they are misclassified without; for attacks that look for the nearest. Queries: calls of "
        "the model for an image that is classified rightly, a gradient counted as one.",
        "",
        *table(
            ["attack", "norm", "error, % @ ε", "median distance", "median queries", "images"], rows
        ),
        *(f"- {report.name}: `{report.settings}`" for report in card.attacks),
        "",
    ]


def _gradients(card: Card) -> list[str]:
    names = {
        "loss": "‖∇loss‖2, at the true label",
        "model": "‖∇f‖2,∞, the longest gradient of a probability",
    }
    rows = [
        [name, f"{card.gradient_norms[key]['mean']:.3f}", f"{card.gradient_norms[key]['max']:.2f}"]
        for key, name in names.items()
    ]
    heading = f"over {card.clean_error.n:,} images"
    return ["## Gradients", "", *table([heading, "mean", "maximum"], rows)]


def _detection(card: Card) -> list[str]:
    lines = ["## Detection by gradient norm", ""] if card.detection else []
    for report in card.detection:
        lines += [
            f"Statistic `{report.statistic}`: images of a norm from {report.threshold:.4g} on are "
            f"rejected, chosen on {report.held_out_images:,} held-out training images; of "
            f"{report.false_positive_rate.n:,} clean test images that is "
            f"{_percent(report.false_positive_rate)} %. The evasive attack, which knows the "
            "detector, finds a misclassified image that is not rejected for "
            f"{_percent(report.evasive_success)} % of {report.evasive_success.n:,} images; made "
            "for this threshold, it says nothing of others. The table is over the adversarial "
            "images found.",
            "",
        ]
        rates = " / ".join(f"{100 * float(r):.0f}" for r in next(iter(report.at.values()), ()))
        lines += table(
            [
                "attack",
                "rejected, %",
                f"at {rates} % false positives",
                "median l2 distance",
                "adversarial images",
            ],
            [
                [
                    name,
                    _percent(found),
                    "-"
                    if name == EVASIVE
                    else " / ".join(f"{100 * value:.0f}" for value in report.at[name].values()),
                    number(report.median_distance[name]),
                    f"{found.n:,}",
                ]
                for name, found in report.detected.items()
            ],
        )
    return lines


def _bounds(card: Card) -> list[str]:
    rows = [
        [
            report.kind,
            report.norm,
            f"{report.median_radius:.3g}",
            ", ".join(f"{100 * value:.1f} @ {e}" for e, value in report.error.items()),
            report.assumptions,
        ]
        for report in card.bounds
    ]
    return [
        "## Bounds",
        "",
        "Radii within which no attack should succeed, over the attacked images: only a certified "
        "one is proved.",
        "",
        *table(
            ["kind", "norm", "median radius", "error at most, % @ ε", "takes for granted"], rows
        ),
    ]


def find(folder: pathlib.Path) -> Card | None:
    """The card of a run folder, an evaluation's or a zoo entry's, if there is one."""
    for path in (folder / "evaluation" / "card.json", folder / "card.json"):
        if path.exists():
            return Card.from_json(path.read_text())
    return None


def write(card: Card, folder: pathlib.Path) -> None:
    """Writes `card.json` and `README.md` into a folder."""
    (folder / "card.json").write_text(card.to_json())
    (folder / "README.md").write_text(render(card))


def _metadata(card: Card) -> list[str]:
    """Front matter in the form of Hugging Face's `model-index`."""
    lines = ["---", "library_name: keras", "tags: [adversarial-robustness, tvkeras]"]
    lines += ["model-index:", f"- name: {json.dumps(card.name)}", "  results:"]
    lines += ["  - task: {type: image-classification}"]
    lines += [
        f"    dataset: {{name: {card.training['dataset']}, type: {card.training['dataset']}}}"
    ]
    lines += [
        "    metrics:",
        "    - type: accuracy",
        f"      value: {1 - card.clean_error.value:.4f}",
    ]
    for worst in card.worst_case:
        for epsilon, error in worst.error.items():
            name = f"worst case over attacks, {worst.norm} {epsilon}, first {error.n} images"
            lines += [
                "    - type: robust_accuracy",
                f"      name: {name}{' (unreliable)' if card.unreliable else ''}",
                f"      value: {1 - error.value:.4f}",
            ]
    return [*lines, "---", ""]


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    lines = [heading, ["---"] * len(heading), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _percent(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f}-{100 * rate.high:.1f})"


def number(value: float | None) -> str:
    """Three significant digits; "-" for what was not measured."""
    return "-" if value is None else f"{value:.3g}"
