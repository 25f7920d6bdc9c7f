"""The card as a page: Markdown made of its figures by the templates beside.

A card may be anybody's: its texts stay texts, whatever they hold. What a template shows
passes through `text`, unless a filter marked it as Markdown.
"""

import functools
import json
import pathlib
import re
from typing import Any

import jinja2
from markupsafe import Markup

from tvkeras.evaluation.card import EVASIVE, AuditReport, Card, Rate

FIRST = ("distances.png", "examples.png")  # the figures to look at before any table


def write(card: Card, folder: pathlib.Path) -> None:
    """Writes `card.json` and its page, `README.md`, into a folder."""
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(render(card), encoding="utf-8")


def render(card: Card) -> str:
    """The card as Markdown, with the metadata that model hubs read."""
    return _TEMPLATES.get_template("metadata.yaml").render(card=card) + body(card)


def body(card: Card) -> str:
    """The card as Markdown, without metadata."""
    audited = [report for report in card.audit if report.checks]
    checks = [(report, check) for report in audited for check in report.checks]
    counts = {worst.norm: worst.clean_error.n for worst in card.worst_case}
    training = {**card.training, "defense": card.defense} if card.training else {}
    return _TEMPLATES.get_template("card.md").render(
        card=card,
        audited=audited,
        checks=checks,
        names=dict.fromkeys(check.name for _, check in checks),
        fewer=[r for r in card.attacks if next(iter(r.error.values())).n < counts.get(r.norm, 0)],
        above={caption: file for caption, file in card.figures.items() if file in FIRST},
        below={caption: file for caption, file in card.figures.items() if file not in FIRST},
        evasive=EVASIVE,
        counts=_counts,
        origin={**training, **card.model, **card.versions, "seed": card.seed},
    )


def text(value: Any) -> Markup:
    """What a card says, on one line, without the characters that make links, HTML or code."""
    line = " ".join(str(value).split())
    return Markup(re.sub(r"[\\`\[\]<>|~*#&]", lambda found: f"&#{ord(found[0])};", line))


def code(value: Any) -> Markup:
    """What a card says, as code that ends nowhere inside of it."""
    line = " ".join(str(value).split()) or " "
    ticks = "`" * (_longest_run(line) + 1)
    space = " " if len(ticks) > 1 else ""
    return Markup(f"{ticks}{space}{line}{space}{ticks}")


def number(value: float | None) -> str:
    """Three significant digits; "-" for what was not measured."""
    return "-" if value is None else f"{value:.3g}"


def _block(value: str) -> Markup:
    fence = "`" * max(3, _longest_run(value) + 1)
    return Markup(f"{fence}\n{value}\n{fence}")


def _longest_run(line: str) -> int:
    """How many backticks follow one another."""
    return max(map(len, re.findall("`+", line)), default=0)


def _percent(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f}-{100 * rate.high:.1f})"


def _counts(report: AuditReport) -> list[tuple[str, int]]:
    """How many checks are of each status that occurs."""
    counts = ((status, len(report.named(status))) for status in ("pass", "warn", "fail"))
    return [(status, count) for status, count in counts if count]


def _scalar(content: Any, plain: str) -> Markup:
    """A text in YAML: in quotation marks, unless it is made like `plain`."""
    fits = re.fullmatch(plain, str(content))
    return Markup(content) if fits else Markup(json.dumps(str(content)))


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
    finalize=lambda value: value if isinstance(value, Markup) else text(value),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,  # a card without a field is named, not half shown
)
_TEMPLATES.filters |= {
    "block": _block,
    "cell": lambda value: Markup(code(value).replace("|", "\\|")),
    "code": code,
    "count": "{:,}".format,
    "number": number,
    "percent": _percent,
    "plain": Markup,
    "quoted": lambda value: Markup(json.dumps(value)),
    "phrase": functools.partial(_scalar, plain=r"[\w ,./()]+"),
    "tuple": tuple,
    "word": functools.partial(_scalar, plain=r"\w+"),
}
