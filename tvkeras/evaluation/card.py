"""The evaluation card: figures that were measured, as dataclasses and JSON."""

import dataclasses
import json
import math
import os
import pathlib
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

SCHEMA = 5
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

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({self.n:,} images)"


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check of an audit found.

    Attributes:
        name: Of the function that made it.
        status: "pass", "warn" or "fail".
        figure: What was measured; None where that is no finite number.
        advice: What it means and what to do where it is no pass; one sentence.
    """

    name: str
    status: str
    figure: float | None
    advice: str


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
        norm: Threat norm, whose dual measures the gradients.
    """

    statistic: str
    threshold: float
    held_out_images: int
    false_positive_rate: Rate
    detected: dict[str, Rate]
    at: dict[str, dict[str, float]]
    median_distance: dict[str, float]
    evasive_success: Rate
    norm: str = "l2"


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
        verdict: "reliable", "unreliable" where any check fails (then no robust accuracy
            that these attacks measured may be quoted), or "not audited".
        images: How many of the first test images it looked at.
        surrogate: Name of the model whose adversarial images were tried too, if any.
        checks: In the order they were made.
        beyond: `margin_loss` counts images that "PGD" alone misses, or the "worst case"
            over the card's attacks.
    """

    norm: str
    verdict: str
    images: int
    surrogate: str | None
    checks: tuple[Check, ...]
    beyond: str = "PGD"

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
        training: Defence (as Keras serialises it), data set, epochs and the like, from the run
            folder; may be empty.
        dataset: Name and split of the test images.
        seed: Of the attacks.
        clean_error: On all test images.
        gradient_norms: Mean and maximum over the test images: `loss` is
            ||grad l||_2 at the true label, `model`, if measured, ||grad f||_{2,inf}.
        attacks: One report for each attack.
        worst_case: One for each norm.
        audit: One for each norm, if it was made.
        detection: One for each statistic, if held-out images were given.
        bounds: One for each kind and norm.
        figures: File beside the card, by caption: "distances.png" and the like.
        versions: Of the packages.
        note: What a reader should know besides the figures, such as why they fall short.
        corruption_error: On the clean test images, spoiled without malice, by corruption.
        suite: Of the attacks: a name of `trials.SUITES`, or "custom".
        schema: Version of this format.
        files: What writes each figure, and the table of examples, by file name; none for
            a card that was read. No part of the JSON.

    Raises:
        ValueError: If a figure is another kind of file, or elsewhere.
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
    corruption_error: dict[str, Rate] = dataclasses.field(default_factory=dict)
    suite: str = ""
    schema: int = SCHEMA
    files: Mapping[str, Callable[[pathlib.Path], Any]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Checks the files that are copied with the card."""
        for file in self.figures.values():
            if not re.fullmatch(r"[a-z0-9_]+\.png", file):
                raise ValueError(
                    "figures must be files beside the card, lower-case letters, digits and '_' "
                    f"before '.png', got {file!r}."
                )

    @property
    def unreliable(self) -> bool:
        """Whether the audit found that the attacks miss adversarial images."""
        return any(report.verdict == "unreliable" for report in self.audit)

    @property
    def defense(self) -> str:
        """The defence of `training`, as Python calls it."""
        stored = self.training["defense"]
        arguments = ", ".join(f"{name}={value!r}" for name, value in stored["config"].items())
        return f"{stored['class_name']}({arguments})"

    def __str__(self) -> str:
        """A short table."""
        rows = [("clean error", f"{self.clean_error}{f', {self.dataset}' * bool(self.dataset)}")]
        for worst in self.worst_case:
            rows += [
                (f"error at {worst.norm} {epsilon}", f"{error}, worst case over attacks")
                for epsilon, error in worst.error.items()
            ]
            if worst.median_distance is not None:
                rows.append((f"median {worst.norm} distance", f"{worst.median_distance:.3g}"))
        for report in self.audit:
            failed = ", ".join(report.named("fail"))
            rows.append((f"audit ({report.norm})", f"{report.verdict}{failed and f': {failed}'}"))
        rows += [
            (
                f"detector ({report.statistic})",
                f"rejects {report.false_positive_rate} without an attack; evaded on "
                f"{report.evasive_success}",
            )
            for report in self.detection
        ]
        width = max(len(label) for label, _ in rows) + 2
        return "\n".join([self.name, *(f"  {label:<{width}}{text}" for label, text in rows)])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `card.json`, its page `README.md`, and what else was measured with it.

        That is `examples.csv`, image by image, and the figures. A card that was read has
        neither: copy them.
        """
        from tvkeras.evaluation import page  # it needs the card, and Jinja

        target = pathlib.Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for file, write in self.files.items():
            write(target / file)
        page.write(self, target)

    def to_json(self) -> str:
        """The card as JSON text; `from_json` is the inverse."""
        content = dataclasses.asdict(dataclasses.replace(self, files={}))
        del content["files"]
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Reads a card.

        Raises:
            ValueError: If the text is of another format, or a figure elsewhere.
        """
        content = json.loads(text)
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"the card has schema={schema!r}, this tvkeras reads {SCHEMA}. "
                "Use the tvkeras that wrote it, or run the evaluation again: results of attacks "
                "that it kept are used."
            )
        card: Card = _read(cls, content, "card")
        return card


def _read(kind: Any, value: Any, where: str) -> Any:
    """JSON's value as a type that fields of `Card` have.

    Raises:
        ValueError: If it is of another; `where` is named.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # with None
        return None if value is None else _read(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {
            name: _read(arguments[1], part, f"{where}[{name!r}]") for name, part in value.items()
        }
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        make: Any = kind
        kinds = typing.get_type_hints(kind)
        unset = dataclasses.MISSING
        fields = dataclasses.fields(kind)
        needed = {f.name for f in fields if f.default is unset and f.default_factory is unset}
        if not needed <= value.keys() <= kinds.keys():
            raise ValueError(f"{where} must have {sorted(needed)}, got {sorted(value)}.")
        return make(**{name: _read(kinds[name], value[name], f"{where}.{name}") for name in value})
    if kind in (int, float):
        if isinstance(value, int) or (kind is float and isinstance(value, float)):
            if not isinstance(value, bool) and math.isfinite(value):
                return value
    elif kind is Any or (kind is str and isinstance(value, str)):
        return value
    raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r}.")


def find(folder: pathlib.Path) -> Card | None:
    """The card of a run folder, an evaluation's or a zoo entry's, if there is one."""
    for path in (folder / "evaluation" / "card.json", folder / "card.json"):
        if path.exists():
            return Card.from_json(path.read_text(encoding="utf-8"))
    return None
