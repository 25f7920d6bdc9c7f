import keras
import numpy as np
import pytest
from keras import layers, ops

import tvkeras
from tests.test_attacks import linear, separating  # noqa: F401
from tvkeras import attacks, bounds, norms


def randomized(model, seed=0):
    """`model` with random weights, also those that BatchNorm begins with."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        positive = "variance" in weight.path
        value = rng.uniform(0.3, 2.0, weight.shape) if positive else rng.normal(size=weight.shape)
        weight.assign(value)
    return model


def matrix(layer, shape):
    """The matrix of a linear layer, column by column."""
    size = int(np.prod(shape))
    basis = np.eye(size, dtype="float32").reshape(size, *shape)
    zero = ops.convert_to_numpy(layer(np.zeros((1, *shape), "float32")))
    return (ops.convert_to_numpy(layer(basis)) - zero).reshape(size, -1).T


def jacobian_norms(model, images):
    """Spectral norm of a classifier's Jacobian at each image."""
    attacked = attacks.AttackedClassifier(model)
    count = model.output_shape[-1]

    def gradients(logits, images):
        repeated = ops.repeat(images, count, axis=0)
        chosen = ops.tile(ops.eye(count), (images.shape[0], 1))
        return attacks.base.input_gradient(
            logits, repeated, lambda outputs: ops.sum(outputs * chosen, axis=1)
        )[2]

    rows = attacked.compiled("jacobian", gradients)(images)
    return np.linalg.norm(rows.reshape(len(images), count, -1), 2, axis=(1, 2))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": "same", "groups": 2},
        {"kernel_size": (4, 3), "padding": "valid"},
        {"kernel_size": 3, "strides": 2, "padding": "same"},
        {"kernel_size": 3, "dilation_rate": 2, "padding": "same"},
        {"kernel_size": 1},
        {"kernel_size": 2, "strides": 2},
    ],
    ids=str,
)
def test_a_convolutions_bound_is_above_and_near_its_norm(arguments):
    layer = layers.Conv2D(4, **arguments)
    layer.build((None, 12, 12, 2))
    randomized(layer)
    exact = np.linalg.norm(matrix(layer, (12, 12, 2)), 2)
    bound = bounds.convolution_norm(ops.convert_to_numpy(layer.kernel), layer.groups)
    assert bound >= exact * (1 - 1e-6)
    if arguments.get("strides", 1) == 1:
        assert bound <= 1.2 * exact  # 2.5 % of the grid, the rest for the image's border


def test_the_bound_on_the_grid_holds_between_its_points():
    kernel = np.random.default_rng(0).normal(size=(5, 3, 3, 4))
    bound = bounds.convolution_norm(kernel)
    finer = np.fft.rfft2(kernel, s=(201, 201), axes=(0, 1))
    largest = np.linalg.norm(finer, 2, axis=(-2, -1)).max()
    assert largest <= bound <= 1.03 * largest


@pytest.mark.parametrize(
    "layer",
    [
        layers.AveragePooling2D(2),
        layers.AveragePooling2D(3, strides=2),
        layers.GlobalAveragePooling2D(),
        layers.Rescaling(-2.0, offset=1.0),
        layers.Normalization(mean=(0.5, 0.4), variance=(0.25, 0.04)),
        layers.ZeroPadding2D(1),
        layers.BatchNormalization(),
        layers.BatchNormalization(scale=False),
    ],
    ids=lambda layer: layer.name,
)
def test_linear_layers_constants_are_above_their_norms(layer):
    model = randomized(keras.Sequential([keras.Input((6, 6, 2)), layer]))
    exact = np.linalg.norm(matrix(model, (6, 6, 2)), 2)
    constant = bounds.lipschitz_constant(model)
    assert constant >= exact * (1 - 1e-5)
    overlapping = getattr(layer, "pool_size", (2, 2)) == (3, 3)
    assert constant <= exact * (2.0 if overlapping else 1 + 1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        layers.MaxPooling2D(2),
        layers.MaxPooling2D(3, strides=2, padding="same"),
        layers.Activation("gelu"),
        layers.Activation("silu"),
        layers.Activation("softplus"),
        layers.ReLU(negative_slope=1.5),
    ],
    ids=lambda layer: layer.name,
)
def test_no_two_points_are_farther_apart_than_the_constant_allows(layer):
    model = keras.Sequential([keras.Input((7, 7, 2)), layer])
    constant = bounds.lipschitz_constant(model)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2000, 7, 7, 2), scale=2)
    images[0], images[1] = np.sqrt(2), 2.39936  # where GELU and SiLU are steepest
    others = images + rng.normal(size=images.shape) * 1e-2 * (rng.random(images.shape) < 0.1)
    others[:2] = images[:2] + 1e-2
    images, others = images.astype("float32"), others.astype("float32")
    one, other = (ops.convert_to_numpy(model(x)).reshape(2000, -1) for x in (images, others))
    moved = np.linalg.norm((images - others).reshape(2000, -1), axis=1)
    slopes = np.linalg.norm(one - other, axis=1) / moved
    assert slopes.max() <= constant * (1 + 1e-3)  # float32
    if layer.name.startswith("activation"):
        assert slopes.max() >= 0.9 * constant


def branching():
    """A net of every kind of layer that merges and folds, with random weights."""
    images = keras.Input((8, 8, 2))
    x = layers.Rescaling(2.0, offset=-1.0)(images)
    x = layers.Conv2D(4, 3, padding="same", activation="gelu")(x)
    y = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", groups=2)(x))
    z = layers.Conv2D(4, 3, padding="same", use_bias=False)(x)
    x = layers.Add()([x, layers.Average()([y, z])])
    x = layers.Concatenate()([layers.MaxPooling2D(2)(x), layers.AveragePooling2D(2)(x)])
    inner = keras.Sequential([keras.Input((4, 4, 8)), layers.Conv2D(4, 3, activation="softplus")])
    x = layers.Dropout(0.5)(layers.Flatten()(inner(x)))
    return randomized(keras.Model(images, layers.Dense(3)(x)))


def test_the_constant_is_above_every_jacobian_and_every_pair():
    model = branching()
    constant = bounds.lipschitz_constant(model)
    rng = np.random.default_rng(1)
    images = rng.random((20, 8, 8, 2)).astype("float32")
    seen = jacobian_norms(model, images).max()
    assert seen <= constant <= 200 * seen
    outputs = ops.convert_to_numpy(model(images, training=False))
    for one, other in zip(range(10), range(10, 20), strict=True):
        moved = np.linalg.norm(images[one] - images[other])
        assert np.linalg.norm(outputs[one] - outputs[other]) <= constant * moved


def test_the_constant_of_a_linear_net_is_exact_for_one_layer_and_its_radius_the_distance():
    model, images, _, _ = linear()
    weights = np.random.default_rng(0).normal(size=16).astype("float32")
    model.set_weights([np.stack([weights, -weights], axis=1), np.array([0.3, 0.0], "float32")])
    constant = np.sqrt(2) * np.linalg.norm(weights)
    assert bounds.lipschitz_constant(model) == pytest.approx(constant, rel=1e-6)
    bound = bounds.certified_bound(model, images)
    margin = abs(weights.sum() + 0.3)
    expected = margin / (2 * np.linalg.norm(weights))  # the distance to the boundary
    np.testing.assert_allclose(bound.radius, expected, rtol=1e-5)
    assert (bound.kind, bound.norm) == ("certified", "l2")


def test_no_attack_finds_anything_below_a_certified_radius(separating):  # noqa: F811
    classifier, images, _ = separating
    bound = bounds.certified_bound(classifier, images, batch_size=5)
    assert bound.radius.min() > 0
    attack = attacks.ProjectedGradient(norm="l2", steps=20)
    model = attacks.AttackedClassifier(classifier)
    found = [
        attack(model, images, bound.classes, epsilon=epsilon).distance
        for epsilon in np.geomspace(0.05, 2, 8).tolist()
    ]
    nearest = np.min(found, axis=0)
    assert np.isfinite(nearest).all()
    assert np.all(nearest >= bound.radius)


@pytest.mark.parametrize("name", ["small_cnn", "resnet9", "resnext10"])
def test_the_networks_of_the_package_have_a_constant(name):
    model = tvkeras.models.build(name, 3, input_shape=(8, 8, 1), width=4)
    assert 0 < bounds.lipschitz_constant(model) < np.inf


def test_what_has_no_known_constant_is_named():
    images = keras.Input((8, 8, 1))
    for layer, message in [
        (layers.Conv2DTranspose(2, 3, name="up"), "layer 'up': type Conv2DTranspose"),
        (layers.Activation("tanh", name="bend"), "layer 'bend': activation"),
        (layers.AveragePooling2D(3, padding="same", name="pool"), "layer 'pool': padding='same'"),
        (layers.ReLU(threshold=0.1, name="jump"), "layer 'jump': threshold=0.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            bounds.lipschitz_constant(keras.Model(images, layer(images)))
    with pytest.raises(ValueError, match="needs a built functional or sequential model"):
        bounds.lipschitz_constant(keras.Model([images, keras.Input((1,))], images))


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
