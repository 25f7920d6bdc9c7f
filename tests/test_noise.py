"""Training under the noise that `tvkeras.bounds.Smoothed` votes under."""

import keras
import numpy as np
import pytest

import tvkeras
from tests.conftest import assert_close, batch, net, update
from tvkeras.data import Augmentation

ONLY_NOISE = {"crop": 0, "flip": False, "cutout": 0}


def augmented(augmentation, images, seed=0):
    generator = keras.random.SeedGenerator(seed)
    return keras.ops.convert_to_numpy(augmentation(keras.ops.convert_to_tensor(images), generator))


def test_noise_is_added_to_the_augmented_image_and_not_clipped():
    images = np.random.default_rng(0).random((50, 8, 8, 3)).astype("float32")
    noisy = augmented(Augmentation(crop=2, cutout=4, noise=0.5), images)
    noise = noisy - augmented(Augmentation(crop=2, cutout=4), images)  # the same crops and squares
    assert noise.mean() == pytest.approx(0, abs=0.03)
    assert noise.std() == pytest.approx(0.5, rel=0.03)
    assert noisy.min() < -0.5
    assert noisy.max() > 1.5
    assert np.abs(np.corrcoef(noise.reshape(50, -1)) - np.eye(50)).max() < 0.5
    other = augmented(Augmentation(**ONLY_NOISE, noise=0.5), images, seed=1)
    assert np.all(other != augmented(Augmentation(**ONLY_NOISE, noise=0.5), images))


@pytest.mark.parametrize("noise", [-0.1, 64, "0.25", None])
def test_noise_that_is_no_standard_deviation_in_pixel_units_is_refused(noise):
    with pytest.raises(ValueError, match="noise must be a number >= 0 and <= 10"):
        Augmentation(noise=noise)


@pytest.mark.parametrize(
    "defense",
    [
        tvkeras.TVLipschitz(tv_weight=0.1, lipschitz_weight=0.1, fd_step=0.05),
        tvkeras.TVLipschitz(tv_weight=0.1, fd_step=0.05, scheme="central"),
        tvkeras.AdversarialTraining(norm="l2", epsilon=0.2, steps=2, random_start=False),
    ],
    ids=["both terms", "central", "adversarial"],
)
def test_all_passes_of_a_defence_see_the_same_noise(defense):
    classifier, (images, labels) = net(), batch()
    augmentation = Augmentation(**ONLY_NOISE, noise=0.3)
    found = update(defense, classifier, images, labels, augmentation=augmentation)
    expected = update(defense, classifier, augmented(augmentation, images), labels)
    assert_close([found.loss, *found.gradients], [expected.loss, *expected.gradients])


def test_adversarial_training_leaves_noise_beyond_the_bounds_where_it_is():
    classifier, (images, labels) = net(), batch()
    noisy = augmented(Augmentation(**ONLY_NOISE, noise=1.0), images)
    settings = {"norm": "l2", "epsilon": 1e-9, "steps": 2, "random_start": False}
    attacked = update(tvkeras.AdversarialTraining(**settings), classifier, noisy, labels)
    plain = update(tvkeras.Undefended(), classifier, noisy, labels)
    assert_close(attacked.gradients, plain.gradients, rtol=1e-6)

    far = {**settings, "epsilon": 2.0}
    attacked = update(tvkeras.AdversarialTraining(**far), classifier, 3 * noisy - 1, labels)
    unbounded = update(
        tvkeras.AdversarialTraining(**far, bounds=None), classifier, 3 * noisy - 1, labels
    )
    assert attacked.loss < unbounded.loss  # no pixel goes further out


@pytest.mark.parametrize("bounds", [(0, 1), (0, 255)])
@pytest.mark.parametrize("name", ["TVLipschitz", "AdversarialTraining"])
def test_noise_is_in_units_of_0_to_1_and_passes_the_watch(name, bounds):
    images, labels = batch(16, "float32")
    robust = tvkeras.RobustClassifier(
        net(dtype="float32"),
        getattr(tvkeras, name)(),
        Augmentation(**ONLY_NOISE, noise=0.3),
        bounds=bounds,
    )
    scale = bounds[1]
    first = robust.classifier.layers[1]
    first.kernel.assign(first.kernel / scale)  # the same classifier of images in those bounds
    robust.compile(keras.optimizers.SGD(0.0))
    history = robust.fit(scale * images, labels, epochs=2, batch_size=16, shuffle=False, verbose=0)
    losses = history.history["loss"]
    assert losses[0] != losses[1]
    again = tvkeras.RobustClassifier(
        net(dtype="float32"), getattr(tvkeras, name)(), Augmentation(**ONLY_NOISE, noise=0.3)
    )
    again.classifier.set_weights(
        [
            weights * (scale if index == 0 else 1)
            for index, weights in enumerate(robust.classifier.get_weights())
        ]
    )
    again.compile(keras.optimizers.SGD(0.0))
    expected = again.fit(images, labels, epochs=2, batch_size=16, shuffle=False, verbose=0)
    np.testing.assert_allclose(losses, expected.history["loss"], rtol=1e-4)
