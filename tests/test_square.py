import numpy as np
import pytest
from keras import ops

from tvkeras.attacks import square


def test_square_side_schedule_of_a_cifar_image():
    image = np.zeros((1, 32, 32, 3), "float32")
    sides = [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    assert square._sides(image, smallest=1) == sides
    assert square._sides(image, smallest=3) == [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]
    steps = (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)
    stages = [int(square._at(ops.convert_to_tensor(step), sides)) for step in steps]
    assert stages == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3, 2, 1]


def test_humps_are_rings_painted_one_on_another():
    for height, width in ((1, 3), (2, 5), (3, 3), (7, 4)):
        rings = np.zeros((height, width))
        for ring in range(max(height, width) // 2 + 1):
            top, left = height // 2 - ring, width // 2 - ring
            rows = slice(max(top, 0), top + 2 * ring + 1)
            rings[rows, max(left, 0) : left + 2 * ring + 1] += 1 / (ring + 1) ** 2
        np.testing.assert_allclose(square._rings(height, width), rings / np.linalg.norm(rings))
    for side in (1, 2, 3, 8):
        hump = square._hump(side)
        assert np.linalg.norm(hump) == pytest.approx(1)
        assert np.all(hump[: side // 2] > 0)
        assert np.all(hump[side // 2 :] < 0)
