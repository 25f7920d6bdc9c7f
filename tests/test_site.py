import dataclasses
import html
import html.parser
import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.conftest import ROOT
from tvkeras import zoo
from tvkeras.evaluation import page
from tvkeras.evaluation.card import Rate
from tvkeras.evaluation.scatter import scatter
from tvkeras.zoo import site, store

SVG = "{http://www.w3.org/2000/svg}"


class Addresses(html.parser.HTMLParser):
    """Collects what a page refers to, and its images' captions."""

    def __init__(self, page):
        super().__init__()
        self.found, self.captions = [], []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.found += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img":
            self.captions.append(attributes["alt"])


def test_every_address_is_a_file_of_the_site(pages):
    for file in pages.rglob("*.html"):
        found = Addresses(file).found
        assert len(found) >= 3
        for address in found:
            assert (file.parent / address).resolve().is_relative_to(pages), address
            assert (file.parent / address).is_file(), address


def test_an_entry_has_its_figures_and_how_to_load_it(pages):
    for name in zoo.names():
        card, page = zoo.card(name), pages / name / "index.html"
        assert sorted(Addresses(page).captions) == sorted(card.figures)
        text = html.unescape(page.read_text())
        assert f'tvkeras.zoo.load("{name}")' in text
        assert "model-index" not in text
        for report in card.audit:
            assert f"{report.norm}: <strong>{report.verdict}</strong>" in text
        assert json.loads((pages / name / "card.json").read_text())["name"] == name


def test_checks_are_folded_under_the_verdict(pages):
    card = zoo.card("digits_tv_lip")
    shown, folded = (pages / card.name / "index.html").read_text().split("<details>")
    assert "<strong>reliable</strong>" in shown
    assert card.audit[0].checks[0].name not in shown
    assert card.audit[0].checks[0].name in folded.split("</details>")[0]


def test_a_scatter_has_a_point_for_each_card_with_the_radius():
    card = zoo.card("digits_tv_lip")
    (worst,) = (w for w in card.worst_case if w.norm == "l2")
    other = dataclasses.replace(worst, error={"3/4": Rate(value=0.5, low=0, high=1, n=9)})
    cards = [dataclasses.replace(card, name=f"<{n}>") for n in range(3)]
    cards.append(dataclasses.replace(card, name="other", worst_case=(other,)))
    drawn = ElementTree.fromstring(scatter(cards, "l2", "{name}.html"))
    points = [g for g in drawn.iter(f"{SVG}g") if g.get("class") == "point"]
    assert [point.find(f"{SVG}a").get("href") for point in points] == [
        f"<{n}>.html" for n in range(3)
    ]
    heights = [float(text.get("y")) for point in points for text in point.iter(f"{SVG}text")]
    assert min(np.diff(sorted(heights))) >= 15  # the labels of three points in one place
    with pytest.raises(ValueError, match="error under attacks in 'l1'"):
        scatter(cards, "l1")


def test_what_was_measured_alike_stands_together_the_unreliable_last():
    card = zoo.card("digits_tv_lip")
    worst = dataclasses.replace(card.worst_case[0], norm="l2", median_distance=9.0)
    failing, holding = (
        dataclasses.replace(
            worst, error={"1/2": Rate(value=value, low=0, high=1, n=9)}, median_distance=None
        )
        for value in (0.6, 0.4)
    )
    cards = [
        dataclasses.replace(
            card,
            name="masked",
            worst_case=(worst,),
            audit=(dataclasses.replace(card.audit[0], verdict="unreliable"),),
        ),
        dataclasses.replace(card, name="failing", worst_case=(failing,)),
        dataclasses.replace(card, name="holding", worst_case=(holding,)),
        dataclasses.replace(card, name="elsewhere", dataset="cifar10 test"),
        card,
    ]
    found = {(table["dataset"], table["norm"]): table for table in site.tables(cards)}
    assert list(found) == [
        (dataset, norm) for dataset in ("cifar10 test", "digits test") for norm in ("l2", "linf")
    ]
    table = found["digits test", "l2"]
    order = ["holding", "digits_tv_lip", "failing", "masked"]
    assert [row["card"].name for row in table["rows"]] == order
    met = ["PGD l2", "DDN", "Square l2", "AutoAttack l2", "HopSkipJump"]
    assert table["rows"][1]["attacks"] == met
    assert table["radii"] == ["0.25", "0.5", "1/2", "1.0"]
    assert site.leaderboard(cards).count(">unreliable</td>") == 1
    assert site.leaderboard([card]).count("unreliable") == 0


def test_a_site_is_built_over_an_older_one(tmp_path):
    output, names = tmp_path / "site", zoo.names("digits_*")
    for _ in range(2):
        assert site.build(names, output) == output / "index.html"
    assert {path.name for path in output.iterdir() if path.is_dir()} == set(names)
    with pytest.raises(ValueError, match="names must hold an entry of the zoo, got none of"):
        site.build([], output)
    with pytest.raises(ValueError, match="a name must be one of"):
        site.build(["digits"], output)
    with pytest.raises(OSError, match=r"site\.css"):
        site.build(names, output / "site.css")


# ---- Damaged and hostile entries ---------------------------------------------------------
@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Replaces the card of the first of two digit classifiers, and publishes it."""
    monkeypatch.setattr(store, "CHECKOUT", tmp_path / "zoo")
    for name in zoo.names("digits_*"):
        shutil.copytree(ROOT / "zoo" / name, tmp_path / "zoo" / name)
    path = tmp_path / "zoo" / "digits_tv_lip" / "card.json"

    def publish(content):
        path.write_text(content)
        index = {name: store.index()[name] for name in zoo.names("digits_*")}
        index["digits_tv_lip"]["files"]["card.json"] = store.File.of(content.encode())._asdict()
        (tmp_path / "index.json").write_text(json.dumps(index))
        monkeypatch.setattr(store, "INDEX", tmp_path / "index.json")

    publish.content = json.loads(path.read_text())
    return publish


CHANGES = {
    "no JSON": (None, "JSONDecodeError"),
    "newer": ({"schema": 9}, "this tvkeras reads 5"),
    "another's": ({"name": "javascript:alert(1)//"}, "is that of"),
    "elsewhere": ({"figures": {"a": "/etc/hostname"}}, "got '/etc/hostname'"),
    "above": ({"figures": {"a": "../digits_undefended/distances.png"}}, "must be files beside"),
    "no figure": ({"figures": {"a": "card.json"}}, "must be files beside"),
    "unpublished": ({"figures": {"a": "other.png"}}, "must be one of"),
    "no numbers": ({"clean_error": {"value": "a", "low": 0, "high": 1, "n": 3}}, "must be float"),
    "no text": ({"dataset": ["digits"]}, "card.dataset must be str"),
    "no radius": (
        {"worst_case": [{"norm": "l2", "clean_error": {"value": 0, "low": 0, "high": 1, "n": 3},
                         "error": {"<b>": {"value": 0, "low": 0, "high": 1, "n": 3}},
                         "median_distance": None}]},
        "fraction such as",
    ),
    "no model": ({"model": {}}, "has no attribute"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_a_damaged_entry_is_named_and_the_others_are_shown(copied, tmp_path, kind):
    changes, why = CHANGES[kind]
    copied("{" if changes is None else json.dumps({**copied.content, **changes}))
    with pytest.warns(UserWarning, match="'digits_tv_lip' is left out: ") as warned:
        site.build(zoo.names(), tmp_path / "site")
    assert why in str(warned[0].message)
    assert not (tmp_path / "site" / "digits_tv_lip").exists()
    assert (tmp_path / "site" / "digits_undefended" / "index.html").is_file()
    found = Addresses(tmp_path / "site" / "index.html").found
    assert "digits_undefended/index.html" in found
    assert not any("digits_tv_lip" in address for address in found)
    text = html.unescape((tmp_path / "site" / "index.html").read_text())
    assert "<li>digits_tv_lip: " in text
    assert why in text


def test_a_figure_that_is_not_the_published_one_makes_no_page(copied, tmp_path):
    copied(json.dumps(copied.content))
    (store.CHECKOUT / "digits_tv_lip" / "distances.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"distances\.png is not the published file"):
        site.build(["digits_tv_lip"], tmp_path / "site")


LINK = "[x](javascript:alert(1))"
HOSTILE = [
    LINK,
    f"!{LINK}",
    f"\\{LINK}",
    f"`{LINK}",
    f"`` ` {LINK}",
    f"` {LINK} `",
    f"|{LINK}|",
    f"\n\n{LINK}",
    f"\n```\n\n{LINK}\n\n```\n",
    f"\r\n````\r\n\r\n{LINK}",
    f"~~~\n{LINK}",
    f"&#91;x](data:text/html,a) {LINK}",
    "[x][y]\n\n[y]: javascript:alert(1)",
    "[0, 1]: javascript:alert(1)",
    "![x](data:image/svg+xml;base64,PHN2Zy8+)",
    "![x](https://example.org/x.png)",
    "](javascript:alert(1))",
    "<javascript:alert(1)> <https://example.org> <a@example.org>",
    "<a href=javascript:alert(1)>x</a> <img src=x onerror=alert(1)>",
    "</code></pre></h1><script>alert(1)</script><style>*{}</style><!--",
    "'\"><svg onload=alert(1)>",
    "\x02wzxhzdk:0\x03 \x00",
    "**x** # x\n# x",
]


def hostile(text):
    """A card that says `text` wherever it says something, but not instead of figures."""

    def filled(part):
        if isinstance(part, dict):
            return {name: filled(value) for name, value in part.items()}
        if isinstance(part, list):
            return [filled(value) for value in part]
        return text if isinstance(part, str) else part

    card = json.loads(zoo.card("digits_tv_lip").to_json())
    filled_in = filled(card)
    for report in filled_in["detection"]:
        for name in ("detected", "at", "median_distance"):
            report[name] = {text: next(iter(report[name].values()))}
    return {
        **filled_in,
        "training": {**filled_in["training"], text: text},
        "versions": {text: text},
        "figures": {text: "distances.png"},
        "note": text,
    }


def as_html(card):
    return site.as_html(page.body(card), card.figures.values())


def elements(text):
    """The elements of a page, with the attributes that could do something."""
    found = []

    class Elements(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            inert = {"alt", "title", "aria-label", "data-dataset", "data-network", "data-norm"}
            found.append((tag, *(pair for pair in attrs if pair[0] not in inert)))

    Elements().feed(text)
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_card_says_its_pages_are_built_alike(text):
    markdown_it = pytest.importorskip("markdown_it")
    yaml = pytest.importorskip("yaml")
    plain, spoilt = (site.Card.from_json(json.dumps(hostile(content))) for content in ("x", text))

    def built(card):
        readme = markdown_it.MarkdownIt("commonmark").enable("table").render(page.body(card))
        shown = dataclasses.replace(card, name="x")  # `build` demands the entry's
        return [*map(elements, (as_html(card), readme, site.leaderboard([shown])))]

    assert built(spoilt) == built(plain)
    metadata = yaml.safe_load(page.render(spoilt).split("\n---\n")[0].removeprefix("---"))
    assert metadata["model-index"][0]["name"] == text
    assert metadata["model-index"][0]["results"][0]["dataset"] == {"name": text, "type": text}


def test_what_no_card_has_is_taken_out_of_its_page():
    text = f"{LINK} [x](//a) ![y](https://a/distances.png) ![y](x.png) ![y](distances.png)"
    assert elements(site.as_html(text, ["distances.png"])) == [
        *(("p",), ("img",), ("img",), ("img", ("src", "distances.png")))
    ]


def test_a_card_says_on_its_page_what_it_says():
    card = site.Card.from_json(json.dumps(hostile("\\[*x*](y) <b> `z` | ~ # &amp;")))
    text = re.sub("<[^>]*>", "", as_html(card))
    assert html.unescape(text).count("\\[*x*](y) <b> `z` | ~ # &amp;") > 30


def test_every_page_forbids_what_it_does_not_need(pages):
    for file in pages.rglob("*.html"):
        assert (
            "content=\"default-src 'none'; img-src 'self'; style-src 'self'; " in file.read_text()
        )
        assert "style=" not in file.read_text()
        scripts = "self" if file.parent == pages else "none"
        assert f"script-src '{scripts}'; base-uri 'none'; form-action 'none'" in file.read_text()
