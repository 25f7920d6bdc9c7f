"""What every public function does with images, labels and classifiers that are none.

A table of entry points, and tables of inputs: each pair is either refused, in words that name
the argument, or answered rightly.
"""

import functools
import importlib.util

import keras
import numpy as np
import pytest
from keras import layers, ops

import tvkeras
from tests.conftest import BACKEND
from tvkeras import attacks, bounds, contract, data, evaluation, inputs
from tvkeras.detection import GradientNormDetector, gradient_norms
from tvkeras.evaluation import suite, trials
from tvkeras.inference import CompiledClassifier, loss_statistics
from tvkeras.serving import Client

COUNT, SHAPE, CLASSES = 6, (4, 4, 1), 4
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8)
IMAGES = PIXELS.astype("float32") / 255
LABELS = np.arange(COUNT) % CLASSES


def network(before=(), after=()):
    """A classifier of tiny images with the same weights at every call."""
    keras.utils.set_random_seed(1)
    hidden = [layers.Flatten(), layers.Dense(8, activation="softplus"), layers.Dense(CLASSES)]
    return keras.Sequential([keras.Input(SHAPE), *before, *hidden, *after])


@functools.cache
def shared():
    """What all cases attack: compiled once."""
    return CompiledClassifier(network())


@functools.cache
def trained():
    """What all cases train, by a learning rate of 0."""
    robust = tvkeras.RobustClassifier(network(), tvkeras.TVLipschitz(fd_step=0.1))
    robust.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    return robust


class Echo:
    """A server's place in a client."""

    def ask(self, signature, images, timeout):
        pixels = np.asarray(images, "float32") / (255 if signature == "serving_uint8" else 1)
        logits = pixels.reshape(len(images), -1)
        return {"logits": logits, "probabilities": logits, "class_id": logits.argmax(axis=1)}


def client():
    found = Client("http://localhost:1", "model")
    found._transport = Echo()
    return found


# ---- Entry points: (model, images, labels) -> what it answers ------------------------------

NATIVE = {
    "pgd": attacks.ProjectedGradient(steps=2),
    "apgd": attacks.AutoPGD(steps=3),
    "apgd-t": attacks.AutoPGD(loss="targeted_dlr", steps=3),
    "fab": attacks.FastAdaptiveBoundary(norm="l2", steps=2),
    "square": attacks.Square(queries=3),
    "autoattack": attacks.AutoAttack(),
    "ddn": attacks.DecoupledDirectionNorm(steps=3),
    "fmn": attacks.FastMinimumNorm(steps=3),
    "cw": attacks.CarliniWagner(steps=3, weights=2),
    "evasive": attacks.EvasiveCarliniWagner(steps=3, weights=1, threshold=1.0),
}


def attacking(attack):
    radius = {"epsilon": 0.1} if attack.fixed_epsilon else {}
    return lambda model, images, labels: attack(model, images, labels, **radius)


def examples(images, labels):
    return data.Examples(
        name="n", split="s", images=images, labels=labels, num_classes=CLASSES, checksum=""
    )


DETECTOR = GradientNormDetector(norm="l2", statistic="loss", threshold=0.3)
TRIALS = [trials.Trial(name="pgd", attack=NATIVE["pgd"], epsilons=(0.1,), images=4)]

LABELLED = {
    **{name: attacking(attack) for name, attack in NATIVE.items()},
    "loss_statistics": lambda m, x, y: loss_statistics(m, x, y, "l2"),
    "estimated": bounds.estimated_bound,
    "audit": lambda m, x, y: evaluation.audit(m, x, y, norm="l2", epsilons=(0.1,), steps=2),
    "measure": lambda m, x, y: evaluation.measure(m, examples(x, y), epsilons=(0.1,)),
    "suite": lambda m, x, y: suite.run(m, x, y, TRIALS)[0].results["0.1"],
}
UNLABELLED = {
    "gradient_norms": lambda m, x, _: gradient_norms(m, x, "l2", "model"),
    "scores": lambda m, x, _: DETECTOR.scores(m, x),
    "detects": lambda m, x, _: DETECTOR.detects(m, x),
    "detector": lambda m, x, _: GradientNormDetector.fit(m, x, 0.3),
    "smoothed": lambda m, x, _: bounds.smoothed_bound(
        m, x, sigma=0.1, selection_samples=4, samples=20, batch_size=10
    ),
}
FIT = {"batch_size": 2, "verbose": 0, "shuffle": False}
TRAINED = {
    "fit": lambda m, x, y: trained().fit(x, y, **FIT).history["loss"],
    "validation": lambda m, x, y: (
        trained().fit(IMAGES, LABELS, validation_data=(x, y), **FIT).history["val_loss"]
    ),
    "evaluate": lambda m, x, y: trained().evaluate(x, y, verbose=0, return_dict=True)["loss"],
}
CLIENT = {
    "classify": lambda m, x, _: client().classify(x).logits,
    "client logits": lambda m, x, _: client().logits(x),
}
ENTRIES = {**LABELLED, **UNLABELLED, **TRAINED, **CLIENT}
DEAR = {"audit", "autoattack"}  # fed by their own tests alone

# Others' attacks are only met by bad input here; their own tests feed them.
OTHERS = []
if BACKEND == "tensorflow":
    OTHERS = [
        name
        for name, home in attacks.TENSORFLOW_ATTACKS.items()
        if home == "cleverhans" or importlib.util.find_spec("foolbox")
    ]


def others(name):
    kind = getattr(attacks, name)
    norm = {"norm": "linf"} if name == "CleverHansSPSA" else {}
    return attacking(kind(**norm))


def entry(name):
    return ENTRIES[name] if name in ENTRIES else others(name)


IMAGES_NAME = {"detector": "clean_images", "fit": "x", "evaluate": "x"}
IMAGES_NAME["validation"] = r"validation_data\[0\]"
LABELS_NAME = {"fit": "y", "evaluate": "y", "validation": r"validation_data\[1\]"}

# ---- Images -------------------------------------------------------------------------------


def with_pixel(value, count=COUNT):
    images = np.resize(IMAGES, (count, *SHAPE)).copy()
    images[-1, 0, 0, 0] = value  # the last of many
    return images


BAD_IMAGES = {
    "0-255": (lambda: 255 * IMAGES, r"lie in \[0, 1\], got values from 0 to 2"),
    "[-1, 1]": (lambda: 2 * IMAGES - 1, r"lie in \[0, 1\], got values from -1"),
    "nan": (lambda: with_pixel(np.nan), "got NaN"),
    "inf": (lambda: with_pixel(np.inf), "to inf"),
    "one of 300": (lambda: with_pixel(1.01, 300), r"lie in \[0, 1\]"),
    "negative zero's neighbour": (lambda: with_pixel(-1e-7), r"lie in \[0, 1\]"),
    "int64": (lambda: PIXELS.astype("int64"), "floats in .* or uint8.* got int64"),
    "int8": (lambda: (PIXELS // 2).astype("int8"), "got int8"),
    "list of ints": (lambda: PIXELS.tolist(), "got int64"),
    "bool": (lambda: PIXELS > 99, "got bool"),
    "complex": (lambda: IMAGES + 0j, "got complex"),
    "text": (lambda: "digits", "of numbers, got a str"),
    "None": (lambda: None, "of numbers, got a NoneType"),
    "objects": (lambda: np.full((COUNT, *SHAPE), None), "an array of numbers"),
    "ragged": (lambda: [[[[0.1]]], [[[0.1], [0.2]]]], "an array, or what NumPy"),
    "scalar": (lambda: np.float32(0.5), "shape"),
    "flat": (lambda: IMAGES.reshape(COUNT, -1), r"shape \(count, height, width, channels\)"),
    "single": (lambda: IMAGES[0], "A single image is"),
    "rank 5": (lambda: IMAGES[None], "shape"),
    "empty": (lambda: IMAGES[:0], "at least one image"),
    "no pixels": (lambda: IMAGES[:, :0], "shape"),
}
BAD_SHAPES = {
    "larger": lambda: np.zeros((COUNT, 5, 5, 1), "float32"),
    "colours": lambda: np.zeros((COUNT, 4, 4, 3), "uint8"),
    "channels first": lambda: IMAGES.transpose(0, 3, 1, 2),
}


@pytest.mark.parametrize("what", BAD_IMAGES)
@pytest.mark.parametrize("name", [*ENTRIES, *OTHERS])
def test_bad_images_are_refused(name, what):
    make, message = BAD_IMAGES[what]
    argument = IMAGES_NAME.get(name, "images")
    with pytest.raises(ValueError, match=rf"(?s){argument} must .*{message}"):
        entry(name)(shared(), make(), LABELS)


@pytest.mark.parametrize("what", BAD_SHAPES)
@pytest.mark.parametrize("name", [*LABELLED, *UNLABELLED, *TRAINED, *OTHERS])
def test_images_of_another_shape_are_refused(name, what):
    argument = IMAGES_NAME.get(name, "images")
    with pytest.raises(ValueError, match=rf"{argument} must be images of the classifier's shape"):
        entry(name)(shared(), BAD_SHAPES[what](), LABELS)


def memory_mapped():
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        array = np.memmap(file, "float32", "w+", shape=IMAGES.shape)
        array[:] = IMAGES
        return array


def jax_array():
    import jax

    return jax.numpy.asarray(IMAGES)


GOOD = {  # the same images and labels
    "uint8": (lambda: PIXELS, lambda: LABELS.astype("int32")),
    "float64": (lambda: PIXELS / 255, lambda: LABELS.astype("uint8")),
    "lists": (lambda: IMAGES.tolist(), lambda: LABELS.tolist()),
    "tensors": (lambda: ops.convert_to_tensor(IMAGES), lambda: ops.convert_to_tensor(LABELS)),
    "jax": (jax_array, lambda: LABELS.astype("float32")),
    "columns": (lambda: np.asfortranarray(IMAGES), lambda: LABELS[:, None]),
    "memory-mapped": (memory_mapped, lambda: LABELS[::1]),
}


@functools.cache
def answer(name):
    return numbers(ENTRIES[name](shared(), IMAGES, LABELS))


def numbers(result):
    """All numbers of a result, in one order."""
    if hasattr(result, "__dataclass_fields__"):
        result = [getattr(result, field) for field in result.__dataclass_fields__]
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [number for part in result for number in numbers(part)]
    if isinstance(result, str) or result is None:
        return []
    array = np.asarray(result)
    return array.ravel().tolist() if array.dtype.kind in "biuf" else []


@pytest.mark.parametrize(
    ("name", "what"),
    [(name, what) for name in ENTRIES if name not in DEAR for what in GOOD],
)
def test_whatever_holds_the_images_the_answer_is_the_same(name, what):
    if (name, what) == ("client logits", "uint8"):
        pytest.skip("its signature takes floats alone, and says so")
    images, labels = (make() for make in GOOD[what])
    found = numbers(ENTRIES[name](shared(), images, labels))
    np.testing.assert_allclose(found, answer(name), rtol=1e-4, atol=1e-6)


# ---- Labels -------------------------------------------------------------------------------

BAD_LABELS = {
    "too large": (
        lambda: LABELS + 1,
        r"lie in 0\.\.3 \(the classifier has 4 .*got 1 to 4",
    ),
    "ten": (lambda: np.where(LABELS == 1, 10, LABELS), "got 0 to 10"),
    "negative": (lambda: LABELS - 1, "got -1 to 2"),
    "fractions": (lambda: LABELS + 0.9, "whole numbers"),
    "nan": (lambda: np.where(LABELS == 1, np.nan, LABELS), "whole numbers"),
    "bool": (lambda: LABELS > 1, "whole numbers"),
    "text": (lambda: ["cat"] * COUNT, "an array of numbers"),
    "None": (lambda: None, "array|got None"),
    "one-hot": (lambda: np.eye(CLASSES)[LABELS], r"Of one-hot rows, pass .*argmax\(axis=1\)"),
    "too few": (lambda: LABELS[1:], "as many"),
    "empty": (lambda: LABELS[:0], "as many"),
    "scalar": (lambda: np.int64(1), "as many"),
}


@pytest.mark.parametrize("what", BAD_LABELS)
@pytest.mark.parametrize("name", [*LABELLED, *TRAINED, *OTHERS])
def test_bad_labels_are_refused(name, what):
    make, message = BAD_LABELS[what]
    argument = LABELS_NAME.get(name, "labels")
    with pytest.raises(ValueError, match=rf"(?s){argument} must .*{message}"):
        entry(name)(shared(), IMAGES, make())


# ---- Classifiers --------------------------------------------------------------------------


def integers(dtype):
    images = keras.Input(SHAPE, dtype=dtype)
    return keras.Model(images, network()(layers.Rescaling(1 / 255)(images)))


def softmax_operation():
    images = keras.Input(SHAPE)
    return keras.Model(images, ops.softmax(network()(images)))


BAD_CLASSIFIERS = {
    "none": (lambda: None, "built keras.Model"),
    "a function": (lambda: lambda x: x, "built keras.Model"),
    "unbuilt": (lambda: keras.Sequential([layers.Dense(4)]), "built keras.Model"),
    "dense softmax": (
        lambda: network(after=[layers.Dense(4, activation="softmax")]),
        r"is a softmax.*tvkeras\.logits",
    ),
    "softmax layer": (lambda: network(after=[layers.Softmax()]), "is a softmax"),
    "activation": (lambda: network(after=[layers.Activation("softmax")]), "is a softmax"),
    "operation": (softmax_operation, "is a softmax"),
    "nested": (
        lambda: keras.Sequential([keras.Input(SHAPE), network(after=[layers.Softmax()])]),
        "is a softmax",
    ),
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
    **{name: ENTRIES[name] for name in ("pgd", "fab", "autoattack", "fmn", "cw", "estimated")},
    **{name: ENTRIES[name] for name in ("smoothed", "detector", "scores", "measure", "suite")},
}


def wrapping(model, images, labels):
    tvkeras.RobustClassifier(model, tvkeras.Undefended())


def exporting(model, images, labels):
    tvkeras.export.export(model, "never_written")


WRAPPING = {"wrapping": wrapping, "attacked": lambda m, x, y: CompiledClassifier(m)}
WRAPPING |= {"exporting": exporting} if BACKEND == "tensorflow" else {}
WRAPPING |= {"audit": LABELLED["audit"]}


@pytest.mark.parametrize("what", BAD_CLASSIFIERS)
@pytest.mark.parametrize("name", [*MODEL_ENTRIES, *WRAPPING])
def test_bad_classifiers_are_refused(name, what):
    make, message = BAD_CLASSIFIERS[what]
    with pytest.raises(ValueError, match=rf"(?s)classifier must .*{message}"):
        {**MODEL_ENTRIES, **WRAPPING}[name](make(), IMAGES, LABELS)


@pytest.mark.parametrize("what", ONLY_CALLED)
@pytest.mark.parametrize("name", ["pgd", "fmn", "estimated", "smoothed", "scores", "measure"])
def test_a_classifier_of_other_than_logits_is_found_out(name, what):
    make, message = ONLY_CALLED[what]
    labels = np.zeros(COUNT, int)
    with pytest.raises(ValueError, match=rf"classifier must .*{message}"):
        ENTRIES[name](make(), IMAGES, labels)


# ---- Data sets, whose batches are seen in the compiled step --------------------------------

BAD_BATCHES = {
    "0-255": (lambda x, y: (255 * x, y), r"images must be finite and lie in \[0, 1\], got 2 that"),
    "nan": (lambda x, y: (np.where(x == x.max(), np.nan, x), y), "images must be finite"),
    "negative": (lambda x, y: (-x, y), "images must be finite"),
    "too large": (lambda x, y: (x, y + 9), "labels must be whole numbers.* got"),
    "minus one": (lambda x, y: (x, 0 * y - 1), "labels must be whole numbers"),
    "fractions": (lambda x, y: (x, y + 0.5), "labels must be whole numbers"),
}


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def streamed(batches):
    tf = pytest.importorskip("tensorflow")
    arrays = [np.stack(part) for part in zip(*batches, strict=True)]
    return tf.data.Dataset.from_tensor_slices(tuple(arrays))


KINDS = {"indexed": Batches, "generator": lambda batches: (pair for pair in batches)}
KINDS |= {"tf.data": streamed} if BACKEND == "tensorflow" else {}
FLOATS = LABELS.astype("float32")


@pytest.mark.parametrize("what", BAD_BATCHES)
@pytest.mark.parametrize("where", ["fit", "validation", "evaluate"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_batch_among_good_ones_is_found(kind, where, what):
    change, message = BAD_BATCHES[what]
    batches = [(IMAGES[i : i + 2], FLOATS[i : i + 2]) for i in (0, 2, 4, 0, 2)]
    batches[3] = tuple(part.astype("float32") for part in change(*batches[3]))
    stream = KINDS[kind](batches)
    validation = {**FIT, "validation_data": stream, "validation_steps": 5}
    call = {
        "fit": lambda: trained().fit(stream, shuffle=False, steps_per_epoch=5, verbose=0),
        "validation": lambda: trained().fit(IMAGES, FLOATS, **validation),
        "evaluate": lambda: trained().evaluate(stream, steps=5, verbose=0),
    }[where]
    weights = trained().get_weights()
    with pytest.raises(ValueError, match=message):
        call()
    trained().set_weights(weights)  # a gradient that is no number makes them such


@pytest.mark.parametrize("kind", KINDS)
def test_good_batches_pass_and_nothing_more_is_logged(kind):
    batches = [(IMAGES[i : i + 2], LABELS[i : i + 2]) for i in (0, 2, 4)]
    history = trained().fit(KINDS[kind](batches), shuffle=False, steps_per_epoch=3, verbose=0)
    assert set(history.history) == {"loss", "total_variation", "lipschitz"}
    np.testing.assert_allclose(history.history["loss"], answer("fit"), rtol=1e-5)


def test_labels_are_what_the_loss_wants():
    robust = tvkeras.RobustClassifier(network(), tvkeras.Undefended())
    robust.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match=r"y must have the shape \(6, 4\), a row for each image"):
        robust.fit(IMAGES, LABELS, verbose=0)
    with pytest.raises(ValueError, match="y must be finite and not negative"):
        robust.fit(IMAGES, np.eye(CLASSES)[LABELS] - 0.5, verbose=0)
    with pytest.raises(ValueError, match="y must hold the labels"):
        robust.fit(IMAGES, verbose=0)
    robust.fit(IMAGES, np.eye(CLASSES)[LABELS], verbose=0)


def test_integer_batches_are_refused():
    batches = [(PIXELS[:2].astype("int32"), LABELS[:2])]
    with pytest.raises(ValueError, match=r"images must be floats in \[0, 1\], or uint8"):
        trained().fit(Batches(batches), verbose=0)


# ---- A penalty that is not there -----------------------------------------------------------


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_a_penalty_without_a_gradient_stops_training(steps_per_execution):
    class Blind(layers.Layer):
        def call(self, images):
            return ops.stop_gradient(images)

    robust = tvkeras.RobustClassifier(network([Blind()]), tvkeras.TVLipschitz(fd_step=0.1))
    robust.compile(steps_per_execution=steps_per_execution)
    with pytest.raises(ValueError, match="total_variation must be above 0, got 0 in the first"):
        robust.fit(IMAGES, LABELS, batch_size=1, epochs=3, verbose=0)
    assert int(robust.optimizer.iterations) <= 3 * steps_per_execution


# ---- Bounds -------------------------------------------------------------------------------

RESCALED = {  # the same classifier for images in other bounds
    (0, 255): lambda: network([layers.Rescaling(1 / 255)]),
    (-1, 1): lambda: network([layers.Rescaling(0.5, 0.5)]),
}


@functools.cache
def rescaled(pair):
    return CompiledClassifier(RESCALED[pair](), bounds=pair)


@pytest.mark.parametrize("kind", ["floats", "uint8"])
@pytest.mark.parametrize("pair", RESCALED)
@pytest.mark.parametrize(
    "name",
    ["pgd", "fmn", "cw", "suite", "estimated", "smoothed", "scores", "detector"],
)
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


@pytest.mark.parametrize("name", ["pgd", "fmn", "estimated", "scores", "suite"])
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


# ---- The way out of a softmax -------------------------------------------------------------


def functional_softmax():
    images = keras.Input(SHAPE)
    x = layers.Dense(5)(layers.Flatten()(images))
    return keras.Model(images, layers.Dense(4, activation="softmax", dtype="float32")(x))


SOFTMAX = {
    "dense": lambda: network(after=[layers.Dense(4, activation="softmax")]),
    "layer": lambda: network(after=[layers.Softmax()]),
    "activation": lambda: network(after=[layers.Activation("softmax")]),
    "functional": functional_softmax,
    "operation": softmax_operation,
    "nested": lambda: keras.Sequential([keras.Input(SHAPE), network(after=[layers.Softmax()])]),
}


@pytest.mark.parametrize("what", SOFTMAX)
def test_logits_strips_the_softmax(what):
    classifier = SOFTMAX[what]()
    stripped = tvkeras.logits(classifier)
    contract.check(stripped)
    probabilities = ops.softmax(stripped.predict(IMAGES, verbose=0))
    np.testing.assert_allclose(probabilities, classifier.predict(IMAGES, verbose=0), rtol=1e-5)
    assert stripped.count_params() == classifier.count_params()


@pytest.mark.parametrize(
    "make", [network, lambda: network(after=[layers.Dense(4, activation="sigmoid")]), lambda: None]
)
def test_logits_of_no_softmax_are_refused(make):
    with pytest.raises(ValueError, match=r"classifier must be a .* that ends in one softmax"):
        tvkeras.logits(make())
