import keras
import numpy as np
import pytest

from tvkeras.evaluation import corruptions
from tvkeras.inference import CompiledClassifier


def by_brightness(bounds=(0, 1)):
    """Class 1 where an image's mean is over the middle of its bounds."""
    low, high = bounds
    model = keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            keras.layers.Rescaling(1 / (high - low), offset=-low / (high - low) - 0.5),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, use_bias=False),
        ]
    )
    model.layers[-1].set_weights([np.array([[-9.0, 9.0]], "float32")])
    return CompiledClassifier(model, bounds=bounds)


@pytest.mark.parametrize("bounds", [(0, 1), (0, 255)])
def test_only_brightness_changes_what_a_mean_decides(bounds):
    """Blur, contrast and noise keep the mean, all but nearly."""
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(0.4, 0.1, (20, 12, 12, 1)), 0.1, 0.9)
    images = (images * bounds[1]).astype("float32")
    classes = corruptions.corrupted_classes(by_brightness(bounds), images, batch_size=8)
    assert classes.keys() == corruptions.CORRUPTIONS.keys()
    means = {name: found.mean() for name, found in classes.items()}
    assert means.pop("brightness + 0.15") == 1
    assert set(means.values()) == {0}


def test_corruptions_have_the_strength_they_state():
    rng = np.random.default_rng(0)
    images = rng.uniform(0.3, 0.7, (50, 16, 16, 3)).astype("float32")
    noise, blur, _, contrast = (
        corrupt(images, np.random.default_rng(0)) for corrupt in corruptions.CORRUPTIONS.values()
    )
    assert (noise - images).std() == pytest.approx(0.08, rel=0.02)
    assert contrast.std() == pytest.approx(0.4 * images.std(), rel=0.1)
    edge = np.zeros((1, 16, 16, 1), "float32")
    edge[:, :, 8:] = 1
    blurred = corruptions.CORRUPTIONS["Gaussian blur, deviation 0.7 pixels"](edge, rng)
    slope = np.diff(blurred[0, 8, :, 0])
    positions = np.arange(15)
    centre = (slope * positions).sum()
    assert np.sqrt((slope * (positions - centre) ** 2).sum()) == pytest.approx(0.7, rel=0.05)
    assert blur.shape == images.shape
