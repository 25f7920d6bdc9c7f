import numpy as np
import pytest

from tests.conftest import linear
from tvkeras import bounds, norms


@pytest.mark.parametrize("norm", sorted(norms.DUALS))
def test_the_estimate_is_the_loss_gap_over_the_largest_gradient(norm):
    model, images, labels, w = linear()
    images = np.concatenate([images, images[:2] + 0.1 * np.sign(w).reshape(4, 4, 1)])
    images = images.astype("float32")
    labels = np.array([0, 0, 1, 0, 1])
    bound = bounds.estimated_bound(model, images, labels, norm=norm, batch_size=2)
    logits = model.predict(images, verbose=0).astype(float)
    wrong = 1 / (1 + np.exp(logits[range(5), labels] - logits[range(5), 1 - labels]))
    size = {"l1": np.abs(w).max(), "l2": np.linalg.norm(w), "linf": np.abs(w).sum()}[norm]
    expected = np.maximum(np.log(2) + np.log1p(-wrong), 0) / (wrong.max() * size)
    np.testing.assert_allclose(bound.radius, expected, rtol=1e-4, atol=1e-7)
    assert bound.radius[2] == bound.radius[3] == 0
    np.testing.assert_array_equal(bound.classes, logits.argmax(axis=1))
    assert (bound.kind, bound.norm) == ("estimated", norm)
    assert "seen on 5 images" in bound.assumptions


def test_smoothing_of_a_linear_classifier_has_the_closed_form():
    model, images, _, w = linear()
    toward = (w / np.linalg.norm(w)).reshape(4, 4, 1)
    centre = images[0] + 0.2 / np.linalg.norm(w) * toward  # on the boundary
    images = np.stack([centre - 0.3 * toward, centre, centre + 0.15 * toward]).astype("float32")
    bound = bounds.smoothed_bound(model, images, sigma=0.25, samples=4000, batch_size=900)
    assert bound.classes.tolist() == [0, -1, 1]
    assert bound.radius[1] == 0
    assert (bound.kind, bound.norm) == ("probabilistic", "l2")
    distance = np.array([0.3, 0.15])  # the true one, sigma Phi^-1(p) of the true p
    radius = bound.radius[[0, 2]]
    assert np.all(radius <= distance)
    assert np.all(radius >= 0.85 * distance)
    again = bounds.smoothed_bound(model, images, sigma=0.25, samples=4000, batch_size=900)
    np.testing.assert_array_equal(again.radius, bound.radius)
    other = bounds.smoothed_bound(model, images, sigma=0.25, samples=4000, batch_size=900, seed=1)
    assert np.any(other.radius != bound.radius)


def test_smoothing_counts_what_clopper_and_pearson_allow():
    model, images, _, _ = linear()
    weights, bias = model.get_weights()
    model.set_weights([weights * 0, bias * 0 + np.array([2.0, 0.0], "float32")])
    bound = bounds.smoothed_bound(model, images[:1], sigma=1.0, samples=100, alpha=0.01)
    # every draw is of class 0: the bound of p is alpha^(1/n)
    assert bound.radius[0] == pytest.approx(1.6953, abs=1e-3)  # Phi^-1(0.01^(1/100))
    with pytest.raises(ValueError, match="sigma must be a number > 0"):
        bounds.smoothed_bound(model, images, sigma=0.0)
