import csv
import json
import pathlib

import keras
import numpy as np
import pytest

from tests.conftest import ROOT
from tvkeras import attacks, config, evaluate, runs, train
from tvkeras.evaluation import card, suite

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
    "evasive": {"steps": 5, "weights": 2},
    "evasive_images": 10,
    "audited_images": 20,
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A trained run."""
    folder = tmp_path_factory.mktemp("run")
    configured = config.configurable(train.train)
    settings = ["train.epochs=2", "train.model_arguments={'width': 4}", "train.epsilons=(0.5,)"]
    config.bind(["gin/digits_undefended.gin"], settings)
    configured(run_dir=str(folder))
    return folder


@pytest.fixture(scope="module")
def evaluated(run_dir):
    """Its card, and the folder of it."""
    output = run_dir / "evaluation"
    return evaluate.evaluate(run_dir=str(run_dir), output=str(output), **SETTINGS), output


@pytest.fixture(scope="module")
def masked(run_dir, evaluated, tmp_path_factory):
    """The same run with its logits scaled until the gradient vanishes: card and folder."""
    classifier, about = evaluate.load_run(run_dir)
    scaled = keras.layers.Rescaling(1e5)(classifier.outputs[0])
    saturated = keras.Model(classifier.inputs, scaled)
    output = tmp_path_factory.mktemp("masked")

    loads = iter([saturated, classifier])  # the second time as the twin
    one_in_l1 = suite.Trial(
        name="PGD l1", attack=attacks.ProjectedGradient(norm="l1"), epsilons=(1,), images=10
    )
    settings = {
        **SETTINGS,
        "trials": (TRIALS[0], one_in_l1),
        "epsilons": {**EPSILONS, "l1": (1,)},
        "twin": str(evaluated[1]),
        "statistics": (),  # its gradients are zero
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_run", lambda _: (next(loads), about))
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
    page = (output / "README.md").read_text()
    assert card.render(again) == page
    for file in found.figures.values():
        assert (output / file).read_bytes().startswith(b"\x89PNG")
        assert f"({file})" in page


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
def test_a_card_of_masked_gradients_is_marked_unreliable(masked, run_dir):
    found, output = masked
    assert [(report.norm, report.verdict) for report in found.audit] == [
        ("l1", "not audited"),
        ("l2", "unreliable"),
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
    report = card.attack_report(ddn, ("1/5",))
    assert report.error["1/5"].value == 0.5
    assert report.median_distance == 0.25


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


@pytest.mark.parametrize("path", sorted(pathlib.Path(ROOT).glob("zoo/*/card.json")), ids=str)
def test_published_pages_are_their_cards(path):
    assert (
        card.render(card.Card.from_json(path.read_text()))
        == (path.parent / "README.md").read_text()
    )
