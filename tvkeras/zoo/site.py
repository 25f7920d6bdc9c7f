"""A static leaderboard of the zoo: pages made of the cards, which need no server.

The templates are in `tvkeras/zoo/templates`; an entry's page is its card's own page as HTML.
"""

import math
import pathlib
import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2
import markdown
import markupsafe
import nh3

from tvkeras import checks, zoo
from tvkeras.evaluation import page
from tvkeras.evaluation.card import Card, WorstCase
from tvkeras.evaluation.scatter import scatter
from tvkeras.zoo import store

STATIC_FILES = ("site.css", "site.js")

# What Markdown makes of a card's page; neither links nor styles are among it.
_TAGS = {
    *("h1", "h2", "p", "blockquote", "ul", "li", "pre", "code", "em", "strong", "img"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
_SCROLLED = '<div class="wide" role="region" aria-label="table" tabindex="0">'
# The audit's verdicts, and what they rest on.
_AUDIT = re.compile(
    r"(<h2>Can these errors be believed\?</h2>\s*<ul>.*?</ul>)(.*?)(?=<h2>)", re.DOTALL
)
_FOLDER = pathlib.Path(__file__).with_name("templates")
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def build(names: Sequence[str], output: pathlib.Path) -> pathlib.Path:
    """Writes the pages of some entries: a leaderboard, and a page for each.

    An entry that cannot be shown, being damaged, is named in a warning and on the
    leaderboard, and the others are shown.

    Args:
        names: Of entries; their cards and figures are fetched.
        output: The folder to write into; what else is in it stays.

    Returns:
        The leaderboard, to open in a browser.

    Raises:
        ValueError: For no entries, or an unknown one.
        OSError: If `output` cannot be written.
    """
    if not names:
        raise ValueError(f"names must hold an entry of the zoo, got none of {[*store.index()]}.")
    for name in names:
        checks.one_of("a name", name, store.index())
    output.mkdir(parents=True, exist_ok=True)
    for file in STATIC_FILES:
        shutil.copyfile(_FOLDER / file, output / file)
    cards, damaged = [], {}
    for name in names:
        try:
            about, entry, text = _page(name)
            leaderboard([about])
        except Exception as error:  # whatever is wrong with one, the others are shown
            damaged[name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"zoo entry {name!r} is left out: {damaged[name]}", stacklevel=2)
            continue
        cards.append(about)
        (output / name).mkdir(exist_ok=True)
        (output / name / "index.html").write_text(text, encoding="utf-8")
        for file in ("card.json", *about.figures.values()):
            shutil.copyfile(entry / file, output / name / file)
    (output / "index.html").write_text(leaderboard(cards, damaged), encoding="utf-8")
    return output / "index.html"


def leaderboard(cards: Sequence[Card], damaged: Mapping[str, str] | None = None) -> str:
    """The page of tables that `tables` describes, as HTML.

    Args:
        cards: What to show.
        damaged: What is wrong with entries that are left out, by name.
    """
    template = _TEMPLATES.get_template("leaderboard.html")
    return template.render(tables=tables(cards), cards=cards, damaged=damaged or {})


def _page(name: str) -> tuple[Card, pathlib.Path, str]:
    """An entry's card, the folder of its figures, and its page."""
    about = zoo.card(name)
    if about.name != name:  # it would be linked under that
        raise ValueError(f"its card is that of {about.name!r}.")
    entry = store.folder(name, "card.json", *about.figures.values())
    template = _TEMPLATES.get_template("model.html")
    return (
        about,
        entry,
        template.render(card=about, body=as_html(page.body(about), about.figures.values())),
    )


def tables(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """What the leaderboard shows: a table for each test set and norm.

    Returns:
        For each, `dataset`, `norm`, `radii` as text and ascending, a `scatter` of the
        errors, and `rows` of a `card`, its `worst` case in that norm, the audit's `verdict`
        on it, and the `attacks` that it is over: first those whose median distance is
        largest (beyond all radii, where the attacks broke fewer than half), unreliable
        ones last.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for about in cards:
        for worst in about.worst_case:
            verdicts = [r.verdict for r in about.audit if r.norm == worst.norm]
            row = {
                "card": about,
                "worst": worst,
                "verdict": (verdicts or ["not audited"])[0],
                "attacks": [r.name for r in about.attacks if r.norm == worst.norm],
            }
            groups.setdefault((about.dataset, worst.norm), []).append(row)
    return [
        {
            "dataset": dataset,
            "norm": norm,
            "radii": sorted({e for row in rows for e in row["worst"].error}, key=_by_size),
            "scatter": scatter([row["card"] for row in rows], norm, "{name}/index.html"),
            "rows": sorted(rows, key=_rank),
        }
        for (dataset, norm), rows in sorted(groups.items())
    ]


def _by_size(radius: str) -> tuple[float, str]:
    return checks.epsilon(radius), radius


def _rank(row: Mapping[str, Any]) -> tuple[bool, float, str]:
    worst: WorstCase = row["worst"]
    distance = worst.median_distance
    if distance is None:
        held = all(error.value < 0.5 for error in worst.error.values())
        distance = math.inf if held else 0.0  # attacks at fixed radii find no median
    return row["verdict"] == "unreliable", -distance, row["card"].name


def as_html(text: str, figures: Collection[str]) -> markupsafe.Markup:
    """Markdown as HTML, without what could do something: of images, `figures` alone."""
    converter = markdown.Markdown(extensions=["tables", "fenced_code"])
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    text = nh3.clean(
        converter.convert(text),
        tags=_TAGS,
        attributes={"img": {"alt", "src"}},
        attribute_filter=lambda _, name, value: (
            value if name == "alt" or value in figures else None
        ),
    )
    text = _AUDIT.sub(r"\1<details><summary>All checks</summary>\2</details>", text)
    text = text.replace("<table>", f"{_SCROLLED}<table>").replace("</table>", "</table></div>")
    return markupsafe.Markup(text)
