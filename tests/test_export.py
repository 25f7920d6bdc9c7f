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
from tests.conftest import BACKEND, ROOT, full_disk, pooled, random_images
from tvkeras import data
from tvkeras.detection import GradientNormDetector
from tvkeras.inference import STATISTICS
from tvkeras.runs import Run

COUNTS = (1, 3, 17)
ENTRY = ROOT / "zoo" / "digits_tv_lip"

if BACKEND == "tensorflow":
    import tensorflow as tf

    from tvkeras.saved_model import export, run_detector

tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="SavedModels are TensorFlow's")

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
    batches = {f"{name}:{n}": images[n] for name in ("serving_default", "predict") for n in COUNTS}
    batches |= {f"serving_uint8:{n}": pixels[n] for n in COUNTS}
    found, errors = served(path, tmp_path, batches)
    assert not errors
    suspected = []
    for key, given in batches.items():
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
def test_versions_count_up_and_are_never_replaced_and_without_a_detector_give_no_verdict(tmp_path):
    classifier = pooled()
    (tmp_path / "model" / "1-old").mkdir(parents=True)
    path = export(classifier, tmp_path / "model")
    assert path.name == "1"
    signatures = tf.saved_model.load(path).signatures
    for name in ("serving_default", "serving_uint8"):
        outputs = signatures[name].structured_outputs
        assert outputs.keys() == {"logits", "probabilities", "class_id"}
    shutil.copytree(path, path.with_name("7"))
    assert export(classifier, tmp_path / "model").name == "8"
    for version, message in ((7, "version 7 exists"), (0, "version must be a whole number >= 1")):
        with pytest.raises(ValueError, match=message):
            export(classifier, tmp_path / "model", version=version)


@tensorflow_only
def test_an_export_that_fails_leaves_no_version(tmp_path):
    with full_disk(), pytest.raises((OSError, tf.errors.OpError)):
        export(pooled(), tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


@tensorflow_only
def test_only_a_classifier_of_images_is_exported(tmp_path):
    flat = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="classifier must be a Keras model of one input"):
        export(flat, tmp_path)


@tensorflow_only
@pytest.mark.slow
def test_a_classifier_of_other_bounds_is_served_in_ours(tmp_path):
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
    from tvkeras import saved_model

    with pytest.raises(ValueError, match="KERAS_BACKEND=tensorflow"):
        saved_model.export(pooled(), tmp_path)


# ---- Of a run: that of a published entry -----------------------------------------------


@tensorflow_only
def test_the_detector_is_the_one_whose_figures_the_card_states(tmp_path):
    run = Run.open(shutil.copytree(ENTRY, tmp_path / "run"))
    stated = json.loads((ENTRY / "card.json").read_text())
    (report,) = (r for r in stated["detection"] if r["statistic"] == "loss")
    fitted = run_detector(run, false_positive_rate=0.05)
    assert run_detector(run).threshold == report["threshold"] == pytest.approx(fitted.threshold)
    report["threshold"] = 9.0
    (run.folder / "card.json").write_text(json.dumps(stated))
    assert run_detector(run).threshold == 9.0
    assert run_detector(run, false_positive_rate=0.5).threshold < fitted.threshold
    assert run_detector(run, statistic="model").statistic == "model"
    stated["model"]["weights_sha256"] = "0" * 64  # of another training
    (run.folder / "card.json").write_text(json.dumps(stated))
    assert run_detector(run) == fitted
    with pytest.raises(ValueError, match="statistic must be one of"):
        run_detector(run, statistic="logits")


@tensorflow_only
@pytest.mark.slow
def test_the_command_exports_a_run_with_its_detector(tmp_path):
    command = [sys.executable, "-m", "tvkeras.export", f"--model={ENTRY}", "--version=3"]
    command += [f"--output={tmp_path / 'digits'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"exported: {tmp_path / 'digits' / '3'}\n")
    run = Run.open(ENTRY)
    test = data.load("digits", "test").images[:100]
    found, _ = served(tmp_path / "digits" / "3", tmp_path, {"serving_uint8:": test})
    scores = run_detector(run).scores(run.classifier(), test)
    np.testing.assert_allclose(found["serving_uint8::session:score"], scores, rtol=1e-4)
