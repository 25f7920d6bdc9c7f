import concurrent.futures
import contextlib
import http.client
import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading

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
def images():
    """The digits of the test set."""
    return data.load("digits", "test").images.astype("float32") / 255


@pytest.fixture(scope="module")
def address():
    """Of a guarded server of digits, in a thread."""
    guarded = example("guarded_server")
    guarded.SECONDS = 1
    server = guarded.server("digits_tv_lip", 0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield listening.getsockname()
        server.should_exit = True
        thread.join(30)


def ask(address, body, method="POST", path="/", connection=None):
    """Status and content of the answer to a request."""
    connection = connection or http.client.HTTPConnection(*address, timeout=30)
    connection.request(method, path, body)
    with connection.getresponse() as response:
        return response.status, json.load(response)


def said(address, *parts):
    """Status and content of the answer to bytes, or None if there is none."""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(b"".join(parts))
        if not connection.recv(1, socket.MSG_PEEK):
            return None
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, json.load(response)


def test_the_guarded_server_classifies_and_refuses_what_its_detector_suspects(address, images):
    scores = zoo.detector("digits_tv_lip").scores(zoo.load("digits_tv_lip"), images)
    safe, suspect = images[scores.argmin()], images[scores.argmax()]
    expected = int(zoo.load("digits_tv_lip").predict(safe[None], verbose=0).argmax())
    assert ask(address, json.dumps(safe.tolist())) == (200, {"class_id": expected})
    assert ask(address, json.dumps(suspect.tolist())) == (403, {"error": "an attack is suspected"})


DIGIT = np.zeros((8, 8, 1))
BAD_BODIES = {
    "deep": ("[" * 2500, "no JSON list"),
    "rank": (json.dumps([DIGIT.tolist()]), r"shape \(8, 8, 1\), got \(1, 8, 8, 1\)"),
    "ragged": ("[[[0], [0, 0]]]", "no JSON list"),
    "NaN": (json.dumps(np.full_like(DIGIT, np.nan).tolist()), r"in \[0, 1\]"),
    "0-255": (json.dumps((DIGIT + 255).tolist()), r"in \[0, 1\]"),
    "infinite": (json.dumps(DIGIT.tolist()).replace("0.0", "1e999"), r"in \[0, 1\]"),
    "long": (json.dumps(DIGIT.tolist()).replace("0.0", "9" * 30), "must be numbers"),
    "text": (json.dumps([[["0.5"]] * 8] * 8), "must be numbers"),
    "object": ("{}", "must be numbers"),
    "empty": ("", "no JSON"),
    "no length": (None, "no JSON"),
    "bytes": (bytes(range(256)), "no JSON"),
}


@pytest.mark.parametrize("kind", BAD_BODIES)
def test_the_guarded_server_says_why_it_refuses_a_body(address, kind):
    body, why = BAD_BODIES[kind]
    status, content = ask(address, body)
    assert status == 400
    assert re.search(why, content["error"])


def test_the_guarded_server_refuses_what_is_no_request_of_its_own(address):
    assert ask(address, b"1" * 10_000_000) == (413, {"error": "more than 3048 bytes"})
    assert ask(address, "[]", path="/../etc/passwd")[0] == 404
    assert ask(address, None, "GET") == (405, {"error": "Method Not Allowed"})
    post = b"POST / HTTP/1.1\r\nHost: a\r\n"
    no_http = 400, {"error": "Invalid HTTP request received."}
    assert said(address, post, b"Content-Length: -1\r\n\r\n") == no_http
    assert said(address, bytes(range(128, 256)), b"\r\n\r\n") == no_http
    assert said(address, post, b"Content-Length: 9\r\n\r\n[") == (
        408,
        {"error": "no whole body in 1 s"},
    )
    assert said(address, b"POST / HT") is None  # it is closed


def test_the_guarded_server_serves_many_beside_idle_and_malformed_ones(address, images):
    reference = zoo.load("digits_tv_lip").predict(images, verbose=0).argmax(axis=1)
    suspected = zoo.detector("digits_tv_lip").detects(zoo.load("digits_tv_lip"), images)
    expected = [
        (403, {"error": "an attack is suspected"}) if suspect else (200, {"class_id": int(class_)})
        for suspect, class_ in zip(suspected, reference, strict=True)
    ]
    bad = [body for body, _ in BAD_BODIES.values()]

    def client(number):
        connection = http.client.HTTPConnection(*address, timeout=30)
        for i in range(number, 320, 8):
            body = json.dumps(images[i].tolist())
            assert ask(address, body, connection=connection) == expected[i]
            if i % 10 == 0:
                assert ask(address, bad[i // 10 % len(bad)], connection=connection)[0] == 400
        connection.close()

    with contextlib.ExitStack() as idle:
        for head in (b"", b"POST / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"):
            silent = idle.enter_context(socket.create_connection(address))
            silent.sendall(head)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(client, range(8)))


@pytest.mark.slow
def test_fine_tuning_runs_and_saves_a_plain_model(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "fine_tune.py",
            "--epochs=1",
            "--images=64",
            f"--output={tmp_path / 'model.keras'}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "TV + Lipschitz" in done.stdout
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert model(np.zeros((1, 32, 32, 3), "float32")).shape == (1, 10)


@pytest.mark.slow
def test_a_network_of_keras_applications_gets_a_card(tmp_path):
    script = ROOT / "examples" / "benchmark_keras_application.py"
    settings = ["--epochs=1", "--images=4", f"--output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, script, *settings], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "error at l2 0.5" in done.stdout
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["model"]["bounds"] == [0, 255]
    assert (tmp_path / "README.md").exists()
    assert (tmp_path / "examples.csv").exists()
