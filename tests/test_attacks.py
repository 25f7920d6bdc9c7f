import dataclasses
import importlib.util

import keras
import numpy as np
import pytest

import tvkeras
from tests.conftest import (
    BACKEND,
    DUAL_ORDER,
    Counted,
    assert_is_so,
    batch,
    counted,
    linear,
    net,
    scaled,
)
from tvkeras import attacks, norms
from tvkeras.attacks.base import Batch
from tvkeras.attacks.parts import tempered
from tvkeras.inference import CompiledClassifier, loss_statistics


def losses(classifier, images, labels):
    logits = classifier.predict_on_batch(images)
    return keras.ops.convert_to_numpy(
        keras.ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    )


NATIVE = [
    *(
        attacks.ProjectedGradient(norm=norm, steps=steps)
        for norm in norms.DUALS
        for steps in (1, 9)
    ),
    *(
        attacks.ProjectedGradient(norm=norm, steps=5, random_start=True, restarts=2)
        for norm in norms.DUALS
    ),
    attacks.DecoupledDirectionNorm(steps=20),
    *(attacks.FastMinimumNorm(norm=norm, steps=20) for norm in norms.DUALS),
    attacks.CarliniWagner(steps=20, search_steps=3, initial_weight=0.1),
    *(  # a threshold that asks nothing
        attacks.EvasiveCarliniWagner(steps=5, search_steps=2, threshold=1e3, statistic=statistic)
        for statistic in ("loss", "model")
    ),
    *(
        attack
        for norm in ("l2", "linf")
        for attack in (
            attacks.AutoPGD(norm=norm, steps=9, restarts=2),
            attacks.AutoPGD(norm=norm, loss="targeted_dlr", steps=9, targets=2),
            attacks.FastAdaptiveBoundary(norm=norm, steps=7),
            attacks.Square(norm=norm, queries=30),
        )
    ),
]


COMPILED, EAGER = NATIVE, []
if BACKEND == "tensorflow":
    COMPILED = [
        *NATIVE,
        *(attacks.CleverHansFGSM(norm=norm) for norm in norms.DUALS),
        *(
            getattr(attacks, f"CleverHans{name}")(norm=norm, steps=9)
            for name in ("BIM", "PGD", "MIM")
            for norm in ("l2", "linf")
        ),
        attacks.CleverHansCW(steps=200, step_size=1e-2),
        attacks.CleverHansSPSA(steps=10, samples=64),
    ]
if BACKEND == "tensorflow" and importlib.util.find_spec("foolbox"):
    EAGER = [
        attacks.FoolboxBoundary(steps=40),
        *(
            attacks.FoolboxHopSkipJump(norm=norm, steps=1, initial_samples=5)
            for norm in ("l2", "linf")
        ),
    ]


@pytest.mark.parametrize("attack", [*COMPILED, *EAGER], ids=str)
def test_what_an_attack_reports_is_so(attack, separating):
    epsilon = {"epsilon": 0.3} if attack.fixed_epsilon else {}
    result = attack(*separating, batch_size=5, **epsilon)
    assert_is_so(result, attack.norm, *separating)
    if attack.fixed_epsilon:
        assert result.distance[result.success].max() <= 0.3 * (1 + 1e-4) + 1e-5


@pytest.mark.parametrize("attack", COMPILED, ids=str)
def test_an_attack_is_a_function_of_its_seed_and_compiled_once(attack, separating):
    classifier, images, labels = separating
    model = CompiledClassifier(counted(classifier))
    results, calls = [], []
    for epsilon in (0.3, 0.3, "8/255"):
        radius = {"epsilon": epsilon} if attack.fixed_epsilon else {}
        results.append(attack(model, images, labels, batch_size=4, seed=3, **radius))
        calls.append(Counted.calls)
    assert calls[0] == calls[1] == calls[2]
    np.testing.assert_array_equal(results[0].x_adv, results[1].x_adv)
    np.testing.assert_array_equal(results[0].queries, results[1].queries)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="there they can be had")
@pytest.mark.parametrize("name", attacks.TENSORFLOW_ATTACKS)
def test_attacks_on_tensorflow_models_say_what_they_need(name):
    with pytest.raises(ImportError, match="set KERAS_BACKEND=tensorflow, got 'jax'"):
        getattr(attacks, name)


def test_an_unknown_attack_names_the_others():
    with pytest.raises(AttributeError, match="CleverHansPGD"):
        _ = attacks.CleverHansPDG


@pytest.mark.parametrize("norm", sorted(norms.DUALS))
def test_pgd_raises_the_loss_of_every_example(norm):
    classifier, (images, labels) = net(dtype="float32", batch_norm=True), batch(dtype="float32")
    model = CompiledClassifier(classifier)
    for steps in (1, 10):
        attack = attacks.ProjectedGradient(norm=norm, steps=steps)
        x_adv, _ = attack.search(Batch(model, images, labels, 0.5, seed=0))
        assert np.all(losses(classifier, x_adv, labels) > losses(classifier, images, labels))
        x_adv, _ = attack.search(Batch(model, images, labels, 0.0, seed=0))
        np.testing.assert_array_equal(x_adv, images)


def test_pgd_finds_the_optimum_of_a_linear_classifier():
    model, images, labels, w = linear()
    margin = 0.2 / np.linalg.norm(w)
    attack = attacks.ProjectedGradient(norm="l2", steps=20)
    assert attack(model, images, labels, epsilon=0.98 * margin).success.tolist() == [False] * 2 + [
        True
    ]
    result = attack(model, images, labels, epsilon=1.02 * margin)
    assert result.success.all()
    np.testing.assert_allclose(result.distance, [1.02 * margin] * 2 + [0], rtol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("norm", sorted(norms.DUALS))
def test_large_logits_lose_no_attack_on_a_linear_classifier(norm, factor):
    model, images, labels, w = linear()
    epsilon = float(1.02 * 0.2 / np.linalg.norm(w, DUAL_ORDER[norm]))
    model = scaled(model, factor)
    assert attacks.ProjectedGradient(norm=norm)(
        model, images, labels, epsilon=epsilon
    ).success.all()
    if factor > 1e3:  # the attack as published has no gradient
        plain = attacks.ProjectedGradient(norm=norm, temper=False)
        assert not plain(model, images, labels, epsilon=epsilon).success[:2].any()


@pytest.mark.parametrize("factor", [100.0, 1e4, 1e6])
@pytest.mark.parametrize(
    ("attack", "epsilon"),
    [
        (attacks.ProjectedGradient(norm="l2"), 0.55),
        (attacks.ProjectedGradient(norm="linf"), 0.1),
        (attacks.DecoupledDirectionNorm(), None),
    ],
    ids=str,
)
def test_large_logits_lose_no_attack(attack, epsilon, factor, separating):
    classifier, images, labels = separating
    plain = attack(classifier, images, labels, epsilon=epsilon)
    large = attack(scaled(classifier, factor), images, labels, epsilon=epsilon)
    assert 3 < plain.success.sum() <= large.success.sum()
    if epsilon is None:
        assert np.all(large.distance <= 1.02 * plain.distance)


def test_tempering_leaves_ordinary_margins_as_they_are():
    logits = np.float32([[3, 12.5, 3, 1], [3, 13.5, 3, 1], [3e9, 2e9, 0, 1], [0, 500, 100, 0]])
    labels = np.array([1, 1, 1, 1])
    one, two, three, four = keras.ops.convert_to_numpy(tempered(logits, labels))
    np.testing.assert_array_equal(one, logits[0])
    np.testing.assert_array_equal(three, logits[2])  # misclassified: its gradient is there
    np.testing.assert_allclose([two[1] - two[0], four[1] - four[2]], 10, rtol=1e-6)


def test_restarts_only_add_successes_and_differ_by_seed(separating):
    classifier, images, labels = separating
    once = attacks.ProjectedGradient(norm="linf", steps=2, random_start=True)
    often = attacks.ProjectedGradient(norm="linf", steps=2, random_start=True, restarts=5)
    few, many = (a(classifier, images, labels, epsilon=0.1) for a in (once, often))
    assert np.all(many.success >= few.success)
    np.testing.assert_array_equal(many.x_adv[few.success], few.x_adv[few.success])
    model = CompiledClassifier(classifier)
    one, other = (once.search(Batch(model, images, labels, 0.1, seed))[0] for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-3


def test_the_attack_follows_weights_that_change_later():
    classifier, (images, labels) = net(dtype="float32"), batch(dtype="float32")
    model = CompiledClassifier(classifier)
    attack = attacks.ProjectedGradient(norm="l2", steps=3)
    before, _ = attack.search(Batch(model, images, labels, 0.5, seed=0))
    classifier.set_weights([-weights for weights in classifier.get_weights()])
    assert np.abs(attack.search(Batch(model, images, labels, 0.5, seed=0))[0] - before).max() > 1e-3


def test_an_interrupted_attack_goes_on_with_the_next_batch(separating, tmp_path):
    classifier, images, labels = separating
    attack = attacks.ProjectedGradient(norm="l2", steps=3, random_start=True)
    arguments = {"epsilon": 0.3, "batch_size": 4}
    whole = attack(classifier, images, labels, **arguments)
    attack(classifier, images, labels, **arguments, resume_dir=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())}
    assert len(kept) == 3
    last, _ = kept.popitem()
    last.unlink()  # as if the attack had been stopped in its last batch
    resumed = attack(classifier, images, labels, **arguments, resume_dir=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in ("x_adv", "success", "distance", "queries"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    with pytest.raises(ValueError, match="holds another call's results"):
        attack(classifier, images, labels, epsilon=0.2, batch_size=4, resume_dir=tmp_path)


def test_a_perturbation_outside_ball_or_bounds_is_no_success():
    class Cheating(attacks.Attack):
        fixed_epsilon = True

        def search(self, batch):
            _, images, _, epsilon, _ = batch
            x_adv = images + np.float32(2 * epsilon)
            x_adv[1] = 1.5
            return x_adv, np.ones(len(images), int)

    model, images, labels, _ = linear()
    result = Cheating(norm="linf")(model, images, labels, epsilon=0.1)
    assert result.success.tolist() == [False, False, True]


@pytest.mark.parametrize("side", [8, 224])
@pytest.mark.parametrize("norm", sorted(norms.DUALS))
def test_the_ball_is_as_large_for_large_images(norm, side):
    """Projection in float32 stays inside it; one percent more does not."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Moved(attacks.Attack):
        fixed_epsilon = True
        factor: float

        def fools(self, model, images, labels):
            return np.any(images != clean, axis=(1, 2, 3))

        def search(self, batch):
            _, images, _, epsilon, _ = batch
            radius = np.float32(self.factor * epsilon)
            moved = images + norms.project(3 * radius * unit, self.norm, radius)
            return keras.ops.convert_to_numpy(moved), np.ones(len(images), int)

    random = np.random.default_rng(0)
    clean = random.uniform(0.3, 0.7, (2, side, side, 3)).astype("float32")
    unit = random.laplace(size=clean.shape).astype("float32")
    unit /= keras.ops.convert_to_numpy(norms.length(unit, norm))[:, None, None, None]
    layers = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)]
    model, labels = keras.Sequential([keras.Input((None, None, 3)), *layers]), np.zeros(2, int)
    for epsilon in (1e-2 if norm == "l1" else 1e-3, 8 / 255, 0.2 if norm == "linf" else 0.5):
        for factor in (1.0, 1.01, 1.4):
            attack = Moved(norm=norm, factor=factor)
            result = attack(model, clean, labels, epsilon=epsilon)
            assert result.success.all() == result.success.any() == (factor == 1)
            if factor == 1:
                np.testing.assert_allclose(result.distance, epsilon, rtol=5e-3)


def test_the_classifier_itself_confirms_what_its_fused_clone_finds(separating):
    """Here the clone has the signs of all logits wrong."""
    classifier, images, labels = separating
    model = CompiledClassifier(classifier)
    model._clone = scaled(classifier, -1.0)
    for attack, epsilon in (
        (attacks.ProjectedGradient(steps=3), 0.1),
        (attacks.FastMinimumNorm(steps=3), None),
        (attacks.EvasiveCarliniWagner(steps=3, search_steps=1, threshold=1e3), None),
    ):
        result = attack(model, images, labels, epsilon=epsilon)
        predicted = classifier.predict(result.x_adv, verbose=0).argmax(axis=1)
        np.testing.assert_array_equal(predicted != labels, result.success)
        assert not result.success.all()


def test_a_result_says_what_it_found():
    result = attacks.AttackResult(
        x_adv=np.zeros((4, 1, 1, 1), "float32"),
        success=np.array([True, True, False, True]),
        distance=np.float32([0.5, 0, np.inf, 0.25]),
        queries=np.array([3, 0, 3, 3]),
    )
    assert result.robust_accuracy == 0.25
    assert result.median_distance == 0.375
    stands = dataclasses.replace(
        result, success=np.zeros(4, bool), distance=np.full(4, np.inf, "float32")
    )
    assert stands.robust_accuracy == 1
    assert stands.median_distance == np.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs an epsilon"),
        ({"epsilon": -1}, "epsilon must be a number >= 0"),
        ({"epsilon": 0.1, "batch_size": 0}, "batch_size must be a whole number"),
        ({"epsilon": 0.1, "labels": [1]}, "images and labels must be as many"),
    ],
)
def test_bad_arguments_of_an_attack(arguments, message):
    model, images, labels, _ = linear()
    arguments = {"labels": labels, **arguments}
    with pytest.raises(ValueError, match=message):
        attacks.ProjectedGradient()(model, images, **arguments)
    with pytest.raises(ValueError, match="looks for the smallest one: omit epsilon"):
        attacks.FastMinimumNorm()(model, images, labels, epsilon=0.1)


BAD_ARGUMENTS = [
    ("ProjectedGradient", {"restarts": 2}, "restarts must be 1 without random_start"),
    *((name, {"norm": "l1"}, "norm must be one of") for name in ("AutoPGD", "AutoAttack")),
    *((name, {"norm": "l1"}, "norm must be one of") for name in ("FastAdaptiveBoundary", "Square")),
    ("AutoPGD", {"loss": "cw"}, "loss must be one of"),
    ("AutoPGD", {"targets": 0}, "targets must be a whole number >= 1"),
    ("FastAdaptiveBoundary", {"steps": 0}, "steps must be a whole number >= 1"),
    ("Square", {"queries": 0}, "queries must be a whole number >= 1"),
    ("DecoupledDirectionNorm", {"norm": "linf"}, "norm must be one of"),
    ("FastMinimumNorm", {"steps": 0}, "steps must be a whole number >= 1"),
    ("CarliniWagner", {"step_size": 0}, "step_size must be a number > 0"),
    ("CarliniWagner", {"search_steps": 0}, "search_steps must be a whole number >= 1"),
    ("EvasiveCarliniWagner", {"threshold": 0}, "threshold must be a number > 0"),
    ("EvasiveCarliniWagner", {"threshold": 1, "statistic": "f"}, "statistic must be one of"),
    ("CleverHansPGD", {"norm": "l1"}, "norm must be one of"),
    ("CleverHansMIM", {"relative_step": 2.0}, "relative_step must be a number"),
    ("CleverHansCW", {"norm": "linf"}, "norm must be one of"),
    ("CleverHansSPSA", {"samples": 3}, "samples must be even"),
    ("FoolboxBoundary", {"norm": "linf"}, "norm must be one of"),
    ("FoolboxBoundary", {"steps": 0}, "steps must be a whole number >= 1"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD_ARGUMENTS)
def test_bad_settings(name, arguments, message):
    if name in attacks.TENSORFLOW_ATTACKS:
        pytest.importorskip(attacks.TENSORFLOW_ATTACKS[name])
        if BACKEND != "tensorflow":
            pytest.skip("for TensorFlow")
    with pytest.raises(ValueError, match=message):
        getattr(attacks, name)(**arguments)


def test_loss_statistics_are_those_of_single_images(digits):
    _, test = digits
    few = test.take(np.arange(6), "few")
    images = few.images.astype("float32") / 255
    classifier = tvkeras.models.build("small_cnn", 10, width=4, activation="softplus")
    model = CompiledClassifier.of(classifier)
    found, predicted, sizes = loss_statistics(model, few.images, few.labels, "linf", batch_size=4)
    np.testing.assert_allclose(found, losses(classifier, images, few.labels), rtol=1e-4)
    np.testing.assert_array_equal(predicted, classifier.predict_on_batch(images).argmax(axis=1))
    for image, label, size in zip(images, few.labels, sizes, strict=True):
        shifts = 1e-2 * np.eye(64, dtype="float32").reshape(64, 8, 8, 1)
        values = losses(
            classifier, np.concatenate([image + shifts, image - shifts]), np.full(128, label)
        )
        l1 = np.abs(values[:64] - values[64:]).sum() / 2e-2
        assert size == pytest.approx(l1, rel=1e-2)
