import itertools

import numpy as np
import pytest
from keras import ops

from tests.conftest import ORDER
from tvkeras.attacks import fab


def nearest_by_enumeration(x, normal, value):
    """l2 distance to a hyperplane inside [0, 1]: every set of coordinates at a bound."""
    best = np.inf
    for ends in itertools.product((None, 0, 1), repeat=len(x)):
        fixed = np.array([end is not None for end in ends])
        d = np.array([0 if end is None else end - xi for end, xi in zip(ends, x, strict=True)])
        free = normal * ~fixed
        left = value + normal @ d
        if np.any(free):
            d = d - free * left / (free @ free)
        elif abs(left) > 1e-9:
            continue
        if np.all((x + d >= -1e-9) & (x + d <= 1 + 1e-9)):
            best = min(best, np.linalg.norm(d))
    return best


def nearest_by_bisection(x, normal, value):
    """linf distance to a hyperplane inside [0, 1]."""

    def reached(t):
        ends = np.clip(x + t * np.sign(-value * normal), 0, 1)
        return value * (value + normal @ (ends - x)) <= 0

    low, high = 0.0, 1.0
    if not reached(high):
        return np.inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projection_onto_a_hyperplane_within_bounds(norm):
    rng = np.random.default_rng(0)
    count = 60
    x = rng.random((count, 2, 2, 1))
    x[:9, 0] = rng.integers(0, 2, (9, 2, 1))  # at a bound already
    normal = rng.normal(size=x.shape) * 10.0 ** rng.integers(-12, 3, (count, 1, 1, 1))
    normal[:5, 1, 1] = 0
    normal[5] = 0
    size = np.abs(normal).sum(axis=(1, 2, 3))
    value = size * rng.uniform(-0.8, 0.8, count)
    given = (ops.convert_to_tensor(part, dtype="float32") for part in (x, normal, value))
    d = ops.convert_to_numpy(fab.to_hyperplane(*given, norm))
    value /= np.where(size > 0, size, 1)
    normal /= np.where(size > 0, size, 1)[:, None, None, None]
    nearest = nearest_by_enumeration if norm == "l2" else nearest_by_bisection
    reachable = 0
    for i in range(count):
        assert np.all((x[i] + d[i] >= -1e-6) & (x[i] + d[i] <= 1 + 1e-6))
        distance = nearest(x[i].ravel(), normal[i].ravel(), value[i]) if size[i] else 0.0
        if not np.isfinite(distance):  # as far as it goes
            room = np.where(value[i] * normal[i] > 0, x[i], 1 - x[i])
            np.testing.assert_allclose(np.abs(d[i]), room * (normal[i] != 0), atol=1e-6)
            continue
        reachable += 1
        assert abs(value[i] + np.sum(normal[i] * d[i])) <= 1e-5
        assert np.linalg.norm(d[i].ravel(), ORDER[norm]) == pytest.approx(distance, abs=1e-5)
    assert 20 < reachable < count
