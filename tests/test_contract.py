"""What every public function does with images and labels that are none.

Every kind of trouble meets every entry point: refused, in words that name the argument, or
answered rightly.
"""

import functools
import tempfile

import keras
import numpy as np
import pytest
from keras import layers, ops

import tvkeras
from tests.conftest import BACKEND
from tests.entries import (
    CLASSES,
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
    TRAINED,
    network,
    numbers,
    shared,
    trained,
)
from tvkeras import inputs
from tvkeras.serving import Client


def with_pixel(value, count=COUNT):
    images = np.resize(IMAGES, (count, *SHAPE)).copy()
    images[-1, 0, 0, 0] = value  # the last of many
    return images


BAD_IMAGES = {
    "0-255": (255 * IMAGES, r"lie in \[0, 1\], got values from 0 to 2"),
    "[-1, 1]": (2 * IMAGES - 1, r"lie in \[0, 1\], got values from -1"),
    "nan": (with_pixel(np.nan), "got NaN"),
    "inf": (with_pixel(np.inf), "to inf"),
    "one of 300": (with_pixel(1.01, 300), r"lie in \[0, 1\]"),
    "negative zero's neighbour": (with_pixel(-1e-7), r"lie in \[0, 1\]"),
    "int64": (PIXELS.astype("int64"), "floats in .* or uint8.* got int64"),
    "int8": ((PIXELS // 2).astype("int8"), "got int8"),
    "list of ints": (PIXELS.tolist(), "got int64"),
    "bool": (PIXELS > 99, "got bool"),
    "complex": (IMAGES + 0j, "got complex"),
    "text": ("digits", "of numbers, got a str"),
    "None": (None, "of numbers, got a NoneType"),
    "objects": (np.full((COUNT, *SHAPE), None), "an array of numbers"),
    "ragged": ([[[[0.1]]], [[[0.1], [0.2]]]], "an array, or what NumPy"),
    "scalar": (np.float32(0.5), "shape"),
    "flat": (IMAGES.reshape(COUNT, -1), r"shape \(count, height, width, channels\)"),
    "single": (IMAGES[0], "A single image is"),
    "rank 5": (IMAGES[None], "shape"),
    "empty": (IMAGES[:0], "at least one image"),
    "no pixels": (IMAGES[:, :0], "shape"),
    "larger": (np.zeros((COUNT, 5, 5, 1), "float32"), "images of the classifier's shape"),
    "colours": (np.zeros((COUNT, 4, 4, 3), "uint8"), "images of the classifier's shape"),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), "images of the classifier's shape"),
}
BAD_LABELS = {
    "too large": (LABELS + 1, r"lie in 0\.\.3 \(the classifier has 4 .*got 1 to 4"),
    "ten": (np.where(LABELS == 1, 10, LABELS), "got 0 to 10"),
    "negative": (LABELS - 1, "got -1 to 2"),
    "fractions": (LABELS + 0.9, "whole numbers"),
    "nan": (np.where(LABELS == 1, np.nan, LABELS), "whole numbers"),
    "bool": (LABELS > 1, "whole numbers"),
    "text": (["cat"] * COUNT, "an array of numbers"),
    "None": (None, "array|got None"),
    "one-hot": (np.eye(CLASSES)[LABELS], r"Of one-hot rows, pass .*argmax\(axis=1\)"),
    "too few": (LABELS[1:], "as many"),
    "empty": (LABELS[:0], "as many"),
    "scalar": (np.int64(1), "as many"),
}
IMAGES_NAME = {"detector": "clean_images", "fit": "x", "evaluate": "x"}
IMAGES_NAME["validation"] = r"validation_data\[0\]"
LABELS_NAME = {"fit": "y", "evaluate": "y", "validation": r"validation_data\[1\]"}


def refuses(call, name, what):
    """Checks that an entry point refuses a kind of images or labels."""
    if what in BAD_IMAGES:
        images, message = BAD_IMAGES[what]
        labels, argument = LABELS, IMAGES_NAME.get(name, "images")
    else:
        labels, message = BAD_LABELS[what.removesuffix(" labels")]
        images, argument = IMAGES, LABELS_NAME.get(name, "labels")
    with pytest.raises(ValueError, match=rf"(?s){argument} must .*{message}"):
        call(shared(), images, labels)


GATE = {"gate": lambda m, x, y: m.labels(y, m.images(x))}


@pytest.mark.parametrize("name", [*GATE, *ENTRIES, *OTHERS])
def test_every_entry_point_refuses_bad_images_and_labels(name):
    call = {**GATE, **ENTRIES, **OTHERS}[name]
    labelled = name in {**GATE, **LABELLED, **TRAINED, **OTHERS}
    for what in [*BAD_IMAGES, *(f"{what} labels" for what in BAD_LABELS if labelled)]:
        refuses(call, name, what)


@pytest.mark.parametrize("ask", [Client.classify, Client.logits])
def test_a_client_refuses_bad_images_before_it_sends_them(ask):
    client = Client("http://127.0.0.1:9", "model")
    for what, (images, message) in BAD_IMAGES.items():
        if what not in ("larger", "colours", "channels first"):  # the server's classifier knows
            with pytest.raises(ValueError, match=rf"(?s)images must .*{message}"):
                ask(client, images)
    with pytest.raises(ValueError, match="Divide them by 255"):
        client.logits(PIXELS)  # the signature takes floats alone


def memory_mapped():
    with tempfile.NamedTemporaryFile() as file:
        array = np.memmap(file, "float32", "w+", shape=IMAGES.shape)
        array[:] = IMAGES
        return array


GOOD = {  # the same images and labels
    "uint8": (lambda: PIXELS, lambda: LABELS.astype("int32")),
    "float64": (lambda: PIXELS / 255, lambda: LABELS.astype("uint8")),
    "lists": (lambda: IMAGES.tolist(), lambda: LABELS.tolist()),
    "tensors": (lambda: ops.convert_to_tensor(IMAGES), lambda: ops.convert_to_tensor(LABELS)),
    "jax": (lambda: pytest.importorskip("jax").numpy.asarray(IMAGES), lambda: LABELS.astype("f4")),
    "columns": (lambda: np.asfortranarray(IMAGES), lambda: LABELS[:, None]),
    "memory-mapped": (memory_mapped, lambda: LABELS[::1]),
}


@functools.cache
def answer(name):
    return numbers(ENTRIES[name](shared(), IMAGES, LABELS))


@pytest.mark.parametrize("what", GOOD)
def test_images_and_labels_come_in_every_form(what):
    images, labels = (make() for make in GOOD[what])
    for gate in (shared(), shared().unit):
        found = gate.images(images)
        np.testing.assert_allclose(inputs.as_float(found), IMAGES, atol=1e-7)
        np.testing.assert_array_equal(gate.labels(labels, found), LABELS)
    fitted = numbers(ENTRIES["fit"](None, images, labels))
    np.testing.assert_allclose(fitted, answer("fit"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", COMPUTED)
def test_every_entry_point_answers_the_same_in_every_form(name):
    for what in ("uint8", "lists", "columns"):
        images, labels = (make() for make in GOOD[what])
        found = numbers(ENTRIES[name](shared(), images, labels))
        np.testing.assert_allclose(found, answer(name), rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize(
    ("kind", "where", "what"),
    [
        *(("indexed", "fit", what) for what in BAD_BATCHES),
        *((kind, "fit", "nan") for kind in KINDS if kind != "indexed"),
        *((kind, "validation", "0-255") for kind in KINDS),
        *((kind, "evaluate", "too large") for kind in KINDS),
    ],
)
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
    for arguments, message in (
        ((IMAGES, LABELS), r"y must have the shape \(6, 4\), a row for each image"),
        ((IMAGES, np.eye(CLASSES)[LABELS] - 0.5), "y must be finite and not negative"),
        ((IMAGES,), "y must hold the labels"),
    ):
        with pytest.raises(ValueError, match=message):
            robust.fit(*arguments, verbose=0)
    robust.fit(IMAGES, np.eye(CLASSES)[LABELS], verbose=0)


def test_integer_batches_are_refused():
    batches = [(PIXELS[:2].astype("int32"), LABELS[:2])]
    with pytest.raises(ValueError, match=r"images must be floats in \[0, 1\], or uint8"):
        trained().fit(Batches(batches), verbose=0)


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
