import dataclasses
import json

import keras
import numpy as np
import pytest

from tests.cards import DDN, PGD, assert_page_is_its_card, brief, result, table
from tests.conftest import BACKEND, batch, net
from tvkeras import attacks, checks
from tvkeras.evaluation import card, reports, suite, trials
from tvkeras.evaluation.detecting import Detection
from tvkeras.evaluation.trials import Trial

# ---- Suites ------------------------------------------------------------------------------
RADII = {
    "l2": tuple(checks.epsilon(value) for value in (0, "1/2", 0.25, 1.0)),
    "linf": (checks.epsilon("8/255"),),
}


def test_named_suites_meet_every_norm_at_its_radii():
    quick = trials.chosen("quick", RADII)
    assert [trial.name for trial in quick] == [
        *("PGD l2", "DDN", "Square l2", "PGD linf", "FMN linf", "Square linf")
    ]
    assert quick[0].epsilons == (0.25, 0.5, 1.0)
    assert quick[2].epsilons == (0.5,)  # the middle one
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
    assert [str(epsilon) for epsilon in chosen[6].epsilons] == ["0.25", "1/2", "1.0"]


def test_what_is_not_autoattack_is_not_called_so():
    with pytest.raises(ValueError, match="must not call ProjectedGradient AutoAttack"):
        dataclasses.replace(PGD, name="Auto Attack")
    auto = Trial(name="AutoAttack l2", attack=attacks.AutoAttack())
    parts = {field: getattr(result([0.1]), field) for field in ("x_adv", "success", "queries")}
    found = attacks.AutoAttackResult(
        **parts, distance=np.ones(1), version="custom: 2 classes", broken_by=np.array([""])
    )
    report = reports.attack_report(suite.Outcome(trial=auto, results={1.0: found}), ())
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
    assert brief(classifier, images, labels, **guarded | {"detection": None}).detection == ()
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
