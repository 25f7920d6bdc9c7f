"""What the minimum-distance attacks find, against references and hand computation."""

import keras
import numpy as np
import pytest

from tests.conftest import BACKEND, DUAL_ORDER, linear
from tvkeras import attacks

SETTINGS = {"steps": 40, "search_steps": 3, "initial_weight": 0.1}

foolbox_backend = pytest.mark.skipif(BACKEND != "tensorflow", reason="Foolbox has no Keras JAX")


def foolbox_distance(attack, classifier, images, labels):
    """l2 distance of Foolbox's adversarial images that are misclassified, else inf."""
    fb = pytest.importorskip("foolbox")
    model = fb.TensorFlowModel(classifier, bounds=(0, 1))
    x, y = (keras.ops.convert_to_tensor(a) for a in (images, labels.astype("int64")))
    x_adv = keras.ops.convert_to_numpy(attack.run(model, x, fb.criteria.Misclassification(y)))
    wrong = classifier.predict(x_adv, verbose=0).argmax(axis=1) != labels
    return np.where(
        wrong, np.linalg.norm((x_adv - images).reshape(len(images), -1), axis=1), np.inf
    )


@pytest.mark.parametrize(
    "attack",
    [
        attacks.DecoupledDirectionNorm(),
        attacks.CarliniWagner(steps=400),
        *(attacks.FastMinimumNorm(norm=norm) for norm in DUAL_ORDER),
    ],
    ids=str,
)
def test_the_distance_of_a_linear_classifier(attack):
    model, images, labels, w = linear()
    result = attack(model, images, labels)
    expected = 0.2 / np.linalg.norm(w, DUAL_ORDER[attack.norm])
    assert result.success.all()
    np.testing.assert_allclose(result.distance, [expected, expected, 0], rtol=5e-3)
    assert result.distance[0] >= expected * (1 - 1e-4)


@pytest.mark.parametrize("norm", sorted(DUAL_ORDER))
def test_fmn_goes_on_where_pixels_are_at_their_bounds(norm):
    model, images, labels, w = linear()
    w = w.reshape(images[0].shape)
    helpful = np.abs(w) < np.median(np.abs(w))  # the only pixels that can still move
    images[:] = np.where(helpful, 0.5, w > 0)
    kernel, _ = model.get_weights()
    model.set_weights([kernel, np.array([0.2, 0.0]) - images[0].ravel() @ kernel])
    distance = 0.2 / np.linalg.norm(w[helpful], DUAL_ORDER[norm])
    result = attacks.FastMinimumNorm(norm=norm)(model, images[:1], labels[:1])
    np.testing.assert_allclose(result.distance, distance, rtol=1e-2)


def test_fmn_and_ddn_agree_in_l2(separating):
    classifier, images, labels = separating
    fmn, ddn = (
        attack(classifier, images, labels)
        for attack in (attacks.FastMinimumNorm(), attacks.DecoupledDirectionNorm())
    )
    assert fmn.success.all()
    assert ddn.success.all()
    assert np.median(np.abs(fmn.distance - ddn.distance)) <= 0.02 * np.median(ddn.distance)


@foolbox_backend
def test_ddn_is_foolbox_s(separating):
    fb = pytest.importorskip("foolbox")
    ours = attacks.DecoupledDirectionNorm(steps=50)(*separating)
    theirs = foolbox_distance(fb.attacks.DDNAttack(steps=50), *separating)
    moved = ours.queries > 0
    np.testing.assert_allclose(ours.distance[moved], theirs[moved], rtol=1e-4)


@foolbox_backend
def test_carlini_wagner_is_foolbox_s_image_by_image(separating):
    fb = pytest.importorskip("foolbox")
    classifier, images, labels = separating
    ours = attacks.CarliniWagner(**SETTINGS)(classifier, images, labels)
    reference = fb.attacks.L2CarliniWagnerAttack(steps=40, binary_search_steps=3, initial_const=0.1)
    moved = np.flatnonzero(ours.queries)[:2]
    theirs = [foolbox_distance(reference, classifier, images[[i]], labels[[i]])[0] for i in moved]
    assert np.isfinite(theirs).all()
    np.testing.assert_allclose(ours.distance[moved], theirs, rtol=1e-4)


def test_carlini_wagner_reports_failure_as_failure(separating):
    attack = attacks.CarliniWagner(steps=2, search_steps=1, initial_weight=1e-6)
    result = attack(*separating)
    attacked = result.queries > 0
    assert not result.success[attacked].any()
    assert np.all(np.isinf(result.distance[attacked]))
    np.testing.assert_array_equal(result.x_adv, separating[1])


def test_an_example_s_result_does_not_depend_on_its_batch(separating):
    classifier, images, labels = separating
    attack = attacks.CarliniWagner(**SETTINGS)
    together = attack(classifier, images, labels, batch_size=12)
    apart = attack(classifier, images, labels, batch_size=3)
    np.testing.assert_allclose(together.distance, apart.distance, rtol=1e-4)
    np.testing.assert_array_equal(together.queries, apart.queries)
    assert len(set(together.queries[together.queries > 0])) > 1  # they stop at their own time


@pytest.mark.skipif(BACKEND != "tensorflow", reason="loops run eagerly under TensorFlow alone")
@pytest.mark.parametrize(
    "attack",
    [
        attacks.DecoupledDirectionNorm(steps=3),
        attacks.FastMinimumNorm(steps=3),
        attacks.CarliniWagner(steps=5, search_steps=2),
        attacks.EvasiveCarliniWagner(steps=3, search_steps=2, threshold=0.1),
        attacks.EvasiveCarliniWagner(steps=3, search_steps=2, threshold=0.1, statistic="model"),
    ],
    ids=str,
)
def test_queries_are_the_model_calls_made(attack):
    model, images, labels, _ = linear()
    calls = []

    def logits(x):
        calls.append(1)
        return model(x)

    x, y = (keras.ops.convert_to_tensor(a[:1]) for a in (images, labels))
    _, queries = attack.perturb(logits, x, y, None, None)
    assert keras.ops.convert_to_numpy(queries).tolist() == [len(calls)]
