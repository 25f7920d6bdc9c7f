import sys

import pytest

from tests.conftest import BACKEND, DUAL_ORDER, assert_is_so, linear

if BACKEND != "tensorflow":
    pytest.skip("Foolbox attacks TensorFlow models", allow_module_level=True)

pytest.importorskip("foolbox")

import eagerpy
import foolbox
import numpy as np
import tensorflow as tf

from tvkeras import attacks, norms
from tvkeras.inference import CompiledClassifier

QUICK = [
    attacks.FoolboxBoundary(steps=40),
    attacks.FoolboxHopSkipJump(norm="l2", steps=1, initial_samples=5),
    attacks.FoolboxHopSkipJump(norm="linf", steps=1, initial_samples=5),
]

ALONG_BOUNDARY = [  # numba compiles each norm's solver for half a minute
    pytest.param(attacks.FoolboxBrendelBethge(norm=norm, steps=200), marks=pytest.mark.slow)
    for norm in sorted(norms.DUALS)
]


def test_results_are_a_function_of_the_seed(separating):
    classifier, images, labels = separating
    model = CompiledClassifier(classifier)
    attack = attacks.FoolboxBoundary(steps=30)
    one, again, other = (attack(model, images, labels, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.x_adv, again.x_adv)
    assert np.abs(one.x_adv - other.x_adv).max() > 1e-4
    assert one.success.all()


@pytest.mark.parametrize(
    ("attack", "excess"),
    [
        (attacks.FoolboxBoundary(steps=150), 1.0),
        (attacks.FoolboxHopSkipJump(steps=2, initial_samples=60), 0.3),
        *(pytest.param(*param.values, 0.01, marks=param.marks) for param in ALONG_BOUNDARY),
    ],
    ids=str,
)
def test_distances_of_a_linear_classifier(attack, excess):
    model, images, labels, w = linear()
    images[2] += 0.02 * np.sign(w).reshape(4, 4, 1)  # another class, to start from
    margin = 0.2 / np.linalg.norm(w, DUAL_ORDER[attack.norm])
    result = attack(model, images, labels)
    assert result.success.all()
    assert np.all(result.distance[:2] >= 0.999 * margin)
    assert np.all(result.distance[:2] <= (1 + excess) * margin)


@pytest.mark.parametrize("attack", ALONG_BOUNDARY, ids=str)
def test_the_boundary_leads_as_near_as_fmn_comes(attack, separating):
    model = CompiledClassifier(separating[0])
    fmn = attacks.FastMinimumNorm(norm=attack.norm)(model, *separating[1:])
    along = attack(model, *separating[1:], batch_size=5)
    assert_is_so(along, attack.norm, *separating)
    assert along.success.all()
    attacked = along.queries > 0
    assert set(along.queries[attacked]) == {1 + 10 + 200}  # start, bisection, steps
    assert np.median(along.distance[attacked] / fmn.distance[attacked]) <= 1.02


@pytest.mark.slow
def test_an_example_walks_the_boundary_whatever_its_batch(separating):
    classifier, images, labels = separating
    attack = attacks.FoolboxBrendelBethge(steps=20, pool=images)
    together, apart = (attack(classifier, images, labels, batch_size=size) for size in (12, 3))
    np.testing.assert_allclose(together.distance, apart.distance, rtol=1e-3)

    model, images, labels, w = linear()
    start = tf.constant(images[:1] + 0.4 * np.sign(w).reshape(1, 4, 4, 1), tf.float32)
    upstream = foolbox.attacks.L2BrendelBethgeAttack(steps=2, lr=1e-4)
    distances = []
    for count in (1, 64):
        x_adv = upstream.run(
            foolbox.TensorFlowModel(model, bounds=(0, 1), device="/CPU:0"),
            tf.repeat(images[:1], count, axis=0),
            foolbox.criteria.Misclassification(tf.constant([0] * count, tf.int64)),
            starting_points=tf.repeat(start, count, axis=0),
        )
        distances.append(np.linalg.norm(x_adv[0] - images[0]))
    assert distances[1] < 0.9 * distances[0]  # upstream's steps lengthen with the batch


def test_queries_are_the_calls_of_the_model():
    model, images, labels, w = linear()
    images[2] += 0.02 * np.sign(w).reshape(4, 4, 1)
    labels[2] = 0
    calls = []

    class Recorded(CompiledClassifier):
        def logits(self, images):
            calls.append(len(images))
            return super().logits(images)

    def asked(attack):
        calls.clear()
        queries = attack(Recorded(model), images, labels).queries
        assert queries[2] == 0  # misclassified to begin with
        return queries[:2]

    together = asked(attacks.FoolboxBoundary(steps=20))
    assert together.tolist() == [1 + 20 + 2] * 2  # the start, the steps, every tenth again
    assert calls.count(2) == 23
    alone = asked(attacks.FoolboxHopSkipJump(steps=1, initial_samples=10))
    assert alone.sum() == calls.count(1) + 10 * calls.count(10)
    assert calls.count(10) == 2  # an estimate of each image


def test_an_image_starts_from_the_nearest_one_of_another_class():
    model, images, labels, w = linear()
    toward = np.sign(w).reshape(1, 4, 4, 1)
    model = CompiledClassifier(model)
    pool = np.concatenate([images[:1] - 0.01 * toward, images[:1] + 0.3 * toward])
    pool = np.concatenate([pool, images[:1] + 0.1 * toward]).astype("float32")
    attack = attacks.FoolboxBoundary(steps=1, pool=pool)
    rows, starts = attack.prepared(model, images, labels)
    assert rows.tolist() == [0, 1]
    np.testing.assert_array_equal(starts[:2], pool[[2, 2]])
    assert attack(model, images, labels).success.all()
    alone = attacks.FoolboxBoundary(steps=1)(model, images[:2], labels[:2])
    assert not alone.success.any()  # no image of another class: no start, and no error
    assert alone.queries.tolist() == [0, 0]
    other = attacks.FoolboxBoundary(steps=1, pool=pool[1:])
    assert repr(other) != repr(attack)
    assert other != attack
    assert attack == attacks.FoolboxBoundary(steps=1, pool=pool.copy())


def test_upstreams_normal_is_a_unit_vector_for_one_example_alone():
    images = eagerpy.astensor(tf.random.stateless_uniform((4, 4, 4, 1), seed=(0, 0)))
    attack = foolbox.attacks.HopSkipJumpAttack()
    for part in (images, images[:1]):
        normal = attack.approximate_gradients(
            lambda x: x.sum(axis=(1, 2, 3)) > 8.0, part, 50, eagerpy.ones(part, len(part)) * 0.1
        )
        assert np.linalg.norm(normal.numpy()) == pytest.approx(1, rel=1e-3)  # of all together


@pytest.mark.parametrize("attack", QUICK, ids=str)
def test_what_the_classifier_does_not_confirm_is_no_success(attack):
    model, images, labels, _ = linear()
    weights, _ = model.get_weights()
    model.set_weights([0 * weights, np.array([2.0, 0.0], "float32")])  # class 0 whatever it sees
    result = attack(model, images, labels)
    assert result.success.tolist() == [False, False, True]
    np.testing.assert_array_equal(result.x_adv, images)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "tvkeras.attacks.foolbox")
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(ImportError, match=r"pip install 'tvkeras\[foolbox\]'"):
        _ = attacks.FoolboxBoundary
