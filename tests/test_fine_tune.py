import keras
import numpy as np
import pytest

import tvkeras
from tvkeras import attacks
from tvkeras.training.fine_tune import penalty


def trained(digits, scale=1.0):
    """A two-layer CNN that knows digits of images in [0, scale]."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Rescaling(1 / scale),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(digits[0].images * np.float32(scale / 255), digits[0].labels, epochs=8, verbose=0)
    return model


@pytest.mark.parametrize("bounds", [None, (0, 255)])
def test_a_defended_copy_withstands_more(digits, bounds, capsys):
    scale = 255.0 if bounds else 1.0
    model = trained(digits, scale)
    weights = model.get_weights()
    images, labels = digits[0].images * np.float32(scale / 255), digits[0].labels
    robust = tvkeras.defend(
        model, images, labels, epsilon=0.4, bounds=bounds, batch_size=32, verbose=True
    )
    assert type(robust) is keras.Sequential
    assert robust is not model
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    pgd = attacks.ProjectedGradient(norm="l2", steps=20)
    test = digits[1].images, digits[1].labels
    accuracy = [
        pgd(tvkeras.inference.CompiledClassifier(m, bounds), *test, epsilon=0.4).robust_accuracy
        for m in (model, robust)
    ]
    assert accuracy[1] > accuracy[0] + 0.1
    assert "before" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_weights(digits):
    model, (images, labels) = trained(digits), (digits[0].images[:200], digits[0].labels[:200])
    one, again, other = (
        tvkeras.defend(
            model, images, labels, epochs=1, batch_size=32, seed=seed, verbose=False
        ).get_weights()
        for seed in (3, 3, 4)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_step_is_as_long_as_the_steepest_perturbation(norm):
    found = penalty(norm, 0.02, (8, 8, 1))
    assert found.tv_weight == 0.02
    assert found.fd_step == pytest.approx(0.16 if norm == "linf" else 0.02)
    assert penalty(norm, 0.9, (8, 8, 1)).fd_step == 0.5


class Unknown(keras.Model):
    """A subclass that says nothing of its arguments."""

    def __init__(self, units):
        super().__init__()
        self.dense = keras.layers.Dense(units)

    def call(self, images):
        return self.dense(keras.ops.reshape(images, (-1, 64)))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("softmax", {}, "tvkeras.logits"),
        ("subclass", {}, "model must be one that Keras can save"),
        ("small_cnn", {"epsilon": "8:255"}, "epsilon"),
        ("small_cnn", {"epochs": 0}, "epochs"),
        ("small_cnn", {"norm": "L2"}, "norm"),
        ("small_cnn", {"validation_fraction": 0.0}, "validation_fraction"),
    ],
)
def test_what_cannot_be_defended_is_refused(digits, model, settings, message):
    classifier = tvkeras.models.build("small_cnn", 10, width=2)
    if model == "softmax":
        outputs = keras.layers.Softmax()(classifier.output)
        classifier = keras.Model(classifier.input, outputs)
    if model == "subclass":
        classifier = Unknown(10)
        classifier(np.zeros((1, 8, 8, 1), "float32"))
    images, labels = digits[0].images[:100], digits[0].labels[:100]
    with pytest.raises(ValueError, match=message):
        tvkeras.defend(classifier, images, labels, **settings)


@pytest.mark.slow
def test_a_network_of_keras_applications_is_defended_at_its_defaults():
    model = keras.applications.MobileNet(
        (32, 32, 3), alpha=0.25, weights=None, classes=4, classifier_activation=None
    )
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (300, 32, 32, 3), np.uint8), rng.integers(0, 4, 300)
    robust = tvkeras.defend(model, images, labels, epochs=1, bounds=(0, 255), verbose=False)
    assert robust.output_shape == (None, 4)
    assert np.isfinite(robust.predict(images[:8].astype("float32"), verbose=0)).all()
