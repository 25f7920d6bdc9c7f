import keras
import numpy as np
import pytest

from tests.conftest import ORDER
from tvkeras import norms

NORMS = sorted(norms.DUALS)
GRADIENTS = {
    "random": np.random.default_rng(0).normal(size=(5, 3, 4, 2)),
    "tiny": np.random.default_rng(1).normal(size=(5, 3, 4, 2)) * 1e-30,
    "huge": np.random.default_rng(2).normal(size=(5, 3, 4, 2)) * 1e30,
    "one entry": np.eye(24)[:5].reshape(5, 3, 4, 2),
}


def flat(x):
    return keras.ops.convert_to_numpy(x).astype("float64").reshape(len(x), -1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_direction_is_a_unit_vector_that_attains_the_dual_norm(norm, name):
    g = GRADIENTS[name].astype("float32")
    d = flat(norms.steepest_direction(keras.ops.convert_to_tensor(g), norm))
    np.testing.assert_allclose(np.linalg.norm(d, ORDER[norm], axis=1), 1, rtol=1e-5)
    dual = np.linalg.norm(flat(g), ORDER[norms.dual(norm)], axis=1)
    np.testing.assert_allclose((d * flat(g)).sum(axis=1), dual, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_length_agrees_with_numpy_where_squares_underflow_or_overflow(norm, name):
    x = GRADIENTS[name].astype("float32")
    expected = np.linalg.norm(flat(x), ORDER[norm], axis=1)
    actual = keras.ops.convert_to_numpy(norms.length(keras.ops.convert_to_tensor(x), norm))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_direction_of_a_useless_gradient_is_zero(norm, value):
    g = np.full((2, 3, 3, 1), value, "float32")
    g[1] = 1.0
    d = flat(norms.steepest_direction(keras.ops.convert_to_tensor(g), norm))
    assert np.all(d[0] == 0)
    assert np.linalg.norm(d[1]) > 0


@pytest.mark.parametrize("norm", NORMS)
def test_length_is_differentiable_at_zero(norm):
    from tvkeras import backends

    def total(x):
        return keras.ops.sum(norms.length(x, norm)), None

    _, (g,) = backends.value_and_gradient(total, (keras.ops.zeros((2, 3, 3, 1)),))
    assert np.all(flat(g) == 0)


@pytest.mark.parametrize("norm", NORMS)
def test_length_of_a_lost_gradient_is_not_finite(norm):
    g = np.full((1, 3, 3, 1), np.nan, "float32")
    size = keras.ops.convert_to_numpy(norms.length(keras.ops.convert_to_tensor(g), norm))
    assert not np.isfinite(size).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 100.0])
def test_projection_is_inside_and_moves_nothing_that_was_inside(norm, epsilon):
    x = GRADIENTS["random"].astype("float32")
    inside = flat(norms.project(keras.ops.convert_to_tensor(x), norm, epsilon))
    size = np.linalg.norm(flat(x), ORDER[norm], axis=1)
    assert np.all(np.linalg.norm(inside, ORDER[norm], axis=1) <= epsilon * (1 + 1e-5))
    kept = size <= epsilon
    np.testing.assert_array_equal(inside[kept], flat(x)[kept])


@pytest.mark.parametrize("norm", NORMS)
def test_projection_takes_a_radius_for_each_example(norm):
    x = np.random.default_rng(0).normal(size=(3, 3, 3, 1)).astype("float32")
    radii = np.array([0.0, 0.3, 100.0], "float32")
    together = flat(norms.project(keras.ops.convert_to_tensor(x), norm, radii))
    for number, radius in enumerate(radii):
        one = keras.ops.convert_to_tensor(x[number : number + 1])
        alone = flat(norms.project(one, norm, float(radius)))
        np.testing.assert_allclose(together[number : number + 1], alone, rtol=1e-6)


def test_l1_projection_is_the_nearest_point():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 2, 2, 1)).astype("float32")
    nearest = flat(norms.project(keras.ops.convert_to_tensor(x), "l1", 0.5))[0]
    other = rng.dirichlet(np.ones(4), 5000) * rng.choice([-0.5, 0.5], (5000, 4))
    distances = np.linalg.norm(other - flat(x)[0], axis=1)
    assert np.linalg.norm(nearest - flat(x)[0]) <= distances.min() + 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_fills_the_ball(norm):
    like = keras.ops.zeros((4000, 2, 1, 1))
    sample = norms.random_in_ball(like, norm, 0.5, keras.random.SeedGenerator(0))
    size = np.linalg.norm(flat(sample), ORDER[norm], axis=1)
    assert size.max() <= 0.5 + 1e-6
    assert np.abs(flat(sample).mean(axis=0)).max() < 0.02
    np.testing.assert_allclose((size <= 0.25).mean(), 0.25, atol=0.03)  # area goes by the square


def test_an_unknown_norm_names_the_nearest():
    with pytest.raises(ValueError, match=r"norm must be one of .*, got norm='L2'\. Did you mean"):
        norms.dual("L2")
