import keras
import numpy as np
import pytest

import tvkeras
from tests.conftest import batch, net
from tvkeras import attacks, checks, evaluation, norms

ORDER = {"l1": 1, "l2": 2, "linf": np.inf}


def losses(classifier, images, labels):
    logits = classifier.predict_on_batch(images)
    return keras.ops.convert_to_numpy(
        keras.ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    )


@pytest.mark.parametrize("norm", sorted(norms.DUALS))
@pytest.mark.parametrize("steps", [1, 10])
def test_pgd_raises_the_loss_inside_ball_and_bounds(norm, steps):
    classifier, (images, labels) = net(dtype="float32", batch_norm=True), batch(dtype="float32")
    attack = attacks.ProjectedGradient(classifier, norm=norm, steps=steps)
    for epsilon in (0.0, "8/255", 0.5):
        x_adv = attack(images, labels, epsilon)
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        perturbation = (x_adv - images).reshape(len(images), -1)
        radius = checks.epsilon(epsilon)
        assert np.linalg.norm(perturbation, ORDER[norm], axis=1).max() <= radius * (1 + 1e-4) + 1e-7
        if epsilon:
            assert np.all(losses(classifier, x_adv, labels) > losses(classifier, images, labels))
        else:
            np.testing.assert_array_equal(x_adv, images)


def test_pgd_finds_the_optimum_of_a_linear_classifier():
    """Two classes: the worst l2 perturbation inside the bounds is along w, its margin known."""
    images = np.full((3, 4, 4, 1), 0.5, "float32")
    labels = np.array([0, 1, 0])
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    weights = np.random.default_rng(0).normal(size=(16, 2)).astype("float32")
    model.set_weights([weights, np.zeros(2, "float32")])
    attack = attacks.ProjectedGradient(model, norm="l2", steps=20)
    x_adv = attack(images, labels, 0.2)
    difference = weights[:, 1] - weights[:, 0]
    gain = ((x_adv - images).reshape(3, -1) @ difference) * np.where(labels == 0, 1, -1)
    np.testing.assert_allclose(gain, 0.2 * np.linalg.norm(difference), rtol=1e-4)


def test_the_attack_follows_weights_that_change_later():
    classifier, (images, labels) = net(dtype="float32"), batch(dtype="float32")
    attack = attacks.ProjectedGradient(classifier, norm="l2", steps=3)
    before = attack(images, labels, 0.5)
    classifier.set_weights([-weights for weights in classifier.get_weights()])
    assert np.abs(attack(images, labels, 0.5) - before).max() > 1e-3


def test_measure_agrees_with_direct_computation(digits):
    _, test = digits
    classifier = tvkeras.models.build("small_cnn", 10, width=4)
    report = evaluation.measure(classifier, test, epsilons=(0.0, 0.5), attacked_images=100)
    images = test.images.astype("float32") / 255
    predicted = classifier.predict(images, verbose=0).argmax(axis=1)
    assert report["clean_error"] == pytest.approx((predicted != test.labels).mean())
    assert report["loss"] == pytest.approx(losses(classifier, images, test.labels).mean(), rel=1e-4)
    first = (predicted != test.labels)[:100].mean()
    assert report["pgd_error"]["0.0"] == report["fgsm_error"]["0.0"] == pytest.approx(first)
    assert report["pgd_error"]["0.5"] >= report["pgd_error"]["0.0"]


def test_measured_gradient_norms_are_those_of_single_images(digits):
    _, test = digits
    few = test.take(np.arange(6), "few")
    classifier = tvkeras.models.build("small_cnn", 10, width=4, activation="softplus")
    report = evaluation.measure(classifier, few, epsilons=(), norm="linf")
    sizes = []
    for image, label in zip(few.images.astype("float32") / 255, few.labels, strict=True):
        shifts = 1e-2 * np.eye(64, dtype="float32").reshape(64, 8, 8, 1)
        both = np.concatenate([image + shifts, image - shifts])
        values = losses(classifier, both, np.full(128, label))
        sizes.append(np.abs(values[:64] - values[64:]).sum() / 2e-2)
    assert report["gradient_norm"] == "l1"
    assert report["gradient_norm_mean"] == pytest.approx(np.mean(sizes), rel=1e-2)
    assert report["gradient_norm_max"] == pytest.approx(np.max(sizes), rel=1e-2)


def test_error_curves_are_drawn(tmp_path):
    report = {
        "norm": "l2",
        "attacked_images_clean_error": 0.1,
        "pgd_error": {"0.1": 0.2, "100/255": 0.9},
    }
    evaluation.error_curves({"one": report, "two": report}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
