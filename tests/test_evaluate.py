import dataclasses
import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import tvkeras
from tests.cards import DDN, PGD, assert_page_is_its_card, brief, by_hand, result, table
from tests.conftest import BACKEND, ROOT
from tvkeras import attacks, checks, config, train
from tvkeras.evaluation import card, page, reports, suite
from tvkeras.evaluation.certified import Certification
from tvkeras.evaluation.detecting import Detection
from tvkeras.evaluation.subject import Subject, twin
from tvkeras.evaluation.trials import Trial

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
    assert report.beyond == "worst case"  # of a tempered PGD: it finds what a margin does
    assert "margin_loss" not in report.named("fail")
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


def test_the_worst_case_is_the_smallest_distance_over_attacks_of_one_norm():
    found = {0.25: result([np.inf, 0.2, 0.1]), checks.epsilon("1/2"): result([0.4, 0.5, 0.1])}
    pgd = suite.Outcome(trial=PGD, results=found)
    assert pgd.farthest[0] == "PGD, ε = 1/2"
    ddn = suite.Outcome(trial=DDN, results={None: result([0.3, np.inf, 0.2, 0.0])})
    np.testing.assert_array_equal(suite.worst_case([pgd, ddn], "l2"), [0.3, 0.2, 0.1])
    assert len(suite.worst_case([pgd, ddn], "linf")) == 0
    assert suite.broken(np.array([0.3, 0.2, np.inf]), 0.2).tolist() == [False, True, False]
    few = dataclasses.replace(DDN, name="few", supplementary=True)
    slow = suite.Outcome(trial=few, results={None: result([0.1])})
    np.testing.assert_array_equal(suite.worst_case([pgd, slow, ddn], "l2"), [0.1, 0.2, 0.1])
    np.testing.assert_array_equal(suite.worst_case([slow], "l2"), [0.1])
    report = reports.attack_report(ddn, (checks.epsilon("1/5"),))
    assert report.error["1/5"].value == 0.5
    assert report.median_distance == 0.25


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


def test_bad_settings_of_a_run_that_exists(tmp_path):
    entry = ROOT / "zoo" / "digits_undefended"
    with pytest.raises(ValueError, match="twin must be the folder of an evaluation"):
        twin(tmp_path / "nowhere", "digits test")
    with pytest.raises(ValueError, match="twin must be evaluated on 'mnist test'"):
        twin(entry, "mnist test")
    about = json.loads((entry / "run.json").read_text())
    for missing in ("num_classes", "results"):
        unfinished = tmp_path / missing
        shutil.copytree(entry, unfinished)
        rest = {name: value for name, value in about.items() if name != missing}
        (unfinished / "run.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=f"lacks \\['{missing}'\\]"):
            Subject.of(unfinished)
    with pytest.raises(ValueError, match="--dataset must name the test images"):
        Subject.of(tmp_path / "mine.keras")


def command(*arguments):
    line = [sys.executable, "-m", "tvkeras.evaluate", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)


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
