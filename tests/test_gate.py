"""What every public function does with a classifier that is none, or one of other bounds."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import tvkeras
from tests.conftest import BACKEND
from tests.entries import (
    COMPUTED,
    COUNT,
    ENTRIES,
    FIT,
    IMAGES,
    LABELLED,
    LABELS,
    OTHERS,
    PIXELS,
    SHAPE,
    UNLABELLED,
    network,
    numbers,
    shared,
)
from tvkeras import attacks, contract, evaluation, inputs
from tvkeras.inference import CompiledClassifier


def integers(dtype):
    images = keras.Input(SHAPE, dtype=dtype)
    return keras.Model(images, network()(layers.Rescaling(1 / 255)(images)))


def softmax_operation():
    images = keras.Input(SHAPE)
    return keras.Model(images, ops.softmax(network()(images)))


def functional_softmax():
    images = keras.Input(SHAPE)
    x = layers.Dense(5)(layers.Flatten()(images))
    return keras.Model(images, layers.Dense(4, activation="softmax", dtype="float32")(x))


def nested(*added):
    return keras.Sequential([keras.Input(SHAPE), network(after=added)])


SOFTMAX = {
    "dense": lambda: network(after=[layers.Dense(4, activation="softmax")]),
    "layer": lambda: network(after=[layers.Softmax()]),
    "activation": lambda: network(after=[layers.Activation("softmax")]),
    "functional": functional_softmax,
    "operation": softmax_operation,
    "nested": lambda: nested(layers.Softmax()),
}
BAD_CLASSIFIERS = {
    "none": (lambda: None, "built keras.Model"),
    "a function": (lambda: lambda x: x, "built keras.Model"),
    "unbuilt": (lambda: keras.Sequential([layers.Dense(4)]), "built keras.Model"),
    **{
        f"softmax {name}": (make, r"is a softmax.*tvkeras\.logits")
        for name, make in SOFTMAX.items()
    },
    "sigmoid": (lambda: network(after=[layers.Dense(4, activation="sigmoid")]), "is a sigmoid"),
    "uint8 input": (lambda: integers("uint8"), r'Input of uint8.*dtype="float32"'),
    "int32 input": (lambda: integers("int32"), "Input of int32"),
    "rescaling": (lambda: network([layers.Rescaling(1 / 255)]), r"bounds=\(0, 255\)"),
    "rescaling to [-1, 1]": (lambda: network([layers.Rescaling(1 / 127.5, -1)]), "8-bit pixels"),
    "nested rescaling": (
        lambda: network([keras.Sequential([layers.Rescaling(1 / 255)])]),
        "8-bit pixels",
    ),
    "normalization": (
        lambda: network([layers.Normalization(mean=[120.0], variance=[3600.0])]),
        "8-bit pixels",
    ),
}
ONLY_CALLED = {  # seen when it is asked, or its outputs' shape is
    "hidden softmax": (
        lambda: network(after=[layers.Softmax(), layers.Identity()]),
        "outputs are probabilities",
    ),
    "one output": (lambda: network(after=[layers.Dense(1)]), "two classes or more"),
    "overflow": (lambda: network(after=[layers.Rescaling(1e38), layers.Rescaling(1e38)]), "finite"),
}
MODEL_ENTRIES = {
    **LABELLED,
    **UNLABELLED,
    **OTHERS,
    "wrapping": lambda m, x, y: tvkeras.RobustClassifier(m, tvkeras.Undefended()),
    "compiled": lambda m, x, y: CompiledClassifier(m),
}
del MODEL_ENTRIES["loss_statistics"]  # it is given what is compiled
if BACKEND == "tensorflow":
    MODEL_ENTRIES["exporting"] = lambda m, x, y: tvkeras.saved_model.export(m, "never_written")


@functools.cache
def bad(what):
    return BAD_CLASSIFIERS[what][0]()


@functools.cache
def only_called(what):
    return CompiledClassifier(ONLY_CALLED[what][0]())


@pytest.mark.parametrize("what", BAD_CLASSIFIERS)
def test_the_gate_refuses_bad_classifiers(what):
    with pytest.raises(ValueError, match=rf"(?s)classifier must .*{BAD_CLASSIFIERS[what][1]}"):
        contract.check(bad(what))


@pytest.mark.parametrize("name", MODEL_ENTRIES)
def test_every_entry_point_refuses_bad_classifiers(name):
    for what in ("none", "softmax dense", "uint8 input", "rescaling"):
        with pytest.raises(ValueError, match=rf"(?s)classifier must .*{BAD_CLASSIFIERS[what][1]}"):
            MODEL_ENTRIES[name](bad(what), IMAGES, LABELS)


@pytest.mark.parametrize("name", [n for n in COMPUTED if n in {**LABELLED, **UNLABELLED}])
def test_a_classifier_of_other_than_logits_is_found_out(name):
    for what, (_, message) in ONLY_CALLED.items():
        with pytest.raises(ValueError, match=rf"classifier must .*{message}"):
            ENTRIES[name](only_called(what), IMAGES, np.zeros(COUNT, int))


@pytest.mark.parametrize("what", SOFTMAX)
def test_logits_strips_the_softmax(what):
    classifier = bad(f"softmax {what}")
    stripped = tvkeras.logits(classifier)
    contract.check(stripped)
    probabilities = ops.softmax(stripped.predict(IMAGES, verbose=0))
    np.testing.assert_allclose(probabilities, classifier.predict(IMAGES, verbose=0), rtol=1e-5)
    assert stripped.count_params() == classifier.count_params()


@pytest.mark.parametrize("make", [network, lambda: bad("sigmoid"), lambda: None])
def test_logits_of_no_softmax_are_refused(make):
    with pytest.raises(ValueError, match=r"classifier must be a .* that ends in one softmax"):
        tvkeras.logits(make())


# ---- Bounds -------------------------------------------------------------------------------

RESCALED = {  # the same classifier for images in other bounds
    (0, 255): lambda: network([layers.Rescaling(1 / 255)]),
    (-1, 1): lambda: network([layers.Rescaling(0.5, 0.5)]),
}


@functools.cache
def rescaled(pair):
    return CompiledClassifier(RESCALED[pair](), bounds=pair)


BOUNDED = ("pgd", "fmn", "cw", "suite", "estimated", "smoothed", "scores", "detector")


@pytest.mark.parametrize(("pair", "kind"), [((0, 255), "uint8"), ((-1, 1), "floats")])
@pytest.mark.parametrize("name", [n for n in BOUNDED if n in COMPUTED])
def test_bounds_change_no_distance_and_no_size(name, pair, kind):
    native = inputs.Bounds.of(pair).native(IMAGES) if kind == "floats" else PIXELS
    found = ENTRIES[name](rescaled(pair), native, LABELS)
    expected = ENTRIES[name](shared(), IMAGES, LABELS)
    if isinstance(found, attacks.AttackResult):
        assert expected.success.any()
        np.testing.assert_array_equal(found.success, expected.success)
        np.testing.assert_allclose(found.distance, expected.distance, rtol=1e-3)
        predicted = rescaled(pair).classifier.predict(found.x_adv, verbose=0).argmax(axis=1)
        np.testing.assert_array_equal(predicted != LABELS[: len(predicted)], found.success)
        unit = inputs.Bounds.of(pair).unit(found.x_adv)
        np.testing.assert_allclose(unit, expected.x_adv, atol=1e-3)
    else:
        np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_an_audit_is_the_same_in_other_bounds():
    one = evaluation.audit(shared(), IMAGES, LABELS, norm="l2", epsilons=(0.1,), steps=5)
    other = evaluation.audit(
        rescaled((0, 255)), PIXELS, LABELS, norm="l2", epsilons=(0.1,), steps=5
    )
    assert one.verdict == other.verdict
    for a, b in zip(one.checks, other.checks, strict=True):
        assert (a.name, a.status) == (b.name, b.status)
        assert a.figure == pytest.approx(b.figure, rel=0.1, abs=1e-3)


@pytest.mark.parametrize(("pair", "kind"), [((0, 255), "floats"), ((-1, 1), "uint8")])
def test_bounds_change_no_penalty_and_no_training(pair, kind):
    native = inputs.Bounds.of(pair).native(IMAGES) if kind == "floats" else PIXELS
    trails = []
    for classifier, settings, images in (
        (network(), {}, IMAGES),
        (RESCALED[pair](), {"bounds": pair}, native),
    ):
        defense = tvkeras.TVLipschitz(lipschitz_weight=0.1, fd_step=0.1)
        augmentation = tvkeras.data.Augmentation(crop=1)
        robust = tvkeras.RobustClassifier(classifier, defense, augmentation, **settings)
        robust.compile(keras.optimizers.SGD(0.1))
        history = robust.fit(images, LABELS, epochs=2, **FIT).history
        evaluated = robust.evaluate(images, LABELS, verbose=0)
        trails.append((numbers(history), numbers(robust.predict(images, verbose=0)), evaluated))
    for one, other in zip(*trails, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    plain = tvkeras.RobustClassifier(RESCALED[pair](), defense, bounds=pair)
    assert tvkeras.RobustClassifier.from_config(plain.get_config()).bounds == pair
    with pytest.raises(ValueError, match="x must be finite and lie in"):
        robust.fit(inputs.Bounds.of(pair).native(2 * IMAGES), LABELS, verbose=0)


def test_a_robust_classifier_is_attacked_in_its_own_bounds():
    robust = tvkeras.RobustClassifier(RESCALED[0, 255](), tvkeras.Undefended(), bounds=(0, 255))
    model = CompiledClassifier.of(robust)
    assert (model.classifier, model.bounds) == (robust.classifier, (0, 255))
    with pytest.raises(ValueError, match=r"bounds must be those of RobustClassifier, \[0, 255\]"):
        CompiledClassifier(robust, bounds=(0, 1))


@pytest.mark.parametrize("name", BOUNDED)
def test_images_in_the_wrong_bounds_are_refused(name):
    for images, message in (
        (IMAGES, "these are images in"),
        (IMAGES * 300, "got values from"),
        (-IMAGES, "got values from"),
    ):
        with pytest.raises(ValueError, match=rf"images must .* \[0, 255\].*{message}"):
            ENTRIES[name](rescaled((0, 255)), images, LABELS)


@pytest.mark.parametrize("pair", [(0,), (1, 0), (0, 0), (0, np.inf), "0-255", None, 255, (0, 1, 2)])
def test_bounds_are_a_pair(pair):
    with pytest.raises(ValueError, match="bounds must be a pair such as"):
        inputs.Bounds.of(pair)
