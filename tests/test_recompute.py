import keras
import numpy as np
import pytest
from keras import layers

import tvkeras
from benchmarks import trace
from tests.conftest import arrays, assert_close, batch, net
from tvkeras.training import recompute

DEFENSES = [
    tvkeras.Undefended(),
    tvkeras.TVLipschitz(lipschitz_weight=0.1),
    tvkeras.TVLipschitz(norm="linf", scheme="central"),
    tvkeras.AdversarialTraining(steps=2),
]


def residual():
    """A classifier of two residual blocks, whose second layers are one."""
    images = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, padding="same")(images)
    shared = layers.Dense(4)
    for _ in range(2):
        y = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(x))
        x = layers.Activation("silu")(layers.Add()([x, shared(y)]))
    return keras.Model(images, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: type(d).__name__)
def test_what_is_computed_again_is_the_same(defense):
    images, labels = batch()
    ends = []
    for again in (False, True):
        keras.utils.set_random_seed(0)
        classifier = net(batch_norm=True, dropout=0.3, regularizer="l2")
        robust = tvkeras.RobustClassifier(
            classifier, defense, recompute=again, dtype=classifier.dtype
        )
        robust.compile(keras.optimizers.SGD(0.1))
        history = robust.fit(images, labels, batch_size=4, epochs=2, verbose=0, shuffle=False)
        ends.append((arrays(classifier.variables), history.history))
    floats = [[v.astype("float64") for v in variables] for variables, _ in ends]
    assert_close(floats[1], floats[0], rtol=1e-6)
    for name, values in ends[0][1].items():
        np.testing.assert_allclose(ends[1][1][name], values, rtol=1e-5)


@pytest.mark.parametrize(
    "defense",
    [
        tvkeras.TVLipschitz(),
        tvkeras.TVLipschitz(lipschitz_weight=0.1),
        tvkeras.TVLipschitz(norm="linf", penalty_every=2),
    ],
    ids=["tv", "both", "every"],
)
def test_one_set_of_gradients_more_lives_through_the_second_pass(defense):
    images, labels = np.random.default_rng(0).random((4, 8, 8, 1), "float32"), np.arange(4)
    peaks = []
    for trained in (tvkeras.Undefended(), defense):
        hidden = [layers.Dense(1024, "gelu"), layers.Dense(512, "gelu"), layers.Dense(4)]
        classifier = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), *hidden])
        robust = tvkeras.RobustClassifier(classifier, trained)
        robust.compile(keras.optimizers.SGD(0.1))
        peaks.append(trace.peak_memory(robust, (images, labels)))
    assert peaks[1] - peaks[0] <= 1.2 * 4 * classifier.count_params() / 2**20


def test_segments_meet_where_one_tensor_carries_all_and_share_no_layer():
    classifier = residual()
    parts = recompute._parts(classifier)
    assert len(parts) >= 2
    names = [layer.name for part in parts for layer in part.layers if layer.weights]
    assert sorted(names) == sorted(layer.name for layer in classifier.layers if layer.weights)
    images = np.random.default_rng(0).random((3, 6, 6, 2), "float32")
    x = images
    for part in parts:
        x = part(x)
    np.testing.assert_allclose(*(keras.ops.convert_to_numpy(y) for y in (x, classifier(images))))


def test_sequential_classifiers_have_segments_and_others_are_refused():
    stack = [keras.Input((6, 6, 2)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(4)]
    assert len(recompute._parts(keras.Sequential(stack))) >= 2
    with pytest.raises(ValueError, match="recompute needs a classifier that can be cut"):
        recompute.segmented(keras.Sequential([keras.Input((4,)), layers.Dense(4)]))

    class Own(keras.Model):
        def call(self, images):
            return images

    with pytest.raises(ValueError, match="recompute needs a functional or sequential"):
        recompute.segmented(Own())
