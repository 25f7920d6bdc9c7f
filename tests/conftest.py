"""Fixtures shared by all tests; the backend is the one of KERAS_BACKEND."""

import contextlib
import os
import pathlib
import resource

os.environ.setdefault("JAX_ENABLE_X64", "1")  # float64, for comparisons to the last digits
# Most of the time goes into compiling: with less care, and once for all tests and processes.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
os.environ.setdefault("NUMBA_OPT", "0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as the commands do

import gin
import keras
import numpy as np
import pytest
from keras import layers

import tvkeras
import tvkeras.data
from tvkeras.zoo import site

BACKEND = keras.backend.backend()
ROOT = pathlib.Path(__file__).parent.parent
ORDER = {"l1": 1, "l2": 2, "linf": np.inf}  # as NumPy calls the norms
DUAL_ORDER = {"l1": np.inf, "l2": 2, "linf": 1}


@pytest.fixture(autouse=True)
def _clean_state():
    """Every test starts from the same seed, precision and empty configuration."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    gin.clear_config()
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Data prepared by the tests goes nowhere else."""
    os.environ["TVKERAS_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))


def net(*, dtype="float64", activation="softplus", batch_norm=False, dropout=0.0, regularizer=None):
    """A small convolutional classifier of 6x6x2 images into 4 classes."""
    keras.config.set_dtype_policy(dtype)
    images = keras.Input((6, 6, 2), dtype=keras.config.dtype_policy().variable_dtype)
    x = layers.Conv2D(5, 3, kernel_regularizer=regularizer)(images)
    if batch_norm:
        x = layers.BatchNormalization()(x)
    x = layers.Activation(activation)(x)
    x = layers.Flatten()(x)
    if dropout:
        x = layers.Dropout(dropout, seed=1)(x)
    model = keras.Model(images, layers.Dense(4)(x))
    keras.config.set_dtype_policy("float32")
    return model


@contextlib.contextmanager
def full_disk(size=1000):
    """No file can grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def pooled(seed=0):
    """A classifier of 8x8 images into 5 classes that would take images of any size."""
    keras.utils.set_random_seed(seed)
    images = keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, activation="relu")(images)
    normalise = layers.BatchNormalization()
    x = layers.Conv2D(8, 3, activation="relu")(normalise(x))
    model = keras.Model(images, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))
    normalise.moving_mean.assign(np.linspace(-0.5, 0.5, 8))
    normalise.moving_variance.assign(np.linspace(0.02, 0.1, 8))
    return model


def random_images(count, seed=0):
    """Images for `pooled`."""
    return np.random.default_rng(seed).random((count, 8, 8, 1)).astype("float32")


def batch(count=8, dtype="float64", seed=0):
    """Random images and labels for `net`."""
    rng = np.random.default_rng(seed)
    images = rng.random((count, 6, 6, 2)).astype(dtype)
    return images, rng.integers(0, 4, count)


@pytest.fixture(scope="session")
def separating():
    """A classifier of 6x6x2 images that is right on most of 12 random ones, and those."""
    keras.utils.set_random_seed(0)
    images, labels = batch(12, dtype="float32")
    labels[0] = (labels[0] + 1) % 4
    classifier = net(dtype="float32")
    classifier.compile(
        keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    classifier.fit(images, labels, epochs=60, verbose=0)
    labels[0] = (labels[0] + 1) % 4
    return classifier, images, labels


def linear():
    """A two-class linear classifier of 4x4 images, three grey images, labels, and w."""
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Flatten(), layers.Dense(2)])
    weights = np.random.default_rng(0).normal(size=(16, 2)).astype("float32")
    model.set_weights([weights, np.array([0.2, 0.0], "float32") - 0.5 * weights.sum(axis=0)])
    images = np.full((3, 4, 4, 1), 0.5, "float32")
    return model, images, np.array([0, 0, 1]), weights[:, 1] - weights[:, 0]


def assert_is_so(result, norm, classifier, images, labels):
    """What an attack's result says of its images holds."""
    predicted = classifier.predict(result.x_adv, verbose=0).argmax(axis=1)
    np.testing.assert_array_equal(predicted != labels, result.success)
    assert result.x_adv.min() >= 0
    assert result.x_adv.max() <= 1
    sizes = np.linalg.norm((result.x_adv - images).reshape(len(images), -1), ORDER[norm], axis=1)
    np.testing.assert_allclose(sizes[result.success], result.distance[result.success], atol=1e-6)
    assert np.all(np.isinf(result.distance[~result.success]))
    np.testing.assert_array_equal(result.x_adv[~result.success], images[~result.success])
    wrong = classifier.predict(images, verbose=0).argmax(axis=1) != labels
    assert np.all(result.success[wrong])
    assert np.all(result.distance[wrong] == 0)
    assert np.all((result.queries > 0) == ~wrong)


class Counted(layers.Layer):
    """The identity; counts the calls by Python, which a compiled function makes but once."""

    calls = 0

    def call(self, x):
        Counted.calls += 1
        return x


def counted(classifier):
    """`classifier` behind a `Counted`."""
    images = keras.Input(classifier.input_shape[1:])
    return keras.Model(images, classifier(Counted()(images)))


def scaled(classifier, factor):
    """`classifier` with its logits times `factor`."""
    return keras.Model(classifier.inputs, layers.Rescaling(factor)(classifier.outputs[0]))


def update(defense, classifier, images, labels, weight=None, loss=None, **settings):
    """The update of one step and the robust classifier that made it, eagerly."""
    robust = tvkeras.RobustClassifier(classifier, defense, dtype=classifier.dtype, **settings)
    robust.compile(keras.optimizers.SGD(0.1), loss=loss)
    trainable = [keras.ops.convert_to_tensor(v.value) for v in robust.trainable_variables]
    state = [keras.ops.convert_to_tensor(v.value) for v in robust.non_trainable_variables]
    result, _ = robust.compute_update(
        trainable,
        state,
        keras.ops.convert_to_tensor(images),
        keras.ops.convert_to_tensor(labels),
        None if weight is None else keras.ops.convert_to_tensor(weight),
    )
    return result


def arrays(tensors):
    """Tensors as NumPy arrays."""
    return [keras.ops.convert_to_numpy(tensor) for tensor in tensors]


def assert_close(actual, expected, rtol=1e-9):
    """Lists of tensors agree to `rtol` of the largest entry of all."""
    actual, expected = arrays(actual), arrays(expected)
    scale = max(np.abs(array).max() for array in expected)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * scale)


def distance(actual, expected):
    """Relative l2 distance of two lists of tensors."""
    flat = [np.concatenate([a.ravel() for a in arrays(side)]) for side in (actual, expected)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


@pytest.fixture(scope="session")
def digits():
    """Training and test digits."""
    return tvkeras.data.load("digits", "train"), tvkeras.data.load("digits", "test")


def prepared(folder, sides):
    """A TFDS builder of 70 and 20 one-coloured images, prepared in `folder`."""
    tfds = pytest.importorskip("tensorflow_datasets")
    shape = (sides[0], sides[0], 3) if len(sides) == 1 else (None, None, 3)

    class Synthetic(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(70), "validation": self._generate_examples(20)}

        def _generate_examples(self, count):
            rng = np.random.default_rng(count)
            for index in range(count):
                image = np.full((*rng.choice(sides, 2), 3), index, np.uint8)
                yield index, {"image": image, "label": index % 3}

    Synthetic(data_dir=folder).download_and_prepare()
    return Synthetic(data_dir=folder)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """A prepared TFDS data set of differently large images, as ImageNet's are."""
    return prepared(tmp_path_factory.mktemp("tfds"), range(40, 60))


@pytest.fixture(scope="session")
def same_size(tmp_path_factory):
    """A prepared TFDS data set of equally large images without a test split."""
    return prepared(tmp_path_factory.mktemp("tfds"), [8])


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """The folder of a site of all entries."""
    return site.build(tvkeras.zoo.names(), tmp_path_factory.mktemp("site") / "new").parent
