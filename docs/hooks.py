"""MkDocs hooks: the zoo's figures and table on the pages, and the main pages as notebooks."""

import json
import pathlib
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = {"index.md": "start.ipynb", "defend.md": "defend.ipynb", "judge.md": "judge.ipynb"}
SHOWN_NORMS = {"l1": "ℓ1", "l2": "ℓ2", "linf": "ℓ∞"}  # noqa: RUF001
ZOO_TABLE = "<!-- zoo-table -->"
_FOLDED = re.compile(r'^(?:\?\?\?\+?|!!!) \w+ "(.*)"\n((?:(?:    .*)?\n)+)', re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the zoo's figures, and a notebook for each main page."""
    for figure in sorted(ROOT.glob("zoo/*/*.png")):
        uri = figure.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(figure)))
    for page, name in NOTEBOOKS.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=notebook(text)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links a main page to its notebook, and puts the zoo's table where a page asks for it."""
    if name := NOTEBOOKS.get(page.file.src_uri):
        markdown += f"\n\n---\n\nTo run: [this page as a notebook]({name}).\n"
    if ZOO_TABLE in markdown:
        cards = [json.loads(path.read_text()) for path in sorted(ROOT.glob("zoo/*/card.json"))]
        markdown = markdown.replace(ZOO_TABLE, "\n".join(zoo_tables(cards)))
    return markdown


def notebook(markdown: str) -> str:
    """A page as the JSON of a notebook: a cell for each `python` and `bash` block."""
    unfolded = _FOLDED.sub(lambda m: f"**{m[1]}**\n\n{textwrap.dedent(m[2])}\n", f"{markdown}\n")
    return jupytext.writes(jupytext.reads(unfolded, fmt="md"), fmt="ipynb")


def zoo_tables(cards: Sequence[dict[str, Any]]) -> list[str]:
    """Errors of the zoo's entries in %, a table for each test set: lines of Markdown."""
    lines: list[str] = []
    for dataset in sorted({card["dataset"] for card in cards}):
        ours = [card for card in cards if card["dataset"] == dataset]
        errors = [_errors(card) for card in ours]
        columns = dict.fromkeys(radius for found in errors for radius in found)
        lines += ["", f"**{dataset}**", "", f"| name | {' | '.join(columns)} | parameters |"]
        lines += ["| --- |" + " ---: |" * (1 + len(columns))]
        for card, found in zip(ours, errors, strict=True):
            cells = " | ".join(found.get(radius, "-") for radius in columns)
            lines.append(f"| `{card['name']}` | {cells} | {card['model']['parameters']:,} |")
    return lines


def _errors(card: dict[str, Any]) -> dict[str, str]:
    """Clean and worst-case error by what a column is called."""
    found = {"clean": card["clean_error"]["value"]}
    for worst in card["worst_case"]:
        for radius, error in worst["error"].items():
            found[f"{SHOWN_NORMS.get(worst['norm'], worst['norm'])} {radius}"] = error["value"]
    return {name: f"{100 * value:.1f}" for name, value in found.items()}
