import gc
import json
import weakref

import keras
import numpy as np
import pytest
from keras import layers

from tests.conftest import DUAL_ORDER, Counted, counted, linear, net
from tvkeras import attacks
from tvkeras.detection import GradientNormDetector, gradient_norms, roc
from tvkeras.inference import STATISTICS, CompiledClassifier

SETTINGS = {"steps": 150, "search_steps": 6, "initial_weight": 0.1}


@pytest.mark.parametrize("norm", sorted(DUAL_ORDER))
def test_the_statistics_of_a_linear_classifier(norm):
    model, _, _, w = linear()
    images = np.random.default_rng(1).random((5, 4, 4, 1)).astype("float32")
    margin = -np.diff(model.predict(images, verbose=0), axis=1)[:, 0]
    p = 1 / (1 + np.exp(-np.abs(margin)))  # of the predicted class
    size = np.linalg.norm(w, DUAL_ORDER[norm])
    loss, jacobian = (gradient_norms(model, images, norm, s, batch_size=2) for s in STATISTICS)
    np.testing.assert_allclose(loss, (1 - p) * size, rtol=1e-4)
    np.testing.assert_allclose(jacobian, p * (1 - p) * size, rtol=1e-4)


def test_the_model_statistic_is_the_largest_row_of_the_jacobian():
    classifier = net(dtype="float32")
    image = np.random.default_rng(0).random((1, 6, 6, 2)).astype("float32")
    shifts = 1e-2 * np.eye(72, dtype="float32").reshape(72, 6, 6, 2)
    logits = classifier.predict(np.concatenate([image + shifts, image - shifts]), verbose=0)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.linalg.norm(p[:72] - p[72:], axis=0) / 2e-2
    assert np.argmax(rows) != 0
    np.testing.assert_allclose(
        gradient_norms(classifier, image, "l2", "model"), rows.max(), rtol=2e-3
    )


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_false_positive_rate_holds_on_other_images(statistic):
    model = CompiledClassifier(net(dtype="float32"))
    images = np.random.default_rng(0).random((2400, 6, 6, 2)).astype("float32")
    for rate in (0.01, 0.05, 0.2):
        detector = GradientNormDetector.fit(model, images[:1200], rate, statistic=statistic)
        assert detector.detects(model, images[:1200]).sum() == int(rate * 1201)
        found = detector.detects(model, images[1200:]).mean()
        assert abs(found - rate) <= 4 * np.sqrt(2 * rate * (1 - rate) / 1200)
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(detector)))
        assert keras.saving.deserialize_keras_object(config).get_config() == {
            **{"norm": "l2", "statistic": statistic, "threshold": detector.threshold},
            "false_positive_rate": rate,
        }


def test_images_of_large_gradient_are_detected():
    classifier, _, _, w = linear()
    model = CompiledClassifier(classifier)
    w = w.reshape(4, 4, 1)
    sides = np.linspace(-0.5, 0.5, 101)[:, None, None, None]
    images = (0.5 + sides * np.sign(w)).astype("float32")  # across the boundary
    margin = np.abs(np.diff(model.logits(images), axis=1)[:, 0])
    for statistic in STATISTICS:
        detector = GradientNormDetector.fit(model, images, 0.3, statistic=statistic)
        caught = detector.detects(model, images)
        assert margin[caught].max() <= margin[~caught].min()
        as_bytes = np.round(images * 255).astype("uint8")
        assert detector.detects(model, as_bytes)[np.argmin(margin)]


def test_roc_and_the_rates_it_allows():
    clean, attacked = np.arange(100.0), np.array([95.5, 98.5, 98.5, 200.0])
    curve = roc(clean, attacked)
    rates = [curve.true_positive_rate_at(rate) for rate in (0.0, 0.01, 0.05, 0.1)]
    assert rates == [0.25, 0.75, 1.0, 1.0]
    assert curve.false_positive_rate[-1] == curve.true_positive_rate[-1] == 1


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_adaptive_attack_succeeds_undetected_and_goes_farther(statistic, separating):
    classifier, images, labels = separating
    model = CompiledClassifier(classifier)
    plain = attacks.CarliniWagner(**SETTINGS)(model, images, labels)
    at_boundary = np.median(gradient_norms(model, plain.x_adv, "l2", statistic))
    detector = GradientNormDetector(
        norm="l2", statistic=statistic, threshold=float(0.7 * at_boundary)
    )
    attack = detector.adaptive_attack(**SETTINGS)
    evasive = attack(model, images, labels)
    assert detector.detects(model, plain.x_adv)[plain.queries > 0].mean() > 0.5
    assert evasive.success.mean() >= 0.9
    assert not detector.detects(model, evasive.x_adv[evasive.success], batch_size=3).any()
    predicted = classifier.predict(evasive.x_adv, verbose=0).argmax(axis=1)
    assert np.all(predicted[evasive.success] != labels[evasive.success])
    assert np.all(evasive.distance >= plain.distance * (1 - 0.02))
    assert np.median(evasive.distance) > 1.1 * np.median(plain.distance)


def test_evasion_costs_what_a_linear_classifier_says():
    model, images, labels, w = linear()
    size = np.linalg.norm(w)
    attack = attacks.EvasiveCarliniWagner(threshold=1.0, steps=400)
    result = attack(model, images, labels)
    depth = np.log(size / 1.0 - 1)  # of the margin where (1 - p) ||w|| is the threshold
    expected = np.array([depth + 0.2, depth + 0.2, depth - 0.2]) / size
    np.testing.assert_allclose(result.distance, expected, rtol=1e-2)


def test_a_misclassified_image_that_is_detected_is_no_success():
    model, images, labels, _ = linear()
    attack = attacks.EvasiveCarliniWagner(threshold=1.0, steps=1, search_steps=1)
    result = attack(model, images, labels)
    assert not result.success.any()
    assert attacks.CarliniWagner(steps=1, search_steps=1)(
        model, images, labels
    ).success.tolist() == [
        False,
        False,
        True,
    ]


def test_a_detector_in_service_compiles_once(tmp_path):
    images = np.random.default_rng(0).random((4, 6, 6, 2)).astype("float32")
    detector = GradientNormDetector(norm="l2", statistic="loss", threshold=1.0)
    classifier = counted(net(dtype="float32", batch_norm=True))
    first = detector.scores(classifier, images)
    calls = Counted.calls
    for _ in range(3):
        np.testing.assert_array_equal(detector.scores(classifier, images), first)
    classifier.set_weights([2 * weights for weights in classifier.get_weights()])
    assert np.abs(detector.scores(classifier, images) - first).min() > 0
    assert Counted.calls == calls
    changed = detector.scores(classifier, images)
    classifier.layers[-1].trainable = False  # moves variables from one list to the other
    np.testing.assert_allclose(detector.scores(classifier, images), changed, rtol=1e-5)
    assert Counted.calls > calls
    classifier.save(tmp_path / "model.keras")  # as the plain model that it is
    loaded = keras.saving.load_model(tmp_path / "model.keras", {"Counted": Counted})
    np.testing.assert_allclose(detector.scores(loaded, images), changed, rtol=1e-5)


def test_a_detector_keeps_no_classifier_alive():
    images = np.ones((1, 4, 4, 1), "float32")
    detector = GradientNormDetector(norm="l2", statistic="loss", threshold=1.0)
    alive = []
    for _ in range(3):
        classifier = linear()[0]
        detector.detects(classifier, images)
        alive.append(weakref.ref(classifier))
    del classifier
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


def test_bad_arguments():
    model, images, _, _ = linear()
    with pytest.raises(ValueError, match="Use more images"):
        GradientNormDetector.fit(model, images)
    constant = keras.Sequential([keras.Input((2, 2, 1)), layers.Rescaling(0), layers.Flatten()])
    with pytest.raises(ValueError, match="gradient is zero on 100% of the clean images"):
        GradientNormDetector.fit(constant, np.ones((30, 2, 2, 1), "float32"), statistic="model")
    with pytest.raises(ValueError, match="statistic must be one of"):
        GradientNormDetector(norm="l2", statistic="logits", threshold=1.0)
    with pytest.raises(ValueError, match="threshold must be a number > 0"):
        GradientNormDetector(norm="l2", statistic="loss", threshold=0.0)
