import importlib.util
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import keras
import numpy as np
import pytest

from tests.conftest import ROOT
from tvkeras import data, zoo


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def url():
    server = example("guarded_server").server("digits_tv_lip", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def post(url, image):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, json.dumps(image).encode()) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_guarded_server_classifies_and_refuses_what_its_detector_suspects(url):
    images = data.load("digits", "test").images.astype("float32") / 255
    scores = zoo.detector("digits_tv_lip").scores(zoo.load("digits_tv_lip"), images)
    safe, suspect = images[scores.argmin()], images[scores.argmax()]
    expected = int(zoo.load("digits_tv_lip").predict(safe[None], verbose=0).argmax())
    assert post(url, safe.tolist()) == (200, {"class_id": expected})
    assert post(url, suspect.tolist())[0] == 403
    status, content = post(url, (safe * 255).tolist())
    assert status == 400
    assert "[0, 1]" in content["error"]


@pytest.mark.slow
def test_fine_tuning_runs_and_saves_a_plain_model(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "fine_tune.py",
            "--epochs=1",
            "--images=128",
            f"--output={tmp_path / 'model.keras'}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "TV + Lipschitz: error by l2 radius" in done.stdout
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert model(np.zeros((1, 32, 32, 3), "float32")).shape == (1, 10)
