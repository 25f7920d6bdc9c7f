import dataclasses
import json
import math

import keras
import numpy as np
import pytest

import tvkeras
from tests.cards import assert_page_is_its_card, attack_report, by_hand
from tests.conftest import ROOT
from tvkeras import compare, zoo
from tvkeras.evaluation import card, comparison, figures, page, reports

COMMITTED = sorted({*ROOT.glob("zoo/*/card.json"), *ROOT.glob("zoo/*/evaluation/card.json")})


@pytest.mark.parametrize("path", COMMITTED, ids=str)
def test_published_pages_are_their_cards(path):
    assert_page_is_its_card(path.parent)


def test_a_page_states_its_numbers_and_metadata_that_yaml_reads():
    text = page.render(by_hand())
    assert '\n# the "first": one: unreliable\n' in text
    assert "Clean error: **25.0 (14.2-40.2) %** on 40 images of digits test" in text
    assert "seed 7" in text
    assert "| `unbounded` | - **fail** |" in text
    yaml = pytest.importorskip("yaml")
    metadata = yaml.safe_load(text.split("---\n")[1])
    (index,) = metadata["model-index"]
    assert index["name"] == 'the "first": one'
    accuracy, robust = index["results"][0]["metrics"]
    assert accuracy == {"type": "accuracy", "value": 0.75}
    assert robust["name"] == "worst case over attacks, l2 1/2, first 40 images (unreliable)"


def test_a_card_without_a_note_or_corruptions_is_read_and_shows_none():
    measured = {"contrast x 0.4": reports.rate(np.arange(40) < 20)}
    noted = by_hand(note="Trained briefly.", corruption_error=measured)
    assert card.Card.from_json(noted.to_json()) == noted
    for shown in ("\n\nTrained briefly.\n\n", "| contrast x 0.4 | 50.0 (35.2-64.8) |"):
        assert shown in page.render(noted)
        assert shown not in page.render(by_hand())
    content = json.loads(by_hand().to_json())
    for name in ("note", "corruption_error", "suite"):
        del content[name]
    assert card.Card.from_json(json.dumps(content)) == by_hand()


RATE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 9}, "the card has schema=9"),
        ({"seed": 1.5}, r"card\.seed must be int, got 1\.5"),
        ({"seed": True}, r"card\.seed must be int, got True"),
        ({"name": None}, r"card\.name must be str, got None"),
        ({"clean_error": 0.5}, r"card\.clean_error must be Rate, got 0\.5"),
        ({"clean_error": {**RATE, "low": "0"}}, r"card\.clean_error\.low must be float, got '0'"),
        ({"clean_error": {"value": 0.5}}, r"card\.clean_error must have .*'low'.*got \['value'\]"),
        ({"clean_error": {**RATE, "mean": 1}}, "card.clean_error must have .*'mean'"),
        ({"attacks": {}}, r"card\.attacks must be tuple.*got {}"),
        ({"audit": [{"norm": "l2"}]}, r"card\.audit\[0\] must have"),
        ({"gradient_norms": {"loss": {"max": math.inf}}}, r"\['loss'\]\['max'\] must be float"),
        ({"figures": {"a": "/etc/hostname"}}, "figures must be files beside .*'/etc/hostname'"),
        ({"figures": {"a": "../roc_loss.png"}}, "figures must be files beside"),
        ({"figures": {"a": "card.json"}}, "figures must be files beside"),
        ({"figures": {"a": "a.png\n"}}, "figures must be files beside"),
        ({"more": 1}, "card must have .*'more'"),
    ],
)
def test_a_damaged_card_is_refused_with_what_is_wrong(changes, message):
    text = json.dumps({**json.loads(by_hand().to_json()), **changes})
    with pytest.raises(ValueError, match=message):
        card.Card.from_json(text)
    for text in ("[]", "", "null"):
        with pytest.raises(ValueError, match=r"Expecting value|schema=None"):
            card.Card.from_json(text)


def test_cards_are_tabled_side_by_side():
    one, other = (
        by_hand(name="one", attacks=(attack_report("PGD"),)),
        by_hand(name="other", detection=()),
    )
    lines = comparison.tables({"one": one, "other": other}).splitlines()
    assert lines.count("|  | one | other |") == 3
    for row in (
        "| clean | 25.0 | 25.0 |",
        "| l2 1/2 | 25.0 | 25.0 |",
        "| median l2 | - | - |",
        "| max ‖∇loss‖ | 2 | 2 |",
        "| images, l2 | 40 | 40 |",
        "| audit, l2 | unreliable | unreliable |",
        "| PGD (l2) 1/2 | 75.0 | - |",
        "| PGD (l2) queries | 20 | - |",
        "| PGD (loss) | 25.0 | - |",
        "| evasive (loss), distance | 1.5 | - |",
    ):
        assert lines.count(row) == 1, row
    with pytest.raises(ValueError, match=r"of one test set, got \['cifar10 test', 'digits test'\]"):
        comparison.tables({"one": one, "other": by_hand(dataset="cifar10 test")})


def test_errors_are_in_the_order_of_the_weights(tmp_path):
    training = by_hand().training
    weak, strong, trades = (
        by_hand(training={**training, "defense": keras.saving.serialize_keras_object(defense)})
        for defense in (
            tvkeras.TVLipschitz(norm="l2", tv_weight=0.1, lipschitz_weight=0.1),
            tvkeras.TVLipschitz(norm="l2", tv_weight="8/10", lipschitz_weight=0.1),
            tvkeras.TRADES(),
        )
    )
    labels, errors = comparison.by_weights([strong, by_hand(), weak])
    assert labels == ["0 / 0", "0.1 / 0.1", "0.8 / 0.1"]
    assert errors == dict.fromkeys(("clean", "l2 1/2"), [by_hand().clean_error] * 3)
    figures.over_regularisation(labels, errors, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    figures.error_curves({"one": by_hand(), "two": by_hand()}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    other = by_hand(worst_case=(dataclasses.replace(weak.worst_case[0], norm="linf"),))
    for bad, message in ((other, "share no norm and radius"), (trades, r"got .*TRADES")):
        with pytest.raises(ValueError, match=message):
            comparison.by_weights([weak, bad])


def test_cards_are_read_from_folders_and_the_zoo(tmp_path):
    page.write(by_hand(), tmp_path)
    assert compare.read(str(tmp_path)) == by_hand()
    assert compare.read("digits_tv_lip") == zoo.card("digits_tv_lip")
    with pytest.raises(ValueError, match=r"no card\.json.*tvkeras\.evaluate"):
        compare.read(str(tmp_path / "nowhere"))


def test_a_page_names_the_attacks_that_met_fewer_images():
    met = (attack_report("PGD"), attack_report("HopSkipJump", 5))
    shown = page.render(by_hand(attacks=met))
    assert "HopSkipJump met 5 of them, and counts there." in shown
    assert "PGD met" not in shown
