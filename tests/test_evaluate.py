import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.conftest import BACKEND, ROOT
from tvkeras import attacks, compare, config, evaluate, evaluation, runs, train, zoo
from tvkeras.evaluation import card, page, suite

TRIALS = (
    suite.Trial(
        name="PGD",
        attack=attacks.ProjectedGradient(norm="l2", steps=5),
        epsilons=(0.25, "1/2"),
        images=30,
    ),
    suite.Trial(name="DDN", attack=attacks.DecoupledDirectionNorm(steps=20), images=40),
)
EPSILONS = {"l2": (0, 0.25, "1/2")}
SETTINGS = {
    "trials": TRIALS,
    "epsilons": EPSILONS,
    "statistics": ("loss",),
    "evasive": {"steps": 5, "search_steps": 2},
    "evasive_images": 10,
    "audited_images": 20,
    "note": "Trained briefly.",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A trained run."""
    folder = tmp_path_factory.mktemp("run")
    settings = ["Recipe.epochs=2", "Network.arguments={'width': 4}", "Task.epsilons=(0.5,)"]
    config.bind(["gin/digits_undefended.gin"], settings)
    train.train(folder, **config.settings())
    return folder


@pytest.fixture(scope="module")
def evaluated(run_dir):
    """Its card, and the folder of it."""
    output = run_dir / "evaluation"
    return evaluate.evaluate(run_dir=str(run_dir), output=str(output), **SETTINGS), output


@pytest.fixture(scope="module")
def masked(run_dir, evaluated, tmp_path_factory):
    """The same run with its logits scaled until the gradient vanishes: card and folder."""
    classifier, about = runs.load(run_dir)
    scaled = keras.layers.Rescaling(1e5)(classifier.outputs[0])
    saturated = keras.Model(classifier.inputs, scaled)
    output = tmp_path_factory.mktemp("masked")

    more_than_there_are = dataclasses.replace(TRIALS[0], images=1000)
    one_in_l1 = suite.Trial(
        name="PGD l1", attack=attacks.ProjectedGradient(norm="l1"), epsilons=(1,), images=10
    )
    settings = {
        **SETTINGS,
        "trials": (more_than_there_are, one_in_l1),
        "epsilons": {**EPSILONS, "l1": (1,)},
        "twin": str(evaluated[1]),
        "statistics": (),  # its gradients are zero
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_run", lambda _: (saturated, about))
        return evaluate.evaluate(run_dir=str(run_dir), output=str(output), **settings), output


def table(output):
    with open(output / "examples.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_card_says_what_the_table_of_examples_says(evaluated):
    found, output = evaluated
    rows = table(output)
    wrong = np.array([row["label"] != row["predicted"] for row in rows])
    assert found.clean_error.value == pytest.approx(wrong.mean())
    assert found.clean_error.n == len(rows) == 360
    first = rows[:30]
    worst = [
        min(float(row[f"{name} distance"]) for name in ("PGD@0.25", "PGD@1/2", "DDN"))
        for row in first
    ]
    np.testing.assert_allclose([float(row["worst l2"]) for row in first], worst)
    assert all(row["worst l2"] == "" for row in rows[30:])
    (report,) = found.worst_case
    for epsilon, radius in (("0.25", 0.25), ("1/2", 0.5)):
        assert report.error[epsilon].value == pytest.approx(
            np.mean(np.array(worst) <= radius * 1.0001)
        )
        for attack in found.attacks:
            few = attack.error[epsilon].value * attack.error[epsilon].n
            assert report.error[epsilon].value * 30 >= min(few, 30) - 10  # DDN has 10 images more
    assert report.error["1/2"].value >= report.error["0.25"].value >= wrong[:30].mean()


@pytest.mark.slow
def test_a_card_survives_json_and_is_rendered_from_it_alone(evaluated):
    found, output = evaluated
    again = card.Card.from_json((output / "card.json").read_text())
    assert again == found
    assert_page_is_its_card(output)
    for file in found.figures.values():
        assert (output / file).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_card_whose_audit_passes_says_so(evaluated):
    found, output = evaluated
    (report,) = found.audit
    assert (report.norm, report.verdict, report.images) == ("l2", "reliable", 20)
    assert report.surrogate is None
    assert "transfer" not in {check.name for check in report.checks}
    page = (output / "README.md").read_text()
    assert "\n# " + found.name + "\n" in page
    assert "- l2: **reliable**" in page
    assert "unreliable" not in page.lower()


@pytest.mark.slow
def test_the_evasive_attack_is_measured_at_its_own_threshold_alone(evaluated):
    (report,) = evaluated[0].detection
    assert (report.held_out_images, report.false_positive_rate.n) == (144, 360)
    assert report.at.keys() == {"PGD, ε = 1/2", "DDN"}  # at the largest radius
    assert "| evasive | 25.0 (14.2-40.2) | - | 1.5 | 40 |" in page.render(by_hand())


@pytest.mark.slow
def test_a_card_of_masked_gradients_is_marked_unreliable(masked, run_dir):
    found, output = masked
    assert [(report.norm, report.verdict) for report in found.audit] == [
        ("l1", "not audited"),
        ("l2", "unreliable"),
    ]
    assert [report.error["0.25" if report.norm == "l2" else "1"].n for report in found.attacks] == [
        360,
        10,
    ]
    report = found.audit[1]
    assert report.surrogate == run_dir.name
    assert {"gradient_free", "transfer"} <= set(report.named("fail"))
    assert card.Card.from_json((output / "card.json").read_text()) == found
    page = (output / "README.md").read_text()
    assert f"\n# {found.name}: unreliable\n\n> **Unreliable" in page
    assert page.count("(unreliable)") == page.count("type: robust_accuracy") == 4
    assert "- l1: **not audited**" in page
    for check in report.checks:
        assert f"| `{check.name}` |" in page
        assert (check.advice in page) == (check.status != "pass")


@pytest.mark.slow
def test_an_evaluation_that_is_repeated_finds_the_same_without_attacking(
    evaluated, run_dir, monkeypatch
):
    found, output = evaluated
    calls = []
    for attack in (attacks.ProjectedGradient, attacks.DecoupledDirectionNorm):
        monkeypatch.setattr(attack, "search", lambda *_: calls.append(1))
    outcomes = suite.run(
        runs.load(run_dir)[0],
        *(getattr(evaluate.data.load("digits", "test"), name) for name in ("images", "labels")),
        TRIALS,
        resume_dir=output / "attacks",
    )
    assert not calls
    reports = tuple(card.attack_report(outcome, EPSILONS["l2"]) for outcome in outcomes)
    assert reports == found.attacks


def result(distances):
    distance = np.array(distances)
    return attacks.AttackResult(
        x_adv=np.zeros((len(distances), 1, 1, 1)),
        success=np.isfinite(distance),
        distance=distance,
        queries=np.ones(len(distances), int),
    )


def test_the_worst_case_is_the_smallest_distance_over_attacks_of_one_norm():
    pgd = suite.Outcome(
        trial=TRIALS[0],
        results={"0.25": result([np.inf, 0.2, 0.1]), "1/2": result([0.4, 0.5, 0.1])},
    )
    ddn = suite.Outcome(trial=TRIALS[1], results={"": result([0.3, np.inf, 0.2, 0.0])})
    np.testing.assert_array_equal(suite.worst_case([pgd, ddn], "l2"), [0.3, 0.2, 0.1])
    assert len(suite.worst_case([pgd, ddn], "linf")) == 0
    assert suite.broken(np.array([0.3, 0.2, np.inf]), "1/5").tolist() == [False, True, False]
    few = dataclasses.replace(TRIALS[1], name="few", supplementary=True)
    slow = suite.Outcome(trial=few, results={"": result([0.1])})
    np.testing.assert_array_equal(suite.worst_case([pgd, slow, ddn], "l2"), [0.1, 0.2, 0.1])
    np.testing.assert_array_equal(suite.worst_case([slow], "l2"), [0.1])
    report = card.attack_report(ddn, ("1/5",))
    assert report.error["1/5"].value == 0.5
    assert report.median_distance == 0.25


def test_a_page_names_the_attacks_that_met_fewer_images():
    def report(name, count):
        return card.AttackReport(
            name=name,
            settings="",
            norm="l2",
            error={"1/2": card.rate(np.arange(count) < 2)},
            median_distance=None,
            median_queries=1.0,
        )

    shown = page.render(by_hand(attacks=(report("PGD", 40), report("HopSkipJump", 5))))
    assert "HopSkipJump met 5 of them, and counts there." in shown
    assert "PGD met" not in shown


def test_an_interval_covers_its_rate():
    found = card.rate(np.arange(100) < 3)
    assert (found.value, found.n) == (0.03, 100)
    # Wilson (1927), by hand: centre and half-width at z = 1.96
    z2 = 1.959964**2
    centre, half = (
        (0.03 + z2 / 200) / (1 + z2 / 100),
        1.959964 * np.sqrt(0.03 * 0.97 / 100 + z2 / 4e4),
    )
    np.testing.assert_allclose(
        [found.low, found.high],
        [centre - half / (1 + z2 / 100), centre + half / (1 + z2 / 100)],
        rtol=1e-5,
    )
    nothing = card.rate(np.zeros(50, bool))
    assert nothing.low == pytest.approx(0, abs=1e-12)
    assert nothing.high > 0.05


def test_bad_settings_of_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match=r"must be the folder of a finished run.*tvkeras\.train"):
        runs.load(tmp_path)
    arguments = {"run_dir": str(tmp_path), "output": str(tmp_path)}
    for trials, epsilons in ((TRIALS, {"linf": (0.1,)}), ((), EPSILONS)):
        with pytest.raises(ValueError, match=r"epsilons must give radii in \['l2'\]"):
            evaluate.evaluate(trials=trials, epsilons=epsilons, **arguments)
    with pytest.raises(ValueError, match="epsilons of trial 'x' must be empty"):
        suite.Trial(name="x", attack=attacks.DecoupledDirectionNorm(), epsilons=(0.1,))
    with pytest.raises(ValueError, match="epsilons of trial 'x' must be given"):
        suite.Trial(name="x", attack=attacks.ProjectedGradient())
    with pytest.raises(ValueError, match="different names"):
        suite.run(None, None, None, [TRIALS[0], TRIALS[0]])
    for schema in (1, 99):
        with pytest.raises(ValueError, match=f"schema={schema}, .* evaluation again"):
            card.Card.from_json(json.dumps({"schema": schema}))


def assert_page_is_its_card(folder):
    """The page is what the card beside it renders to, and its figures are there."""
    found = card.Card.from_json((folder / "card.json").read_text())
    assert page.render(found) == (folder / "README.md").read_text()
    for file in found.figures.values():
        assert (folder / file).exists()


COMMITTED = sorted({*ROOT.glob("zoo/*/card.json"), *ROOT.glob("zoo/*/evaluation/card.json")})


@pytest.mark.parametrize("path", COMMITTED, ids=str)
def test_published_pages_are_their_cards(path):
    assert_page_is_its_card(path.parent)


def by_hand(**changes):
    """A card that nothing was measured for."""
    share = card.rate(np.arange(40) < 10)
    check = evaluation.Check("unbounded", "fail", None, "No good.")
    audit = card.AuditReport(
        norm="l2", verdict="unreliable", images=40, surrogate=None, checks=(check,)
    )
    detection = card.DetectionReport(
        statistic="loss",
        threshold=0.5,
        held_out_images=99,
        false_positive_rate=share,
        detected={"PGD": share, "evasive": share},
        at={"PGD": {"0.01": 0.3}},
        median_distance={"PGD": 1.0, "evasive": 1.5},
        evasive_success=share,
    )
    content = {
        "name": 'the "first": one',
        "command": "python -m tvkeras.evaluate",
        "model": {"model": "m", "model_arguments": {}, "num_classes": 10, "parameters": 1234},
        "training": {"defense": "Undefended()", "dataset": "digits", "epochs": 3},
        "dataset": "digits test",
        "seed": 7,
        "clean_error": share,
        "gradient_norms": {name: {"mean": 1.0, "max": 2.0} for name in ("loss", "model")},
        "attacks": (),
        "worst_case": (
            card.WorstCase(
                norm="l2", clean_error=share, error={"1/2": share}, median_distance=None
            ),
        ),
        "audit": (audit,),
        "detection": (detection,),
        "bounds": (),
        "figures": {},
        "versions": {},
    }
    return card.Card(**{**content, **changes})


def test_a_changed_page_or_card_is_noticed(tmp_path):
    page.write(by_hand(), tmp_path)
    assert_page_is_its_card(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("25.0", "15.0"))
    with pytest.raises(AssertionError):
        assert_page_is_its_card(tmp_path)
    page.write(by_hand(), tmp_path)
    (tmp_path / "card.json").write_text(by_hand(seed=8).to_json())
    with pytest.raises(AssertionError):
        assert_page_is_its_card(tmp_path)
    page.write(by_hand(figures={"a curve": "missing.png"}), tmp_path)
    with pytest.raises(AssertionError):
        assert_page_is_its_card(tmp_path)


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


DEFENSE = "TVLipschitz(norm='l2', tv_weight={}, lipschitz_weight=0.1)"


def test_a_card_before_notes_is_read_and_keeps_its_page():
    noted = by_hand(note="Trained briefly.")
    assert "\n\nTrained briefly.\n\n" in page.render(noted)
    content = json.loads(noted.to_json())
    del content["note"]
    older = card.Card.from_json(json.dumps({**content, "schema": 2}))
    assert older == by_hand(schema=2)
    before = page.render(by_hand(note="Trained briefly.", schema=3))
    assert page.render(older) == before.replace("Trained briefly.\n\n", "")
    assert "Threat model" in page.render(noted)
    assert "Threat model" not in before


def test_corruptions_are_read_and_shown_where_they_were_measured():
    measured = by_hand(corruption_error={"contrast x 0.4": card.rate(np.arange(40) < 20)})
    assert card.Card.from_json(measured.to_json()) == measured
    assert "| contrast x 0.4 | 50.0 (35.2-64.8) |" in page.render(measured)
    assert "Without an attacker" not in page.render(by_hand())


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
    attack = card.AttackReport(
        name="PGD",
        settings="",
        norm="l2",
        error={"1/2": card.rate(np.arange(40) < 30)},
        median_distance=None,
        median_queries=20.0,
    )
    one, other = by_hand(name="one", attacks=(attack,)), by_hand(name="other", detection=())
    lines = compare.tables({"one": one, "other": other}).splitlines()
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
        compare.tables({"one": one, "other": by_hand(dataset="cifar10 test")})


def test_errors_are_drawn_in_the_order_of_the_weights(tmp_path, monkeypatch):
    training = by_hand().training
    weak, strong = (
        by_hand(name=str(weight), training={**training, "defense": DEFENSE.format(weight)})
        for weight in (0.1, "'8/10'")
    )
    drawn = []
    monkeypatch.setattr(
        compare.figures, "over_regularisation", lambda *arguments: drawn.append(arguments)
    )
    compare.draw([strong, by_hand(name="plain"), weak], tmp_path / "comparison.png")
    labels, errors, path = drawn[0]
    assert labels == ["0 / 0", "0.1 / 0.1", "0.8 / 0.1"]
    assert {name: [rate.value for rate in rates] for name, rates in errors.items()} == {
        "clean": [0.25] * 3,
        "l2 1/2": [0.25] * 3,
    }
    monkeypatch.undo()
    compare.draw([strong, weak], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    other = by_hand(worst_case=(dataclasses.replace(weak.worst_case[0], norm="linf"),))
    trained = by_hand(training={**training, "defense": "TRADES(beta=6.0)"})
    for bad, message in ((other, "share no norm and radius"), (trained, r"got .*TRADES")):
        with pytest.raises(ValueError, match=message):
            compare.draw([weak, bad], path)


def test_cards_are_read_from_folders_and_the_zoo(tmp_path):
    page.write(by_hand(), tmp_path)
    assert compare.read(str(tmp_path)) == by_hand()
    assert compare.read("digits_tv_lip") == zoo.card("digits_tv_lip")
    with pytest.raises(ValueError, match=r"no card\.json.*tvkeras\.evaluate"):
        compare.read(str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_bad_settings_of_a_run_that_exists(run_dir, evaluated, tmp_path):
    def refused(message, **changes):
        settings = {"run_dir": str(run_dir), "output": str(tmp_path), **SETTINGS, **changes}
        with pytest.raises(ValueError, match=message):
            evaluate.evaluate(**settings)
        assert not list(tmp_path.glob("card.json"))

    refused("twin must be the folder of an evaluation.*'nowhere'", twin="nowhere")
    refused(r"epsilons\['l2'\] must hold a radius above 0", epsilons={"l2": (0, "0/255")})
    refused("a norm of epsilons must be one of", epsilons={"l2": (1,), "l3": (1,)})
    refused("note must be text, got note=5", note=5)
    refused("audited_images must be a whole number >= 1", audited_images=0)
    refused("clean_images must be at least .* 40, got clean_images=39", clean_images=39)
    refused("Use more images", false_positive_rate=1e-3)
    content = json.loads((evaluated[1] / "card.json").read_text())
    for name in ("card.json", "examples.csv"):
        (tmp_path / "twin").mkdir(exist_ok=True)
        (tmp_path / "twin" / name).write_text(json.dumps({**content, "dataset": "mnist test"}))
    refused("twin must be evaluated on 'digits test'", twin=str(tmp_path / "twin"))
    about = json.loads((run_dir / "run.json").read_text())
    for missing in ("num_classes", "results"):
        unfinished = tmp_path / missing
        shutil.copytree(run_dir, unfinished)
        rest = {name: value for name, value in about.items() if name != missing}
        (unfinished / "run.json").write_text(json.dumps(rest))
        refused(f"lacks \\['{missing}'\\]", run_dir=str(unfinished))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin_file=gin/evaluate_digits.gin"], "must be the folder of a finished run"),
        ([], "--gin_file must name the attacks"),
        (["--gin_file=gin/evaluate_digits.gin", "--gin_param=Trial.images=0"], "images must be"),
    ],
)
def test_the_command_ends_with_an_error_and_no_traceback(arguments, message):
    command = [sys.executable, "-m", "tvkeras.evaluate", "--model=nowhere", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 1
    assert "error: " in ended.stderr
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


TRAINING = """
import sys
from tvkeras import config, train
config.bind(["gin/digits_undefended.gin"], ["Recipe.epochs=1", "Network.arguments={'width': 4}"])
train.train(sys.argv[1], **config.settings())
"""


@pytest.mark.slow
def test_a_run_of_the_other_backend_is_evaluated(tmp_path):
    other = "jax" if BACKEND == "tensorflow" else "tensorflow"
    environment = {**os.environ, "KERAS_BACKEND": other}
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
    trained = json.loads((tmp_path / "run.json").read_text())
    assert trained["versions"]["backend"] == other
    settings = {**SETTINGS, "trials": TRIALS[:1], "statistics": ()}
    found = evaluate.evaluate(run_dir=str(tmp_path), output=str(tmp_path / "out"), **settings)
    assert found.versions["backend"] == BACKEND
    assert found.clean_error.value == pytest.approx(trained["results"]["clean_error"], abs=0.003)
    assert found.gradient_norms["loss"]["mean"] == pytest.approx(
        trained["results"]["gradient_norm_mean"], rel=1e-3
    )
