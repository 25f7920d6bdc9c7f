"""The recipe for short runs: losses, averages, rates, ramps, starts and choices."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest

import tvkeras
from tests.conftest import assert_close, batch, net, update
from tvkeras import backends, checkpoint, data, runs
from tvkeras.training import losses, schedules, settings, validation
from tvkeras.training.averaging import Lookahead
from tvkeras.training.loop import load_start
from tvkeras.training.recorder import Recorder


def test_a_smoothed_loss_is_the_mean_over_labels():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)

    def loss(smoothing, labels):
        return keras.ops.convert_to_numpy(
            losses.SmoothedCrossentropy(smoothing).call(
                keras.ops.convert_to_tensor(labels), keras.ops.convert_to_tensor(logits)
            )
        )

    every = np.mean([loss(0.0, np.full(6, k)) for k in range(5)], axis=0)
    np.testing.assert_allclose(loss(0.2, labels), 0.8 * loss(0.0, labels) + 0.2 * every)
    plain = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    np.testing.assert_allclose(loss(0.0, labels), keras.ops.convert_to_numpy(plain), rtol=1e-6)
    with pytest.raises(ValueError, match=r"smoothing must be a number >= 0 and <= 1"):
        losses.SmoothedCrossentropy(1.2)


def test_a_triangle_climbs_and_falls_linearly():
    assert float(schedules.triangle(100)(130)) == pytest.approx(1.5 * 0.07)  # and stays there
    for steps in (1, 10, 1000):
        rate = schedules.triangle(steps, learning_rate=2.0, warmup=0.2, start=0.1, end=0.05)
        if steps == 1:
            assert float(rate(0)) == pytest.approx(0.2)
            continue
        points = [0, steps // 10, steps // 5, round(0.6 * steps), steps]
        expected = [0.2, 1.1, 2.0, 1.05, 0.1]
        np.testing.assert_allclose([float(rate(p)) for p in points], expected, rtol=1e-5)


def test_biases_do_not_decay_and_have_their_own_rate():
    classifier = net(dtype="float32", batch_norm=True)
    optimizer = schedules.sgd(
        10, schedule=lambda steps: 0.1, momentum=0.0, weight_decay=0.5, bias_rate=64.0
    )
    optimizer.build(classifier.trainable_variables)
    classifier.set_weights([weights + 1 for weights in classifier.get_weights()])
    values = {v.path: keras.ops.convert_to_numpy(v).copy() for v in classifier.trainable_variables}
    optimizer.apply([keras.ops.ones(v.shape) for v in classifier.trainable_variables])
    for variable in classifier.trainable_variables:
        rate = 6.4 if variable.name == "beta" else 0.1
        decay = 0.0 if variable.name in ("beta", "gamma", "bias") else 0.1 * 0.5
        expected = values[variable.path] * (1 - decay) - rate
        np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), expected, rtol=1e-5)


def trained(averaging, epochs=1):
    """A robust classifier after 7 steps an epoch, with dropout and BatchNorm."""
    keras.utils.set_random_seed(0)
    images, labels = batch(56, dtype="float32")
    robust = tvkeras.RobustClassifier(
        net(dtype="float32", batch_norm=True, dropout=0.2),
        tvkeras.TVLipschitz(fd_step=0.1),
        averaging=averaging,
    )
    robust.compile(keras.optimizers.SGD(0.5))
    robust.fit(images, labels, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return robust


def test_lookahead_sets_weights_and_statistics_to_their_average():
    """The last of 7 steps averages too: what is left in the classifier is the average."""
    robust = trained(Lookahead(steps=7, every=3))
    weights = [v for v in robust.classifier.variables if "seed" not in v.name]
    assert len(robust.averages) == 8
    for variable, average in zip(weights, robust.averages, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(variable), keras.ops.convert_to_numpy(average)
        )
    plain = trained(None)
    # Up to the first average a step is what it is without; k is (3 / 7)^3 * 0.95^3 there.
    assert not np.allclose(robust.classifier.get_weights()[0], plain.classifier.get_weights()[0])
    same = trained(Lookahead(steps=7, every=3, decay=0.0))  # keeps nothing of the past
    for one, other in zip(
        same.classifier.get_weights(), plain.classifier.get_weights(), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_lookahead_is_the_formula():
    rng = np.random.default_rng(0)
    lookahead = Lookahead(steps=10, every=4, decay=0.9)
    fast, slow = rng.normal(size=3), rng.normal(size=3)
    for step in (3, 4, 10):
        kept = 0.9**4 * (step / 10) ** 3
        expected = kept * slow + (1 - kept) * fast
        (weights,), (averages,) = (
            [keras.ops.convert_to_numpy(value) for value in part]
            for part in lookahead(
                keras.ops.convert_to_tensor(step),
                [keras.ops.convert_to_tensor(fast)],
                [keras.ops.convert_to_tensor(slow)],
            )
        )
        np.testing.assert_allclose(weights, fast if step == 3 else expected, rtol=1e-6)
        np.testing.assert_allclose(averages, slow if step == 3 else expected, rtol=1e-6)
    kept = [
        step
        for step in range(1, 15)
        if not keras.ops.any(
            Lookahead(steps=14, epoch_steps=7, every=3)(
                keras.ops.convert_to_tensor(step), [keras.ops.ones(1)], [keras.ops.zeros(1)]
            )[1][0]
        )
    ]
    assert sorted({*range(1, 15)} - {*kept}) == [3, 6, 7, 10, 13, 14]  # ends of epochs too
    with pytest.raises(ValueError, match="decay must be a number"):
        Lookahead(steps=10, decay=1.1)


@pytest.mark.parametrize(
    "defense",
    [
        tvkeras.TVLipschitz(tv_weight=0.4, lipschitz_weight=0.2, fd_step=0.1),
        tvkeras.AdversarialTraining(epsilon=0.4, step_size=0.2, steps=2, random_start=False),
        tvkeras.TRADES(beta=2.0, epsilon=0.4, steps=2),
    ],
    ids=lambda defense: type(defense).__name__,
)
def test_a_ramp_multiplies_the_defence(defense):
    """The first of four steps trains at a quarter of the weights or the radius."""
    weights = {"tv_weight", "lipschitz_weight", "epsilon", "step_size", "beta"}
    fields = {field.name: getattr(defense, field.name) for field in dataclasses.fields(defense)}
    quarter = {k: v / 4 for k, v in fields.items() if k in weights and isinstance(v, float)}
    if isinstance(defense, tvkeras.TRADES):  # whose radius stays
        quarter = {"beta": quarter["beta"]}
    weaker = dataclasses.replace(defense, **quarter)
    classifier, (images, labels) = net(), batch()
    one = update(defense, classifier, images, labels, ramp_steps=4)
    other = update(weaker, classifier, images, labels)
    assert_close(one.gradients, other.gradients, rtol=1e-6)
    full = update(defense, classifier, images, labels, ramp_steps=1)
    assert_close(full.gradients, update(defense, classifier, images, labels).gradients, rtol=1e-6)


def test_an_alternating_flip_shows_both_sides_in_two_epochs(digits):
    augmentation = data.Augmentation(crop=0, flip="alternating", cutout=0)
    few = digits[0].take(np.arange(64), "few")

    def epoch(number):
        batches = data.Batches(few, 16, seed=3, augmentation=augmentation)
        batches.begin_epoch(number)
        images = np.concatenate([batches[index][0] for index in range(4)])
        return images[np.argsort(batches._order)]

    first, second, third = map(epoch, range(3))
    same = (first == few.images).all(axis=(1, 2, 3))
    assert 16 < same.sum() < 48
    np.testing.assert_array_equal(second, first[:, :, ::-1])
    np.testing.assert_array_equal(third, first)
    with pytest.raises(ValueError, match="flip must be one of"):
        data.Augmentation(flip="sometimes")
    classifier = tvkeras.models.build("small_cnn", 10, width=2)
    robust = tvkeras.RobustClassifier(
        classifier, tvkeras.Undefended(), augmentation, averaging=Lookahead(steps=9)
    )
    again = tvkeras.RobustClassifier.from_config(robust.get_config())
    assert (again.augmentation, again.averaging) == (augmentation, robust.averaging)
    robust.compile(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match=r"flip='alternating' needs an x that mirrors"):
        robust.fit(few.images, few.labels)


def test_an_average_begins_with_the_weights_that_were_loaded():
    robust = trained(Lookahead(steps=1000))
    images, labels = batch(8, dtype="float32")
    fresh = tvkeras.RobustClassifier(
        net(dtype="float32", batch_norm=True, dropout=0.2),
        tvkeras.Undefended(),
        averaging=Lookahead(steps=1, every=1, decay=1.0),  # keeps all of the average
    )
    fresh.classifier.set_weights(robust.classifier.get_weights())
    fresh.compile(keras.optimizers.SGD(0.5))
    fresh.fit(images, labels, batch_size=8, verbose=0)
    for one, other in zip(
        fresh.classifier.trainable_variables, robust.classifier.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other), rtol=1e-5, atol=1e-6
        )


def test_a_reflected_crop_is_a_window_of_the_mirrored_image():
    images = np.random.default_rng(0).random((20, 6, 7, 2)).astype("float32")
    augmentation = data.Augmentation(crop=2, fill="reflect", flip=False, cutout=0)
    result = augmentation(keras.ops.convert_to_tensor(images), keras.random.SeedGenerator(0))
    for image, crop in zip(images, keras.ops.convert_to_numpy(result), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        windows = [padded[i : i + 6, j : j + 7] for i in range(5) for j in range(5)]
        assert any(np.array_equal(window, crop) for window in windows)


def test_a_run_starts_from_a_checkpoint_or_the_best_weights_of_another(tmp_path):
    robust = trained(Lookahead(steps=7))
    arrays = checkpoint.values([*robust.variables, *robust.optimizer.variables])
    checkpoint.save(tmp_path / "checkpoints" / "last", arrays, {})
    runs.save_float16(robust.classifier, tmp_path / "best.weights.h5")
    for source, rtol in ((tmp_path / "checkpoints" / "last", 0), (tmp_path, 1e-3)):
        classifier = net(dtype="float32", batch_norm=True, dropout=0.2)
        assert len(load_start(classifier, source)) == 64
        for one, other in zip(
            classifier.get_weights(), robust.classifier.get_weights(), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)
    with pytest.raises(checkpoint.CheckpointError, match="holds no weights of this model"):
        load_start(net(dtype="float32"), tmp_path / "checkpoints" / "last")
    with pytest.raises(ValueError, match=r"initial_weights must be a run folder.*does not exist"):
        load_start(net(dtype="float32"), tmp_path / "nothing")


def test_validation_is_the_short_attack_and_the_noise_on_held_out_images(digits):
    few = digits[0].take(np.arange(200), "few")
    robust = tvkeras.RobustClassifier(
        tvkeras.models.build("small_cnn", 10, width=4), tvkeras.Undefended()
    )
    robust.compile(keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy"])
    held_out = data.Batches(few, 16)
    checks = [
        validation.RobustValidation(held_out, norm="l2", epsilon=0.5),
        validation.NoisyValidation(held_out, noise=0.5),
    ]
    logs = robust.fit(
        data.Batches(few, 8, seed=0), epochs=2, callbacks=checks, shuffle=False, verbose=0
    ).history
    attack = tvkeras.attacks.ProjectedGradient(norm="l2", steps=5)
    result = attack(robust.classifier, few.images, few.labels, epsilon=0.5)
    assert logs["val_robust_accuracy"][-1] == pytest.approx(1 - result.success.mean())
    votes = tvkeras.bounds.Smoothed(robust.classifier, 0.5).certify(few.images, samples=100).votes
    shares = votes[np.arange(200), few.labels].mean() / 100
    clean = np.mean(robust.classifier.predict(few.images / 255, verbose=0).argmax(1) == few.labels)
    assert logs["val_noisy_accuracy"][-1] == pytest.approx(shares, abs=0.05)
    assert clean - shares > 0.1


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ({"val_accuracy": (1, 3, 2)}, 1),
        ({"val_accuracy": (1, 3, 2), "val_noisy_accuracy": (3, 2, 1)}, 0),
        ({"val_noisy_accuracy": (3, 2, 1), "val_robust_accuracy": (1, 2, 3)}, 2),
    ],
)
def test_the_best_epoch_is_chosen_by_what_a_run_is_for(measured, best, digits, tmp_path):
    few = digits[0].take(np.arange(16), "few")
    robust = tvkeras.RobustClassifier(
        tvkeras.models.build("small_cnn", 10, width=4), tvkeras.Undefended()
    )
    robust.compile(keras.optimizers.SGD(0.1), metrics=["accuracy"])
    weights = []

    def measure(epoch, logs):
        logs |= {name: values[epoch] / 4 for name, values in measured.items()}
        weights.append(robust.classifier.get_weights())

    run = runs.Run(tmp_path)
    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=measure), Recorder(run)]
    batches = data.Batches(few, 8, seed=0)
    robust.fit(batches, epochs=3, callbacks=callbacks, shuffle=False, verbose=0)
    runs.load_weights(robust.classifier, run.weights_path)
    for kept, expected in zip(robust.classifier.get_weights(), weights[best], strict=True):
        np.testing.assert_allclose(kept, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("has", [True, False])
def test_automatic_precision_keeps_the_rules_of_the_step(has, monkeypatch):
    monkeypatch.setattr(backends, "gains_from_bfloat16", lambda: has)
    long, short = tvkeras.TVLipschitz(fd_step=0.1), tvkeras.TVLipschitz(fd_step=0.01)
    assert settings.Execution().policy(long) == ("mixed_bfloat16" if has else "float32")
    assert settings.Execution().policy(short) == "float32"


@pytest.mark.parametrize(
    ("vendor", "flags", "gains"),
    [
        ("GenuineIntel", "avx512f amx_bf16 avx512_bf16", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
    ],
)
def test_bfloat16_is_for_processors_that_are_faster_in_it(vendor, flags, gains, tmp_path):
    described = tmp_path / "cpuinfo"
    described.write_text(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n")
    assert backends.processor_gains_from_bfloat16(described) == gains
    assert not backends.processor_gains_from_bfloat16(tmp_path / "absent")


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_airbench_is_whitened_by_its_images_and_begins_as_the_identity(noise):
    model = tvkeras.models.build("airbench", 10, input_shape=(16, 16, 3), widths=(32, 64, 64))
    rng = np.random.default_rng(0)
    mixing = rng.random((3, 3))
    images = np.clip(rng.random((2000, 16, 16, 3)) @ mixing * 100, 0, 255).astype("uint8")
    tvkeras.models.whiten(model, images, noise, floor=0.0)
    layer = model.get_layer(tvkeras.models.WHITENING)
    assert not layer.trainable
    seen = images / 255 + noise * rng.standard_normal(images.shape)
    features = keras.ops.convert_to_numpy(layer(seen.astype("float32"))).reshape(-1, 24)
    np.testing.assert_allclose(features[:, 12:], -features[:, :12], atol=1e-2)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-2)
    np.testing.assert_allclose(np.cov(features[:, :12].T), np.eye(12), atol=1e-2)
    first = next(layer for layer in model.layers if layer.name.startswith("conv2d"))
    x = rng.random((1, 8, 8, 24)).astype("float32")
    np.testing.assert_allclose(keras.ops.convert_to_numpy(first(x))[..., :24], x, rtol=1e-5)


@pytest.mark.parametrize("name", ["94", "95", "96"])
def test_airbench_has_the_published_sizes(name):
    settings = {
        "94": {},
        "95": {"widths": (128, 384, 384)},
        "96": {"widths": (128, 384, 512), "residual": True},
    }
    model = tvkeras.models.build("airbench", 10, **settings[name])
    widths = (24, *settings[name].get("widths", (64, 256, 256)))
    convolutions = 3 if "residual" in settings[name] else 2
    kernels = sum(
        9 * (before * after + (convolutions - 1) * after**2)
        for before, after in itertools.pairwise(widths)
    )
    trainable = kernels + convolutions * sum(widths[1:]) + widths[-1] * 10
    assert trainable == sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    with pytest.raises(ValueError, match="Did you mean 'max'"):
        tvkeras.models.build("airbench", 10, pooling="Max")
