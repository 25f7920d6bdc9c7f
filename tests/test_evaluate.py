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

import tvkeras
from tests.conftest import BACKEND, ROOT, batch, net
from tvkeras import attacks, compare, config, evaluation, train, zoo
from tvkeras.evaluation import card, comparison, figures, page, reports, suite, trials
from tvkeras.evaluation.certified import Certification
from tvkeras.evaluation.detecting import Detection
from tvkeras.evaluation.subject import Subject, twin
from tvkeras.evaluation.trials import Trial

PGD = Trial(
    name="PGD",
    attack=attacks.ProjectedGradient(norm="l2", steps=5),
    epsilons=(0.25, "1/2"),
    images=30,
)
DDN = Trial(name="DDN", attack=attacks.DecoupledDirectionNorm(steps=20))
EPSILONS = {"l2": (0, 0.25, "1/2")}
SETTINGS = {
    "suite": (PGD, DDN),
    "epsilons": EPSILONS,
    "attacked_images": 40,
    "audited_images": 20,
    "detection": Detection(evasive={"steps": 5, "search_steps": 2}, evasive_images=10),
    "certification": Certification(sigma=0.1, images=5, samples=50),
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
    output, subject = run_dir / "evaluation", Subject.of(run_dir)
    return subject.evaluated(tvkeras.benchmark, output, command="none", **SETTINGS), output


@pytest.fixture(scope="module")
def masked(run_dir, evaluated, tmp_path_factory):
    """The same run with its logits scaled until the gradient vanishes: card and folder."""
    output, subject = tmp_path_factory.mktemp("masked"), Subject.of(run_dir)
    scaled = keras.layers.Rescaling(1e5)(subject.classifier.outputs[0])
    found = tvkeras.benchmark(
        keras.Model(subject.classifier.inputs, scaled),
        subject.test.images,
        subject.test.labels,
        suite=(
            dataclasses.replace(PGD, images=None),
            Trial(name="PGD l1", attack=attacks.ProjectedGradient(norm="l1"), images=10),
        ),
        epsilons={**EPSILONS, "l1": (1,)},
        attacked_images=1000,  # more than there are
        audited_images=20,
        twin=twin(evaluated[1], "digits test"),
    )
    found.save(output)
    return found, output


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
def test_what_is_proved_stands_beside_what_is_estimated(evaluated):
    found, output = evaluated
    assert [bound.kind for bound in found.bounds] == ["estimated", "probabilistic"]
    proved = found.bounds[1]
    assert proved.error["0.25"] <= proved.error["1/2"] == 1  # 50 copies prove no more than 0.12
    assert (output / "certified.png").stat().st_size > 0


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
def test_a_card_of_masked_gradients_is_marked_unreliable(masked, evaluated, run_dir):
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
    assert report.surrogate == run_dir.name == evaluated[0].name
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
def test_an_evaluation_that_is_repeated_finds_the_same_without_attacking(evaluated, run_dir):
    found, output = evaluated

    def kept():
        return {path: path.stat().st_mtime_ns for path in (output / "attacks").rglob("batch*")}

    before, subject = kept(), Subject.of(run_dir)
    again = tvkeras.benchmark(
        *(subject.classifier, subject.test.images, subject.test.labels),
        **{**SETTINGS, "audited_images": 0, "corruptions": False},
        resume_dir=output / "attacks",
    )
    assert kept() == before
    assert (again.attacks, again.worst_case) == (found.attacks, found.worst_case)


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
        trial=PGD, results={"0.25": result([np.inf, 0.2, 0.1]), "1/2": result([0.4, 0.5, 0.1])}
    )
    ddn = suite.Outcome(trial=DDN, results={"": result([0.3, np.inf, 0.2, 0.0])})
    np.testing.assert_array_equal(suite.worst_case([pgd, ddn], "l2"), [0.3, 0.2, 0.1])
    assert len(suite.worst_case([pgd, ddn], "linf")) == 0
    assert suite.broken(np.array([0.3, 0.2, np.inf]), "1/5").tolist() == [False, True, False]
    few = dataclasses.replace(DDN, name="few", supplementary=True)
    slow = suite.Outcome(trial=few, results={"": result([0.1])})
    np.testing.assert_array_equal(suite.worst_case([pgd, slow, ddn], "l2"), [0.1, 0.2, 0.1])
    np.testing.assert_array_equal(suite.worst_case([slow], "l2"), [0.1])
    report = reports.attack_report(ddn, ("1/5",))
    assert report.error["1/5"].value == 0.5
    assert report.median_distance == 0.25


def attack_report(name, count=40, **changes):
    content = {
        "settings": "",
        "norm": "l2",
        "error": {"1/2": reports.rate(np.arange(count) < 30)},
        "median_distance": None,
        "median_queries": 20.0,
    }
    return card.AttackReport(name=name, **{**content, **changes})


def test_a_page_names_the_attacks_that_met_fewer_images():
    met = (attack_report("PGD"), attack_report("HopSkipJump", 5))
    shown = page.render(by_hand(attacks=met))
    assert "HopSkipJump met 5 of them, and counts there." in shown
    assert "PGD met" not in shown


def test_an_interval_covers_its_rate():
    found = reports.rate(np.arange(100) < 3)
    assert (found.value, found.n) == (0.03, 100)
    # Wilson (1927), by hand: centre and half-width at z = 1.96
    z2 = 1.959964**2
    centre = (0.03 + z2 / 200) / (1 + z2 / 100)
    half = 1.959964 * np.sqrt(0.03 * 0.97 / 100 + z2 / 4e4) / (1 + z2 / 100)
    np.testing.assert_allclose([found.low, found.high], [centre - half, centre + half], rtol=1e-5)
    nothing = reports.rate(np.zeros(50, bool))
    assert nothing.low == pytest.approx(0, abs=1e-12)
    assert nothing.high > 0.05


# ---- Suites ------------------------------------------------------------------------------
RADII = {"l2": (0, "1/2", 0.25, 1.0), "linf": ("8/255",)}


def test_named_suites_meet_every_norm_at_its_radii():
    quick = trials.chosen("quick", RADII)
    assert [trial.name for trial in quick] == [
        *("PGD l2", "DDN", "Square l2", "PGD linf", "FMN linf", "Square linf")
    ]
    assert quick[0].epsilons == (0.25, "1/2", 1.0)
    assert quick[2].epsilons == ("1/2",)  # the middle one
    standard = {trial.name: trial for trial in trials.chosen("standard", RADII)}
    assert standard["AutoAttack linf"].attack == attacks.AutoAttack(norm="linf")
    assert len(standard) == len(quick) + 2
    if BACKEND == "tensorflow":
        assert "Boundary" in {trial.name for trial in trials.chosen("talk", RADII)}
    else:
        with pytest.raises(ValueError, match=r"'talk' cannot be had.*KERAS_BACKEND=tensorflow"):
            trials.chosen("talk", RADII)


def test_a_suite_of_ones_own_joins_and_replaces():
    chosen = trials.chosen(["quick", dataclasses.replace(DDN, name="PGD l2"), PGD.attack], RADII)
    assert [trial.name for trial in chosen][0::6] == ["PGD l2", "ProjectedGradient l2"]
    assert chosen[0].attack == DDN.attack
    assert chosen[6].epsilons == (0.25, "1/2", 1.0)


def test_what_is_not_autoattack_is_not_called_so():
    with pytest.raises(ValueError, match="must not call ProjectedGradient AutoAttack"):
        dataclasses.replace(PGD, name="Auto Attack")
    auto = Trial(name="AutoAttack l2", attack=attacks.AutoAttack())
    parts = {field: getattr(result([0.1]), field) for field in ("x_adv", "success", "queries")}
    found = attacks.AutoAttackResult(
        **parts, distance=np.ones(1), version="custom: 2 classes", broken_by=np.array([""])
    )
    report = reports.attack_report(suite.Outcome(trial=auto, results={"1": found}), ())
    assert (report.name, report.settings) == ("custom suite l2", "custom: 2 classes")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("slow", r"suite must be one of \['quick', 'standard', 'talk'\]"),
        ((), "for at least one trial"),
        ([PGD, PGD], "different names"),
        ([attacks.ProjectedGradient(norm="l1")], r"epsilons must give radii in \['l1'\]"),
        ([attacks.ProjectedGradient], "suite must hold names, attacks and trials"),
        (PGD, "suite must be a tuple"),
    ],
)
def test_what_is_no_suite(chosen, message):
    with pytest.raises(ValueError, match=message):
        trials.chosen(chosen, RADII)


# ---- Any Keras classifier ----------------------------------------------------------------
BRIEF = {"suite": [attacks.ProjectedGradient(steps=2)], "audited_images": 0, "corruptions": False}


def brief(classifier, images, labels, **settings):
    settings = {"norm": "l2", "epsilons": (0.1,), **BRIEF, **settings}
    return tvkeras.benchmark(classifier, images, labels, **settings)


def test_a_classifier_in_8_bit_bounds_has_the_card_of_the_same_in_unit_bounds(tmp_path):
    classifier = net(dtype="float32")
    pixels = keras.Input((6, 6, 2))
    scaled = keras.Model(pixels, classifier(keras.layers.Rescaling(1 / 255)(pixels)))
    images, labels = batch(dtype="float32")
    guarded = {
        "held_out_images": batch(40, seed=1)[0],
        "detection": Detection(evasive={"steps": 3, "search_steps": 1}, evasive_images=4),
    }
    one = brief(classifier, images, labels, **guarded)
    guarded["held_out_images"] = 255 * guarded["held_out_images"]
    other = brief(scaled, 255 * images, labels, bounds=(0, 255), jacobian=True, **guarded)
    assert other.worst_case == one.worst_case
    assert other.detection[0].threshold == pytest.approx(one.detection[0].threshold, rel=1e-4)
    assert other.gradient_norms.keys() == {"loss", "model"}
    assert other.model["bounds"] == [0, 255]
    other.save(tmp_path)
    assert_page_is_its_card(tmp_path)
    shown = (tmp_path / "README.md").read_text()
    assert "images in [0, 255] of shape (6, 6, 2)" in shown
    assert "They were not audited." in shown
    assert len(table(tmp_path)) == len(labels)
    assert "error at l2 0.1" in str(one)


def test_large_images_come_in_small_batches():
    inputs = keras.Input((None, None, 1))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(inputs))
    classifier, shapes = keras.Model(inputs, outputs), []
    images = np.random.default_rng(0).random((5, 800, 800, 1), "float32")

    class Noted(attacks.ProjectedGradient):
        def search(self, batch):
            shapes.append(batch.images.shape)
            return batch.images, np.ones(len(batch.images), int)

    brief(classifier, images, np.zeros(5, int), suite=[Noted()])
    assert shapes == [(3, 800, 800, 1)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after": [keras.layers.Softmax()]}, r"must return logits.*tvkeras\.logits\(classifier\)"),
        ({"images": batch()[0] * 255}, r"images must be finite and lie in \[0, 1\]"),
        ({"labels": np.arange(8)}, r"labels must lie in 0\.\.3"),
        ({"norm": None}, r"norm must be one of \['l1', 'l2', 'linf'\], got norm=None"),
        ({"epsilons": {"l2": (0.1,)}}, "norm must be left out beside epsilons by norm"),
        ({"norm": None, "epsilons": {"l3": (1,)}}, "a norm of epsilons must be one of"),
        ({"epsilons": (0, "0/255")}, "epsilons must hold a radius above 0"),
        ({"epsilons": 0.1}, "epsilons must be a tuple"),
        ({"note": 5}, "note must be text, got note=5"),
        ({"attacked_images": 0}, "attacked_images must be a whole number >= 1"),
        ({"audited_images": -1}, "audited_images must be a whole number >= 0"),
        ({"held_out_images": batch()[0]}, "Use more images"),
        (
            {"held_out_images": batch()[0] * 2},
            r"held_out_images must be finite and lie in \[0, 1\]",
        ),
    ],
)
def test_what_cannot_be_measured(changes, message):
    images, labels = batch()
    classifier = keras.Sequential([net(dtype="float32"), *changes.pop("after", ())])
    classifier.build((None, 6, 6, 2))
    with pytest.raises(ValueError, match=message):
        brief(classifier, **{"images": images, "labels": labels, **changes})


def test_illegal_settings():
    with pytest.raises(ValueError, match="epsilons of trial 'x' must be empty"):
        Trial(name="x", attack=attacks.DecoupledDirectionNorm(), epsilons=(0.1,))
    with pytest.raises(ValueError, match="statistics must be one of"):
        Detection(statistics=("logits",))
    for schema in (1, 99):
        with pytest.raises(ValueError, match=f"schema={schema}, .* evaluation again"):
            card.Card.from_json(json.dumps({"schema": schema}))


# ---- Cards and pages ---------------------------------------------------------------------
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
    share = reports.rate(np.arange(40) < 10)
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


def test_a_card_of_an_older_schema_is_read_and_keeps_its_page():
    measured = {"contrast x 0.4": reports.rate(np.arange(40) < 20)}
    noted = by_hand(note="Trained briefly.", corruption_error=measured)
    assert card.Card.from_json(noted.to_json()) == noted
    for shown in (
        "\n\nTrained briefly.\n\n",
        "| contrast x 0.4 | 50.0 (35.2-64.8) |",
        "Threat model",
    ):
        assert shown in page.render(noted)
        assert shown not in page.render(by_hand(schema=3))
    content = json.loads(by_hand(schema=2).to_json())
    for name in ("note", "corruption_error", "suite"):
        del content[name]
    assert card.Card.from_json(json.dumps(content)) == by_hand(schema=2)


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
        by_hand(training={**training, "defense": defense})
        for defense in (DEFENSE.format(0.1), DEFENSE.format("'8/10'"), "TRADES(beta=6.0)")
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


@pytest.mark.slow
def test_bad_settings_of_a_run_that_exists(run_dir, evaluated, tmp_path):
    with pytest.raises(ValueError, match="twin must be the folder of an evaluation"):
        twin(tmp_path / "nowhere", "digits test")
    with pytest.raises(ValueError, match="twin must be evaluated on 'mnist test'"):
        twin(evaluated[1], "mnist test")
    about = json.loads((run_dir / "run.json").read_text())
    for missing in ("num_classes", "results"):
        unfinished = tmp_path / missing
        shutil.copytree(run_dir, unfinished)
        rest = {name: value for name, value in about.items() if name != missing}
        (unfinished / "run.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=f"lacks \\['{missing}'\\]"):
            Subject.of(unfinished)


def command(*arguments):
    line = [sys.executable, "-m", "tvkeras.evaluate", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)


DIGITS = "--gin_file=gin/evaluate_digits.gin"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=nowhere", DIGITS], "must be the folder of a finished run"),
        (["--model=nowhere.keras", DIGITS], "--dataset must name the test images"),
        (
            ["--model=digits_tv_lip", DIGITS, "--gin_param=benchmark.attacked_images=0"],
            "attacked_images must be",
        ),
    ],
)
def test_the_command_ends_with_an_error_and_no_traceback(arguments, message):
    ended = command(*arguments)
    assert ended.returncode == 1
    assert "error: " in ended.stderr
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_command_evaluates_what_keras_saved(run_dir, tmp_path):
    Subject.of(run_dir).classifier.save(tmp_path / "mine.keras")
    brief = [
        *("benchmark.suite=[@ProjectedGradient()]", "benchmark.audited_images=0"),
        *("benchmark.attacked_images=10", "benchmark.epsilons={'l2': (0.5,)}"),
    ]
    model = f"--model={tmp_path / 'mine.keras'}"
    ended = command(model, "--dataset=digits", *(f"--gin_param={line}" for line in brief))
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "mine" / "evaluation"
    assert_page_is_its_card(folder)
    found = card.find(folder)
    assert (found.name, found.dataset, found.suite) == ("mine", "digits test", "custom")
    assert str(found) in ended.stdout
    assert len(table(folder)) == 360


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
    subject = Subject.of(tmp_path)
    found = brief(subject.classifier, subject.test.images, subject.test.labels, attacked_images=20)
    assert found.versions["backend"] == BACKEND
    assert found.clean_error.value == pytest.approx(trained["results"]["clean_error"], abs=0.003)
    assert found.gradient_norms["loss"]["mean"] == pytest.approx(
        trained["results"]["gradient_norm_mean"], rel=1e-3
    )
