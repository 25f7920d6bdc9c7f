"""The exported SavedModel, asked by loaders that know neither Keras nor tvkeras."""

import json
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import softmax

import tvkeras
from tests.conftest import BACKEND
from tests.test_evaluate import evaluated, run_dir  # noqa: F401  (fixtures)
from tvkeras import data, runs
from tvkeras.detection import GradientNormDetector
from tvkeras.export import export, run_detector
from tvkeras.inference import STATISTICS

tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="SavedModels are TensorFlow's")
COUNTS = (1, 3, 17)

# What a process finds that has TensorFlow alone. `call` runs a signature as the C++ server does,
# without Python's own check of shapes.
PROGRAM = """
import json, sys
sys.modules["keras"] = sys.modules["tvkeras"] = None  # any import of them fails
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

path, inputs, outputs = sys.argv[1:]
with np.load(inputs) as archive:
    batches = dict(archive)
session = tf.compat.v1.Session(graph=tf.Graph())
with session.graph.as_default():
    meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], path)
loaded = tf.saved_model.load(path)
results, errors = {}, {}
for key, images in batches.items():
    name = key.split(":")[0]
    signature = meta.signature_def[name]
    options = config_pb2.CallableOptions()
    options.feed.append(signature.inputs["images"].name)
    options.fetch.extend(output.name for output in signature.outputs.values())
    call = session._make_callable_from_options(options)
    try:
        for output, value in zip(signature.outputs, call(images)):
            results[f"{key}:session:{output}"] = value
        for output, value in loaded.signatures[name](images=tf.constant(images)).items():
            results[f"{key}:load:{output}"] = value.numpy()
    except tf.errors.OpError as error:
        errors[key] = [type(error).__name__, error.message]
np.savez(outputs, **results)
print(json.dumps(errors))
"""


def served(path, folder, batches):
    """Outputs, and errors, of `{"SIGNATURE:KEY": images}` in a process of its own."""
    np.savez(folder / "inputs.npz", **batches)
    command = [sys.executable, "-c", PROGRAM, path, folder / "inputs.npz", folder / "outputs.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with np.load(folder / "outputs.npz") as archive:
        return dict(archive), json.loads(done.stdout.splitlines()[-1])


def pooled(seed=0):
    """A classifier of 8x8 images that would take those of any size."""
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
    return np.random.default_rng(seed).random((count, 8, 8, 1)).astype("float32")


@tensorflow_only
@pytest.mark.slow
@pytest.mark.parametrize("statistic", STATISTICS)
def test_without_keras_the_numbers_are_those_of_the_classifier_and_the_detector(
    statistic, tmp_path
):
    classifier = pooled()
    detector = GradientNormDetector.fit(
        classifier, random_images(200), 0.5, norm="linf", statistic=statistic
    )
    path = export(classifier, tmp_path / "model", detector=detector)
    images = {count: random_images(count, count) for count in COUNTS}
    pixels = {count: np.round(255 * images[count]).astype("uint8") for count in COUNTS}
    floats = {f"{name}:{n}": images[n] for name in ("serving_default", "predict") for n in COUNTS}
    eight_bit = {f"serving_uint8:{n}": pixels[n] for n in COUNTS}
    found, errors = served(path, tmp_path, {**floats, **eight_bit})
    assert not errors
    suspected = []
    for key, given in {**floats, **eight_bit}.items():
        given = given if given.dtype == np.float32 else (given / 255).astype("float32")
        logits = classifier.predict(given, verbose=0)
        scores = detector.scores(classifier, given)
        clear = np.abs(scores / detector.threshold - 1) > 1e-4
        for loader in ("session", "load"):
            outputs = {
                name.split(":")[-1]: found.pop(name)
                for name in list(found)
                if name.startswith(f"{key}:{loader}:")
            }
            np.testing.assert_allclose(outputs.pop("logits"), logits, atol=1e-5)
            if key.startswith("predict"):
                assert not outputs
                continue
            np.testing.assert_allclose(outputs["probabilities"], softmax(logits, 1), atol=1e-5)
            np.testing.assert_array_equal(outputs["class_id"], logits.argmax(axis=1))
            np.testing.assert_allclose(outputs["score"], scores, rtol=1e-4, atol=1e-6)
            verdict = detector.detects(classifier, given)
            np.testing.assert_array_equal(outputs["attack_suspected"][clear], verdict[clear])
            suspected += [*verdict[clear]]
    assert not found
    assert set(suspected) == {True, False}


@tensorflow_only
@pytest.mark.slow
def test_bad_input_is_refused_with_a_reason(tmp_path):
    path = export(pooled(), tmp_path / "model")
    good = random_images(3)
    bad = {
        "nan": (np.where(good == good.max(), np.nan, good), "hold no NaN"),
        "infinite": (np.where(good == good.max(), np.inf, good), r"must lie in [0, 1]"),
        "bytes": (good * 255, "Divide 8-bit pixels by 255"),
        "negative": (good - 0.5, "must lie in [0, 1]"),
        "larger": (np.ones((2, 16, 16, 1), "float32"), "[2,16,16,1]"),
        "colours": (np.ones((2, 8, 8, 3), "float32"), "[2,8,8,3]"),
        "single": (good[0], "expected shape [?,8,8,1]"),
        "empty": (good[:0], "images must hold at least one image"),
    }
    batches = {f"predict:{name}": images for name, (images, _) in bad.items()}
    batches |= {f"serving_default:{name}": images for name, (images, _) in bad.items()}
    pixels = {name: bad[name][0].astype("uint8") for name in ("larger", "single", "empty")}
    batches |= {f"serving_uint8:{name}": images for name, images in pixels.items()}
    found, errors = served(path, tmp_path, batches)
    assert not found
    assert errors.keys() == batches.keys()
    for key, (kind, message) in errors.items():
        assert kind == "InvalidArgumentError"
        assert bad[key.split(":")[1]][1] in message, message
        assert "images" in message


@tensorflow_only
def test_without_a_detector_there_is_no_verdict(tmp_path):
    import tensorflow as tf

    loaded = tf.saved_model.load(export(pooled(), tmp_path))
    for name in ("serving_default", "serving_uint8"):
        outputs = loaded.signatures[name].structured_outputs
        assert outputs.keys() == {"logits", "probabilities", "class_id"}


@tensorflow_only
def test_versions_count_up_and_are_never_replaced(tmp_path):
    classifier = pooled()
    (tmp_path / "model" / "1-old").mkdir(parents=True)
    assert export(classifier, tmp_path / "model").name == "1"
    assert export(classifier, tmp_path / "model", version=7).name == "7"
    assert export(classifier, tmp_path / "model").name == "8"
    with pytest.raises(ValueError, match="version 7 exists"):
        export(classifier, tmp_path / "model", version=7)
    with pytest.raises(ValueError, match="version must be a whole number >= 1"):
        export(classifier, tmp_path / "model", version=0)


@tensorflow_only
def test_an_export_that_fails_leaves_no_version(tmp_path, monkeypatch):
    def half(self, path, **_):
        path.mkdir()
        (path / "saved_model.pb").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(keras.export.ExportArchive()), "write_out", half)
    with pytest.raises(OSError, match="No space left"):
        export(pooled(), tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


@tensorflow_only
def test_only_a_classifier_of_images_is_exported(tmp_path):
    flat = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    unbuilt = keras.Sequential([layers.Dense(2)])
    with pytest.raises(ValueError, match="classifier must be a Keras model of one input"):
        export(flat, tmp_path)
    with pytest.raises(ValueError, match=r"classifier must be a built keras\.Model"):
        export(unbuilt, tmp_path)


@tensorflow_only
@pytest.mark.slow
def test_a_classifier_of_other_bounds_is_served_in_ours(tmp_path):
    tf = pytest.importorskip("tensorflow")
    images = keras.Input((8, 8, 1))
    classifier = keras.Model(images, pooled()(layers.Rescaling(1 / 255)(images)))
    robust = tvkeras.RobustClassifier(classifier, tvkeras.Undefended(), bounds=(0, 255))
    detector = GradientNormDetector(norm="linf", statistic="loss", threshold=1.0)
    signatures = tf.saved_model.load(export(robust, tmp_path, detector=detector)).signatures
    pixels = np.round(255 * random_images(3)).astype("uint8")
    logits = classifier.predict(pixels.astype("float32"), verbose=0)
    for name, given in (
        ("serving_uint8", pixels),
        ("serving_default", (pixels / 255).astype("float32")),
    ):
        found = signatures[name](images=tf.constant(given))
        np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
        np.testing.assert_allclose(found["score"], detector.scores(robust, pixels), rtol=1e-3)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="what the other backends say")
def test_other_backends_are_told_to_use_tensorflow(tmp_path):
    with pytest.raises(ValueError, match="KERAS_BACKEND=tensorflow"):
        export(pooled(), tmp_path)


# ---- Of a run --------------------------------------------------------------------------


def command(*arguments):
    """`python -m tvkeras.export`, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tvkeras.export", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


@tensorflow_only
@pytest.mark.slow
def test_a_run_is_exported_with_a_detector_of_its_held_out_images(run_dir, tmp_path):  # noqa: F811
    done = command(f"--model={run_dir}", f"--output={tmp_path / 'digits'}", "--version=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"exported: {tmp_path / 'digits' / '3'}\n")
    classifier, about = runs.load(run_dir)
    training = data.load("digits", "train")
    _, held_out = data.held_out(training, about["validation_fraction"])
    detector = GradientNormDetector.fit(classifier, held_out.images, 0.05)
    assert repr(detector.threshold)[:6] in done.stdout
    test = data.load("digits", "test").images[:100]
    found, _ = served(tmp_path / "digits" / "3", tmp_path, {"serving_uint8:": test})
    np.testing.assert_allclose(
        found["serving_uint8::session:score"], detector.scores(classifier, test), rtol=1e-4
    )
    again = command(f"--model={run_dir}", f"--output={tmp_path / 'digits'}", "--version=3")
    assert again.returncode == 1
    assert again.stderr.endswith("Versions are never replaced.\n")
    missing = command("--model=nowhere", "--output=x")
    assert "\nerror: model must be the folder of a finished run" in missing.stderr


@tensorflow_only
@pytest.mark.slow
def test_the_detector_is_the_one_whose_figures_the_card_states(run_dir, evaluated, tmp_path):  # noqa: F811
    classifier, about = runs.load(run_dir)
    shutil.copytree(run_dir, tmp_path / "run")
    fitted = run_detector(run_dir, classifier, about, false_positive_rate=0.05)
    assert run_detector(run_dir, classifier, about) == fitted  # the card's
    path = tmp_path / "run" / "evaluation" / "card.json"
    stated = json.loads(path.read_text())
    (report,) = stated["detection"]
    report["threshold"] = 0.125
    path.write_text(json.dumps(stated))
    assert run_detector(tmp_path / "run", classifier, about).threshold == 0.125
    other = run_detector(tmp_path / "run", classifier, about, statistic="model")
    assert other.statistic == "model"
    lower = run_detector(tmp_path / "run", classifier, about, false_positive_rate=0.5)
    assert lower.threshold < fitted.threshold != 0.125
    stated["model"]["weights_sha256"] = "0" * 64  # of another training
    path.write_text(json.dumps(stated))
    assert run_detector(tmp_path / "run", classifier, about) == fitted
    with pytest.raises(ValueError, match="statistic must be one of"):
        run_detector(run_dir, classifier, about, statistic="logits")
