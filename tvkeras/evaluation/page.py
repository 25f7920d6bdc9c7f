"""The card as a page: Markdown made of its figures.

A card may be anybody's: its texts stay texts, whatever they hold (`text`, `code`).
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from tvkeras.evaluation.card import EVASIVE, AuditReport, Card, Rate


def write(card: Card, folder: pathlib.Path) -> None:
    """Writes `card.json` and its page, `README.md`, into a folder."""
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(render(card), encoding="utf-8")


def render(card: Card) -> str:
    """The card as Markdown, with the metadata that model hubs read."""
    return "\n".join(_metadata(card)) + "\n" + body(card)


def body(card: Card) -> str:
    """The card as Markdown, without metadata."""
    lines = [
        f"# {text(card.name)}" + (": unreliable" if card.unreliable else ""),
        "",
        *_warning(card),
        *_introduction(card),
        *_worst_case(card),
        *_corruptions(card),
        *_audit(card),
        *_attacks(card),
        *_gradients(card),
        *_detection(card),
        *_bounds(card),
    ]
    for caption, file in card.figures.items():
        lines += [f"![{text(caption)}]({file})", "", f"*{text(caption)}*", ""]
    fence = "`" * max(3, _longest_run(card.command) + 1)
    lines += ["## How it was made", "", fence, card.command, fence, ""]
    about = {**card.training, **card.model, **card.versions, "seed": card.seed}
    lines += [f"- {text(name)}: {code(value)}" for name, value in about.items()]
    return "\n".join(lines) + "\n"


def _warning(card: Card) -> list[str]:
    """What an unreliable card says before anything else."""
    if not card.unreliable:
        return []
    failed = [
        f"{code(name)} ({text(report.norm)})"
        for report in card.audit
        for name in report.named("fail")
    ]
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
        f"{code(about['model'])}, {about['parameters']:,} parameters, trained for "
        f"{text(card.training['epochs'])} epochs on {text(card.training['dataset'])} with "
        f"{code(card.training['defense'])}.",
        "",
        f"Input: float32 images in [0, 1]{f' of shape {text(tuple(shape))}' if shape else ''}; any "
        "normalisation is inside the model. Output: logits of "
        f"{text(about['num_classes'])} classes. Radii (ε) and distances are in units of the "
        "pixels.",
        "",
        f"Clean error: **{_percent(card.clean_error)} %** on {card.clean_error.n:,} images of "
        f"{text(card.dataset)}. Attacks meet the first of these images, as many as each table "
        f"says; seed {card.seed}. Errors are in % of images; in parentheses 95 % Wilson "
        "intervals, for the choice of test images alone.",
        "",
        *([_THREAT, ""] if card.schema > _BEFORE_THREATS else []),
        *([text(card.note), ""] if card.note else []),
    ]


_BEFORE_THREATS = 3  # pages of cards up to this schema stay as they were published
_THREAT = (
    "Threat model: the attacker knows the model and its weights, chooses any change of an image "
    "that is at most ε long in the norm named and keeps its pixels in [0, 1], and wants any wrong "
    "class. Attacks on decisions or scores alone know less; they are there to find gradients that "
    "mislead."
)


def _worst_case(card: Card) -> list[str]:
    lines = [
        "## Worst case over the attacks",
        "",
        "The figure to quote. An image counts as soon as any attack in the norm breaks it, or if "
        "it is misclassified without (ε = 0); over the first images, those that all of the "
        f"attacks met. {_fewer(card)}Other attacks may find more.",
        "",
    ]
    for worst in card.worst_case:
        lines += table(
            [
                text(worst.norm),
                *(f"ε = {text(radius)}" for radius in (0, *worst.error)),
                "median distance",
                "images",
            ],
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


def _fewer(card: Card) -> str:
    """Names the supplementary attacks."""
    counts = {worst.norm: worst.clean_error.n for worst in card.worst_case}
    named = [
        f"{text(report.name)} met {rate.n} of them, and counts there. "
        for report in card.attacks
        for rate in list(report.error.values())[:1]
        if rate.n < counts.get(report.norm, 0)
    ]
    return "".join(named)


def _corruptions(card: Card) -> list[str]:
    if not card.corruption_error:
        return []
    return [
        "## Without an attacker",
        "",
        f"Error on the {card.clean_error.n:,} clean images after a corruption of middling "
        "strength; a defence against small perturbations need not help here.",
        "",
        *table(
            ["corruption", "error, %"],
            [[text(name), _percent(error)] for name, error in card.corruption_error.items()],
        ),
    ]


def _audit(card: Card) -> list[str]:
    """The verdict of each norm, a table of the checks, and advice on those that do not pass."""
    audited = [report for report in card.audit if report.checks]
    lines = ["## Can these errors be believed?", ""]
    lines += [
        f"- {text(report.norm)}: **{text(report.verdict)}**{_counts(report)}"
        for report in card.audit
    ]
    lines += [""]
    if not audited:
        return lines
    surrogate = audited[0].surrogate
    lines += [
        "The audit checks classifier and attack, and compares 20-step PGD with other attacks"
        f"{f' and with adversarial images of {text(surrogate)}' if surrogate else ''} on the first "
        f"{audited[0].images:,} images, for signs that the gradient misleads. `reliable` means "
        "that no check failed. Each figure is what the function of that name in "
        "`tvkeras.evaluation.sanity` or `tvkeras.evaluation.masking` says.",
        "",
    ]
    names = dict.fromkeys(check.name for report in audited for check in report.checks)
    rows = [
        [code(name).replace("|", "\\|"), *(_figure(report, name) for report in audited)]
        for name in names
    ]
    lines += table(["check", *(text(report.norm) for report in audited)], rows)
    advice = [
        f"- {code(check.name)} ({text(report.norm)}, {text(check.status)}): {text(check.advice)}"
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
            status = "" if check.status == "pass" else f" **{text(check.status)}**"
            return f"{number(check.figure)}{status}"
    return ""


def _attacks(card: Card) -> list[str]:
    rows = [
        [
            text(report.name),
            text(report.norm),
            ", ".join(f"{100 * r.value:.1f} @ {text(e)}" for e, r in report.error.items()),
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
        *(f"- {text(report.name)}: {code(report.settings)}" for report in card.attacks),
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
            f"Statistic {code(report.statistic)}: images of a norm from {report.threshold:.4g} on "
            f"are rejected, chosen on {report.held_out_images:,} held-out training images; of "
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
                    text(name),
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
            text(report.kind),
            text(report.norm),
            f"{report.median_radius:.3g}",
            ", ".join(f"{100 * value:.1f} @ {text(e)}" for e, value in report.error.items()),
            text(report.assumptions),
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


def _metadata(card: Card) -> list[str]:
    """Front matter in the form of Hugging Face's `model-index`."""
    lines = ["---", "library_name: keras", "tags: [adversarial-robustness, tvkeras]"]
    lines += ["license: apache-2.0"] if card.schema > _BEFORE_THREATS else []
    lines += ["model-index:", f"- name: {json.dumps(card.name)}", "  results:"]
    lines += ["  - task: {type: image-classification}"]
    dataset = _scalar(str(card.training["dataset"]), r"\w+")
    lines += [f"    dataset: {{name: {dataset}, type: {dataset}}}"]
    lines += [
        "    metrics:",
        "    - type: accuracy",
        f"      value: {1 - card.clean_error.value:.4f}",
    ]
    for worst in card.worst_case:
        for epsilon, error in worst.error.items():
            name = f"worst case over attacks, {worst.norm} {epsilon}, first {error.n} images"
            name += " (unreliable)" if card.unreliable else ""
            lines += [
                "    - type: robust_accuracy",
                "      name: " + _scalar(name, r"[\w ,./()]+"),
                f"      value: {1 - error.value:.4f}",
            ]
    return [*lines, "---", ""]


def _scalar(content: str, plain: str) -> str:
    """A text in YAML: in quotation marks, unless it is made like `plain`."""
    return content if re.fullmatch(plain, content) else json.dumps(content)


def text(value: Any) -> str:
    """What a card says, on one line, without the characters that make links, HTML or code."""
    line = " ".join(str(value).split())
    return re.sub(r"[\\`\[\]<>|~*#&]", lambda found: f"&#{ord(found[0])};", line)


def code(value: Any) -> str:
    """What a card says, as code that ends nowhere inside of it."""
    line = " ".join(str(value).split()) or " "
    ticks = "`" * (_longest_run(line) + 1)
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def _longest_run(line: str) -> int:
    """How many backticks follow one another."""
    return max(map(len, re.findall("`+", line)), default=0)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    lines = [heading, ["---"] * len(heading), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _percent(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f}-{100 * rate.high:.1f})"


def number(value: float | None) -> str:
    """Three significant digits; "-" for what was not measured."""
    return "-" if value is None else f"{value:.3g}"
