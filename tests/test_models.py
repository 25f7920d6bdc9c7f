import keras
import numpy as np
import pytest

from tvkeras import models


def test_resnext34_has_the_paper_s_size():
    model = models.build("resnext34", 10)
    trainable = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    assert trainable == 3_892_522  # by hand: 36 C^2 + 8 C a block, C = 32, 64, 128
    assert model.output_shape == (None, 10)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert all(layer.groups == 1 for layer in convolutions)
    # Weighted layers on a path: chains of two convolutions, one each for stem, stages, logits.
    assert len(convolutions) == 1 + 15 * 2 * 2 + 2


def test_resnet9_has_nine_layers_on_its_longest_path():
    model = models.build("resnet9", 10, width=8)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds.count("Conv2D") + kinds.count("Dense") == 9
    kernels = 9 * (3 * 8 + 8 * 16 + 2 * 16**2 + 16 * 32 + 32 * 64 + 2 * 64**2)
    normalization = 2 * (8 + 3 * 16 + 32 + 3 * 64)
    trainable = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    assert trainable == kernels + normalization + 64 * 10 + 10


@pytest.mark.parametrize(
    "name",
    [
        "airbench",
        "resnet9",
        "resnext10",
        "small_cnn",
        pytest.param("resnet50", marks=pytest.mark.slow),
    ],
)
def test_a_model_is_plain_and_returns_logits(name, tmp_path):
    small = {
        "airbench": {"widths": (8, 8, 8)},
        "small_cnn": {"input_shape": (8, 8, 1)},
        "resnet50": {"input_shape": (32, 32, 3)},
    }
    model = models.build(name, 7, **small.get(name, {"input_shape": (16, 16, 3), "width": 4}))
    images = np.random.default_rng(0).random((3, *model.input_shape[1:])).astype("float32")
    logits = model.predict_on_batch(images)
    assert logits.shape == (3, 7)
    assert np.abs(logits.sum(axis=1) - 1).max() > 1e-3
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded.predict_on_batch(images), logits)


def test_multiplications_are_counted_by_hand():
    network = models.resnext(3, (8, 8, 3), depth=10, width=4, branches=1, activation="softplus")
    activations = [layer for layer in network.layers if isinstance(layer, keras.layers.Activation)]
    assert {layer.activation.__name__ for layer in activations} == {"softplus"}
    stages = [(64, 4, 0), (16, 8, 4), (4, 16, 8)]  # positions, width, that of the stage before
    expected = 64 * 9 * 3 * 4 + 16 * 3
    for positions, width, before in stages:
        expected += 2 * positions * 9 * width * width
        expected += 4 * positions * before * width  # a 1x1 convolution before the pooling
    assert models.multiply_adds(network) == expected
    wrapped = keras.Sequential([keras.Input((8, 8, 3)), network])
    assert models.multiply_adds(wrapped) == expected


def test_unknown_names_and_depths_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'resnext34'"):
        models.build("resnext_34", 10)
    with pytest.raises(ValueError, match="depth must be 6 n \\+ 4"):
        models.resnext(10, depth=20)
