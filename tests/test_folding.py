"""BatchNorm folded into the layer before it: the same function, or none at all."""

import keras
import numpy as np
import pytest
from keras import layers

import tvkeras
from tvkeras import folding

SHAPE = (12, 12, 3)
NETWORKS = {
    "resnext10": {"width": 4},
    "resnet9": {"width": 4},
    "airbench": {"widths": (8, 8, 8)},
}


def shaken(classifier):
    """A classifier with weights and statistics unlike those it begins with."""
    random = np.random.default_rng(0)
    for variable in classifier.variables:
        variable.assign(variable + 0.3 * random.random(variable.shape))
    return classifier


def norms(classifier):
    return [layer for layer in classifier.layers if type(layer) is layers.BatchNormalization]


def check(classifier, left):
    """Folds a classifier down to so many BatchNorms, and compares after its weights changed."""
    clone, weights = folding.folded(classifier)
    assert len(norms(clone)) == left
    shaken(classifier)
    parts = classifier.trainable_variables, classifier.non_trainable_variables
    own = [[variable.value for variable in part] for part in parts]
    images = np.random.default_rng(1).random((4, *classifier.input_shape[1:])).astype("float32")
    outputs, _ = clone.stateless_call(*weights(*own), images, training=False)
    expected = np.asarray(classifier(images, training=False))
    np.testing.assert_allclose(outputs, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_fold_whole_and_follow_their_weights(name):
    network = tvkeras.models.build(name, 10, input_shape=SHAPE, **NETWORKS[name])
    assert norms(network)
    check(shaken(network), 0)


CONV, NORM = (layers.Conv2D, 4, 3), (layers.BatchNormalization,)
UNSCALED = (lambda: layers.BatchNormalization(scale=False),)
CHAINS = {  # a network's first layers, and how many of their BatchNorms stay
    "no centre": ([CONV, (lambda: layers.BatchNormalization(center=False),)], 0),
    "groups": ([(lambda: layers.Conv2D(6, 3, groups=3),), NORM], 0),
    "dense": ([(layers.Flatten,), (layers.Dense, 5), NORM], 0),
    "averages": ([CONV, (layers.AveragePooling2D, 2), NORM], 0),
    "averages of parts": ([CONV, (layers.AveragePooling2D, 3, 2, "same"), NORM], 1),
    "largest": ([CONV, (layers.MaxPooling2D, 2), UNSCALED], 0),
    "largest or smallest": ([CONV, (layers.MaxPooling2D, 2), NORM], 1),
    "activated": ([(lambda: layers.Conv2D(4, 3, activation="relu"),), NORM], 1),
    "depthwise": ([(layers.DepthwiseConv2D, 3), NORM], 1),
    "first": ([NORM, CONV], 1),
    "twice": ([CONV, NORM, NORM], 1),
    "frozen": ([(lambda: layers.Conv2D(4, 3, trainable=False),), NORM], 0),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("functional", [True, False])
def test_chains_fold_where_that_changes_nothing(chain, functional):
    kinds, left = CHAINS[chain]
    parts = [kind(*arguments) for kind, *arguments in kinds]
    classifier = keras.Sequential(
        [keras.Input(SHAPE), *parts, layers.Activation("gelu"), layers.Flatten(), layers.Dense(3)]
    )
    if functional:
        x = images = keras.Input(SHAPE)
        for layer in classifier.layers:
            x = layer(x)
        classifier = keras.Model(images, x)
    check(shaken(classifier), left)


def test_what_others_see_too_stays():
    images = keras.Input(SHAPE)
    seen = layers.Conv2D(4, 3)(images)
    x = layers.Add()([layers.BatchNormalization()(seen), seen])
    x = layers.Dense(3)(layers.Flatten()(x))
    check(shaken(keras.Model(images, x)), 1)


def test_a_layer_that_is_called_twice_stays():
    images, convolution = keras.Input(SHAPE), layers.Conv2D(3, 3, padding="same")
    x = layers.BatchNormalization()(convolution(images))
    x = layers.Dense(3)(layers.Flatten()(convolution(x)))
    check(shaken(keras.Model(images, x)), 1)


def test_nested_networks_fold():
    inner = keras.Sequential(
        [keras.Input(SHAPE), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Dropout(0.5)]
    )
    images = keras.Input(SHAPE)
    x = layers.Dense(3)(layers.Flatten()(inner(layers.Rescaling(0.5)(images))))
    classifier = shaken(keras.Model(images, x))
    clone, _ = folding.folded(classifier)
    assert not norms(clone.get_layer(inner.name))
    check(classifier, 0)


def test_low_precision_and_models_of_ones_own_stay():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = layers.Conv2D(4, 3), layers.BatchNormalization()

        def call(self, images, training=False):
            return self.norm(self.convolution(images), training=training)

    keras.config.set_dtype_policy("mixed_bfloat16")
    low = tvkeras.models.build("resnet9", 10, input_shape=SHAPE, width=4)
    own = Own()
    own.build((None, *SHAPE))
    for classifier in (low, own):
        assert folding.folded(classifier)[0] is classifier
