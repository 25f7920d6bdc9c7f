import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

import tvkeras
from tests.conftest import BACKEND, batch, net
from tvkeras.defenses import TVLipschitz, Undefended

DEFENSE = TVLipschitz(tv_weight=0.2, lipschitz_weight=0.1, fd_step=0.1)


def fitted(classifier, defense=DEFENSE, epochs=2, count=16, **compile_arguments):
    rng = np.random.default_rng(0)
    images = rng.random((count, *classifier.input_shape[1:])).astype("float32")
    labels = rng.integers(0, 4, count)
    robust = tvkeras.RobustClassifier(classifier, defense)
    arguments = {"optimizer": keras.optimizers.SGD(0.01), "metrics": ["accuracy"]}
    robust.compile(**{**arguments, **compile_arguments})
    history = robust.fit(
        images, labels, epochs=epochs, batch_size=8, verbose=0, validation_data=(images, labels)
    )
    return robust, history.history


def layer_norm_network():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3),
            layers.LayerNormalization(),
            layers.Activation("gelu"),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )


@pytest.mark.parametrize(
    "make",
    [layer_norm_network, lambda: net(dtype="float32", batch_norm=True, dropout=0.3)],
    ids=["layer_norm", "dropout"],
)
def test_any_classifier_trains(make):
    _, history = fitted(make())
    expected = {"loss", "accuracy", "total_variation", "lipschitz", "val_loss", "val_accuracy"}
    assert set(history) == expected
    assert np.isfinite(list(history.values())).all()
    assert history["lipschitz"][0] >= history["total_variation"][0] > 0


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(1e-3),
        lambda: keras.optimizers.SGD(0.01, momentum=0.9, clipnorm=0.1),
        lambda: keras.optimizers.SGD(0.01, use_ema=True, ema_overwrite_frequency=2),
        lambda: keras.optimizers.SGD(0.01, gradient_accumulation_steps=2),
    ],
    ids=["adam", "clipped", "ema", "accumulated"],
)
def test_any_optimizer_trains(optimizer):
    classifier = net(dtype="float32")
    untrained = classifier.get_weights()
    _, history = fitted(classifier, optimizer=optimizer())
    assert np.isfinite(history["loss"]).all()
    for trained, before in zip(classifier.get_weights(), untrained, strict=True):
        assert (trained != before).any()


def test_compilation_does_not_change_the_result():
    def weights(**settings):
        keras.utils.set_random_seed(1)
        return fitted(net(dtype="float32", batch_norm=True), epochs=1, **settings)[0].get_weights()

    expected = weights(jit_compile=False)
    for settings in ({"jit_compile": True}, {"jit_compile": True, "steps_per_execution": 2}):
        for one, other in zip(weights(**settings), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains(policy):
    classifier = net(dtype=policy, batch_norm=True)
    robust, history = fitted(classifier, TVLipschitz(lipschitz_weight=0.1, fd_step=0.2))
    assert np.isfinite(history["loss"]).all()
    scaled = isinstance(robust.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    assert all(variable.dtype == "float32" for variable in classifier.trainable_variables)


@pytest.mark.parametrize(("policy", "step"), [("mixed_bfloat16", 0.1), ("mixed_float16", 0.05)])
def test_a_step_too_small_for_the_precision_names_a_usable_one(policy, step):
    classifier = net(dtype=policy)
    with pytest.raises(ValueError, match=rf"fd_step must be >= {step} .* got fd_step=0.01"):
        tvkeras.RobustClassifier(classifier, TVLipschitz(fd_step=0.01))
    tvkeras.RobustClassifier(classifier, TVLipschitz(fd_step=step))


def test_an_overflowing_float16_gradient_leaves_the_statistics_finite():
    classifier = net(dtype="mixed_float16", batch_norm=True)
    robust = tvkeras.RobustClassifier(classifier, TVLipschitz(fd_step=0.1))
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.01), initial_scale=2.0**30
    )
    robust.compile(optimizer)
    images, labels = batch(dtype="float32")
    before = classifier.get_weights()
    robust.fit(images, labels, verbose=0)
    assert all(np.isfinite(weights).all() for weights in classifier.get_weights())
    np.testing.assert_array_equal(classifier.get_weights()[0], before[0])  # the step was skipped


def test_saving_keeps_everything_and_the_inner_classifier_is_plain(tmp_path):
    robust, _ = fitted(net(dtype="float32", batch_norm=True))
    robust.save(tmp_path / "robust.keras")
    loaded = keras.models.load_model(tmp_path / "robust.keras", safe_mode=True)
    assert loaded.defense == robust.defense
    assert type(loaded.optimizer) is type(robust.optimizer)
    images, labels = batch(dtype="float32")
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), robust.predict(images, verbose=0)
    )
    loaded.fit(images, labels, verbose=0)
    robust.classifier.save(tmp_path / "plain.keras")
    plain = keras.models.load_model(tmp_path / "plain.keras", custom_objects={}, safe_mode=True)
    assert {type(layer).__module__.split(".")[0] for layer in plain.layers} == {"keras"}
    np.testing.assert_array_equal(
        plain.predict(images, verbose=0), robust.predict(images, verbose=0)
    )


def test_uint8_images_are_the_same_as_their_float_values():
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (8, 6, 6, 2), dtype=np.uint8)
    labels = rng.integers(0, 4, 8)
    results = []
    for images in (raw, raw.astype("float32") / 255):
        keras.utils.set_random_seed(0)
        robust = tvkeras.RobustClassifier(net(dtype="float32"), DEFENSE)
        robust.compile(keras.optimizers.SGD(0.1))
        robust.fit(images, labels, verbose=0, shuffle=False)
        results.append(robust.get_weights())
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_class_weights_and_soft_labels_reach_the_objective():
    images, labels = batch(dtype="float32")
    robust = tvkeras.RobustClassifier(net(dtype="float32"), DEFENSE)
    robust.compile(
        keras.optimizers.SGD(0.1),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
    )
    history = robust.fit(images, np.eye(4, dtype="float32")[labels], verbose=0).history
    assert np.isfinite(history["loss"][0])
    before = robust.get_weights()
    nothing = np.zeros(len(labels), "float32")
    robust.fit(images, np.eye(4, dtype="float32")[labels], sample_weight=nothing, verbose=0)
    for one, other in zip(robust.get_weights(), before, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)  # the seeds' counters included


def test_the_seed_decides_the_augmentation():
    images, labels = batch(dtype="float32")

    def weights(seed):
        keras.utils.set_random_seed(0)
        augmentation = tvkeras.data.Augmentation(crop=2, cutout=2)
        robust = tvkeras.RobustClassifier(net(dtype="float32"), DEFENSE, augmentation, seed=seed)
        robust.compile(keras.optimizers.SGD(0.1))
        robust.fit(images, labels, verbose=0, shuffle=False, epochs=2)
        return np.concatenate([w.ravel() for w in robust.classifier.get_weights()])

    np.testing.assert_array_equal(weights(0), weights(0))
    assert (weights(0) != weights(1)).any()


def test_a_generator_loses_no_batch_to_the_check():
    images, labels = batch(16, dtype="float32")
    pairs = iter([(images[:8], labels[:8]), (images[8:], labels[8:])])
    robust = tvkeras.RobustClassifier(net(dtype="float32"), Undefended())
    robust.compile(keras.optimizers.SGD(0.1))
    robust.fit((pair for pair in pairs), steps_per_epoch=2, verbose=0)
    assert int(robust.optimizer.iterations) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 255, y), r"x must be finite and lie in \[0, 1\], got values from"),
        (lambda x, y: (x - 0.5, y), "put any normalisation into the classifier"),
        (lambda x, y: (np.where(x > 0.9, np.nan, x), y), "must be finite"),
        (lambda x, y: (x, y + 4), r"y must lie in 0\.\.3"),
    ],
)
def test_bad_data_is_refused_before_the_first_step(change, message):
    robust = tvkeras.RobustClassifier(net(dtype="float32"), DEFENSE)
    robust.compile()
    with pytest.raises(ValueError, match=message):
        robust.fit(*change(*batch(dtype="float32")), verbose=0)
    assert int(robust.optimizer.iterations) == 0


@pytest.mark.parametrize(
    "last",
    [lambda: [layers.Dense(4, activation="softmax")], lambda: [layers.Dense(4), layers.Softmax()]],
)
def test_a_softmax_classifier_is_refused(last):
    classifier = keras.Sequential([keras.Input((6, 6, 2)), layers.Flatten(), *last()])
    with pytest.raises(ValueError, match=r"its last layer '.*' is a softmax"):
        tvkeras.RobustClassifier(classifier, DEFENSE)


def test_hidden_probabilities_are_found_at_the_first_batch():
    classifier = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Flatten(),
            layers.Dense(4),
            layers.Softmax(),
            layers.Identity(),
        ]
    )
    robust = tvkeras.RobustClassifier(classifier, DEFENSE)
    robust.compile()
    with pytest.raises(ValueError, match="outputs are probabilities"):
        robust.fit(*batch(dtype="float32"), verbose=0)


def test_other_misuse_is_refused():
    with pytest.raises(ValueError, match=r"classifier must be a built keras\.Model"):
        tvkeras.RobustClassifier(keras.Sequential([layers.Dense(4)]), DEFENSE)
    with pytest.raises(ValueError, match="Use an instance such as"):
        tvkeras.RobustClassifier(net(), TVLipschitz)
    for augmentation in (3, "flip", tvkeras.data.Augmentation):
        with pytest.raises(ValueError, match="augmentation must be None or an instance such as"):
            tvkeras.RobustClassifier(net(), DEFENSE, augmentation)
    robust = tvkeras.RobustClassifier(net(), DEFENSE)
    with pytest.raises(ValueError, match="from_logits=True"):
        robust.compile(loss=keras.losses.SparseCategoricalCrossentropy())
    with pytest.raises(ValueError, match="got reduction='sum'"):
        robust.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True, reduction="sum"))
    with pytest.raises(ValueError, match="from_logits=True"):
        robust.compile(loss="sparse_categorical_crossentropy")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the fused kernel is TensorFlow's")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_the_fast_twin_is_the_same_function(training, activation):
    from tvkeras import backends

    nested = keras.Sequential([keras.Input((6, 6, 3)), layers.BatchNormalization(scale=False)])
    images = keras.Input((6, 6, 3))
    x = layers.BatchNormalization(momentum=0.7)(layers.Conv2D(3, 3, padding="same")(images))
    x = layers.Activation(activation)(x)
    x = layers.BatchNormalization()(layers.Flatten()(nested(x)))
    classifier = keras.Model(images, layers.Dense(2)(x))
    for variable, noise in zip(classifier.variables, itertools.count(1)):
        variable.assign(variable + 0.01 * noise)
    twin = backends.fast_twin(classifier)
    fused = [type(layer).__name__ for layer in twin.layers if "Fused" in type(layer).__name__]
    # and the nested one; the flat one stays Keras's
    assert fused == ["FusedBatchNormalization", "FusedActivation"]
    arguments = (
        [variable.value for variable in classifier.trainable_variables],
        [variable.value for variable in classifier.non_trainable_variables],
        np.random.default_rng(0).random((8, 6, 6, 3)).astype("float32"),
    )
    one = twin.stateless_call(*arguments, training=training)
    other = classifier.stateless_call(*arguments, training=training)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def gradients(model):
        def loss(weights, images):
            outputs = model.stateless_call(weights, arguments[1], images, training=training)[0]
            return ops.sum(ops.square(outputs)), None

        found = backends.value_and_gradient(
            loss, (arguments[0], ops.convert_to_tensor(arguments[2]))
        )
        return keras.tree.flatten(found[1])

    for a, b in zip(gradients(twin), gradients(classifier), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the kernels are TensorFlow's")
@pytest.mark.parametrize(("size", "padding"), [(3, "same"), ((2, 1), "same"), ((1, 4), "valid")])
def test_a_small_convolution_has_the_gradients_of_its_kernel_and_images(size, padding):
    from tvkeras import backends

    keras.config.set_dtype_policy("mixed_bfloat16")
    images = keras.Input((8, 8, 128))

    def convolution(**arguments):
        layer = layers.Conv2D(130, size, padding=padding, **arguments)
        return keras.Model(images, layer(images))

    classifier = convolution()
    twin = backends.fast_twin(classifier)
    assert type(twin.layers[-1]).__name__ == "SmallConvolution"
    weights = [variable.value for variable in classifier.variables]
    rng = np.random.default_rng(0)
    x = ops.convert_to_tensor(rng.normal(size=(3, 8, 8, 128)), "float32")
    upstream = rng.normal(size=(3, *classifier.output_shape[1:]))

    def found(model):
        def loss(weights, x):
            outputs = ops.cast(model.stateless_call(weights, [], x)[0], "float32")
            return ops.sum(upstream * outputs), None

        return keras.tree.flatten(backends.value_and_gradient(loss, (weights, x))[1])

    # Keras's own gradients in bfloat16 are no measure: some processors add up in bfloat16.
    for one, exact in zip(found(twin), found(convolution(dtype="float32")), strict=True):
        one, exact = (ops.convert_to_numpy(ops.cast(g, "float32")) for g in (one, exact))
        np.testing.assert_allclose(one, exact, atol=0.03 * np.abs(exact).max())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the fused kernel is TensorFlow's")
def test_a_classifier_that_no_clone_equals_is_its_own_twin():
    from tvkeras import backends

    adapted = layers.Normalization()
    adapted.adapt(np.random.default_rng(0).random((50, 6, 6, 3)).astype("float32"))
    images = keras.Input((6, 6, 3))
    x = layers.BatchNormalization()(adapted(images))
    classifier = keras.Model(images, layers.Dense(2)(layers.Flatten()(x)))
    assert backends.fast_twin(classifier) is classifier


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the fused kernel is TensorFlow's")
def test_a_clone_that_is_a_little_off_is_no_twin():
    from tvkeras import backends

    class Hidden(layers.Layer):
        factor = 1.0  # which a clone does not have from the configuration

        def call(self, inputs):
            return inputs * self.factor

    for dtype, factor, same in (
        ("float32", 1.0, True),
        ("float32", 1.0001, False),
        ("mixed_bfloat16", 1.0, True),
        ("mixed_bfloat16", 1.05, False),
    ):
        keras.config.set_dtype_policy(dtype)
        images, hidden = keras.Input((6, 6, 3)), Hidden()
        hidden.factor = factor
        x = layers.BatchNormalization()(layers.Conv2D(3, 3)(images))
        classifier = keras.Model(images, layers.Dense(2)(layers.Flatten()(hidden(x))))
        assert (backends.fast_twin(classifier) is not classifier) == same
