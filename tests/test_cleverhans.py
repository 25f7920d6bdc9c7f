import pytest

from tests.conftest import BACKEND, DUAL_ORDER, linear, scaled

if BACKEND != "tensorflow":
    pytest.skip("CleverHans attacks TensorFlow models", allow_module_level=True)

import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.basic_iterative_method import basic_iterative_method
from cleverhans.tf2.attacks.carlini_wagner_l2 import CarliniWagnerL2
from cleverhans.tf2.attacks.momentum_iterative_method import momentum_iterative_method
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent
from cleverhans.tf2.attacks.spsa import spsa

from tvkeras import attacks, norms
from tvkeras.attacks.base import Batch
from tvkeras.inference import CompiledClassifier

IN_BALL = [
    *(attacks.CleverHansFGSM(norm=norm) for norm in norms.DUALS),
    attacks.CleverHansBIM(norm="l2", steps=9),
    attacks.CleverHansBIM(norm="linf", steps=9),
    attacks.CleverHansPGD(norm="l2", steps=9),
    attacks.CleverHansPGD(norm="linf", steps=9),
    attacks.CleverHansMIM(norm="l2", steps=9),
    attacks.CleverHansMIM(norm="linf", steps=9),
]
CW = attacks.CleverHansCW(steps=200, step_size=1e-2)
SPSA = attacks.CleverHansSPSA(steps=10, samples=64)


@pytest.mark.parametrize("attack", [*IN_BALL, attacks.CleverHansSPSA(steps=20)], ids=str)
def test_the_optimum_of_a_linear_classifier(attack):
    model, images, labels, w = linear()
    model = CompiledClassifier(model)
    margin = 0.2 / np.linalg.norm(w, DUAL_ORDER[attack.norm])
    below = attack(model, images, labels, epsilon=float(0.98 * margin))
    assert below.success.tolist() == [False, False, True]
    assert attack(model, images, labels, epsilon=float(1.05 * margin)).success.all()
    none = attack(model, images, labels, epsilon=0)
    assert none.success.tolist() == [False, False, True]
    np.testing.assert_array_equal(none.x_adv, images)


def test_fgsm_takes_its_step_along_the_gradient_of_a_linear_classifier():
    model, images, labels, w = linear()
    model = CompiledClassifier(model)
    toward = w.reshape(4, 4, 1)  # the wrong class's weights less the right one's
    for norm, direction in [("l2", toward / np.linalg.norm(w)), ("linf", np.sign(toward))]:
        attack = attacks.CleverHansFGSM(norm=norm)
        x_adv, queries = attack.search(Batch(model, images[:2], labels[:2], 0.1, seed=0))
        np.testing.assert_allclose(x_adv, images[:2] + 0.1 * direction[None], atol=1e-6)
        assert queries.tolist() == [1, 1]


@pytest.mark.parametrize(
    "attack", [attacks.CleverHansPGD(steps=1, relative_step=0.1), SPSA], ids=str
)
def test_another_seed_is_another_result(attack, separating):
    classifier, images, labels = separating
    model = CompiledClassifier(classifier)
    one, other = (attack.search(Batch(model, images, labels, 0.2, seed))[0] for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_bim_is_the_native_pgd(norm, separating):
    classifier, images, labels = separating
    model = CompiledClassifier(classifier)
    bim = attacks.CleverHansBIM(norm=norm, steps=9)
    pgd = attacks.ProjectedGradient(norm=norm, steps=9)
    one, other = (a.search(Batch(model, images, labels, 0.1, seed=0))[0] for a in (bim, pgd))
    assert np.mean(np.abs(one - other) < 1e-3) > 0.99  # a sign may flip where a gradient is tiny


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["BIM", "MIM"])
def test_ordinary_gradients_lead_where_upstream_goes(name, norm, separating):
    classifier, images, labels = separating
    attack = getattr(attacks, f"CleverHans{name}")(norm=norm, steps=9)
    found, _ = attack.search(Batch(CompiledClassifier(classifier), images, labels, 0.1, seed=0))
    upstream = {"BIM": projected_gradient_descent, "MIM": momentum_iterative_method}[name]
    expected = upstream(
        lambda x: classifier(x, training=False),
        tf.constant(images),
        eps=0.1,
        eps_iter=0.1 * 2.5 / 9,
        nb_iter=9,
        norm={"l2": 2, "linf": np.inf}[norm],
        clip_min=0.0,
        clip_max=1.0,
        y=tf.constant(labels),
        sanity_checks=False,
    )
    assert np.mean(np.abs(found - expected) < 1e-3) > 0.98


def test_tiny_gradients_lose_no_attack(separating):
    classifier, images, labels = separating
    steep = scaled(classifier, 20.0)
    right = steep.predict(images, verbose=0).argmax(axis=1) == labels
    arguments = {"eps": 1.0, "eps_iter": 0.125, "nb_iter": 20, "norm": 2}
    plain = projected_gradient_descent(
        lambda x: steep(x, training=False),
        images,
        y=tf.constant(labels),
        clip_min=0.0,
        clip_max=1.0,
        **arguments,
    )
    lost = steep.predict(plain.numpy(), verbose=0).argmax(axis=1) == labels
    for kind in (attacks.CleverHansBIM, attacks.CleverHansPGD, attacks.CleverHansMIM):
        found = kind(norm="l2", steps=20)(steep, images, labels, epsilon=1.0).success
        assert np.all(found | lost)
        assert np.sum(found & lost & right) >= 10
        assert np.array_equal(
            found, kind(norm="l2", steps=20)(classifier, images, labels, epsilon=1.0).success
        )


def test_cw_finds_the_distance_of_a_linear_classifier_and_its_confidence():
    model, images, labels, w = linear()
    for confidence in (0.0, 0.5):
        attack = attacks.CleverHansCW(steps=200, step_size=1e-2, confidence=confidence)
        result = attack(model, images, labels)
        assert result.success.all()
        margin = (0.2 + confidence) / np.linalg.norm(w)
        np.testing.assert_allclose(result.distance, [margin] * 2 + [0], rtol=5e-3)
        logits = model.predict(result.x_adv[:2], verbose=0)
        assert np.all(logits[:, 1] - logits[:, 0] >= confidence)
    assert result.queries.tolist() == [1000, 1000, 0]


def test_the_constant_of_cw_is_an_examples_own():
    model, images, _, _ = linear()
    rng = np.random.default_rng(1)
    several = np.concatenate([images[:2], 0.5 + 0.05 * rng.normal(size=(6, 4, 4, 1))])
    several = several.astype("float32")
    classes = model.predict(several, verbose=0).argmax(axis=1)
    model = CompiledClassifier(model)
    together, _ = CW.search(Batch(model, several, classes, None, seed=0))
    alone, _ = CW.search(Batch(model, several[3:4], classes[3:4], None, seed=0))
    np.testing.assert_allclose(together[3], alone[0], atol=1e-5)


def test_spsa_counts_its_samples_and_stops_at_a_success():
    model, images, labels, w = linear()
    margin = 0.2 / np.abs(w).sum()
    failed = SPSA(model, images, labels, epsilon=float(0.5 * margin))
    assert failed.queries.tolist() == [10 * 65, 10 * 65, 0]  # 64 samples and the point itself
    found = SPSA(model, images, labels, epsilon=float(5 * margin))
    assert found.success.all()
    assert np.all(found.queries[:2] < 10 * 65)
    assert np.all(found.queries % 65 == 0)


def one_sided(model, images, labels):
    x_adv = momentum_iterative_method(
        model, images, eps=0.6, eps_iter=0.3, nb_iter=3, norm=np.inf, clip_max=1.0, y=labels
    )
    tf.debugging.assert_less_equal(x_adv, 1.0)


UPSTREAM = {
    "bim": lambda model, images, labels: basic_iterative_method(
        model, images, 0.1, 0.1, 2, np.inf, clip_min=0.0, clip_max=1.0, y=labels
    ),
    "mim": one_sided,
    "cw": lambda model, images, labels: CarliniWagnerL2(model).attack(images),
    "spsa": lambda model, images, labels: spsa(
        model, images[:1], labels[:1], 0.1, 2, clip_min=0.0, clip_max=1.0
    ),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_still_needs_its_corrections(name):
    model, images, labels, _ = linear()
    with pytest.raises((TypeError, ValueError, tf.errors.InvalidArgumentError)):
        UPSTREAM[name](model, tf.constant(images), tf.constant(labels))
