"""The client against the loopback server of `tests/model_server.py`."""

import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures

import numpy as np
import pytest

from tests.conftest import BACKEND, ROOT, pooled, random_images
from tvkeras.detection import GradientNormDetector
from tvkeras.saved_model import export
from tvkeras.serving import Client

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="SavedModels are TensorFlow's")
pytest.importorskip("tensorflow_serving")

NAME = "airbench_tv_lip"  # what serving/models.config serves; here something smaller
LABELS = {"stable": 1, "canary": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two versions of `NAME` and one, without a detector, of "plain", by name and version."""
    folder = tmp_path_factory.mktemp("models")
    classifiers = {(NAME, 1): pooled(1), (NAME, 2): pooled(2), ("plain", 1): pooled(3)}
    found = {}
    for (name, version), classifier in classifiers.items():
        detector = None
        if name == NAME:
            detector = GradientNormDetector.fit(classifier, random_images(100), 0.5)
        export(classifier, folder / name, detector=detector, version=version)
        found[name, version] = classifier, detector
    return folder, found


@pytest.fixture(scope="module")
def loopback(models):
    """The loopback server and its addresses by scheme."""
    from tests.model_server import ModelServer

    server = ModelServer(models[0], LABELS)
    with server.serving() as addresses:
        yield server, addresses


@pytest.fixture(scope="module")
def addresses(loopback):
    """The server's addresses by scheme."""
    return loopback[1]


SCHEMES = pytest.mark.parametrize("scheme", ["http", "grpc"])


@SCHEMES
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_client_gets_the_classifiers_numbers(addresses, models, scheme, count):
    classifier, detector = models[1][NAME, 2]
    images = random_images(count, count)
    pixels = np.round(255 * images).astype("uint8")
    with Client(addresses[scheme], NAME) as client:
        for given, seen in ((images, images), (pixels, (pixels / 255).astype("float32"))):
            found = client.classify(given)
            logits = classifier.predict(seen, verbose=0)
            np.testing.assert_allclose(found.logits, logits, atol=1e-5)
            np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
            np.testing.assert_array_equal(found.class_id, logits.argmax(axis=1))
            scores = detector.scores(classifier, seen)
            np.testing.assert_allclose(found.score, scores, atol=1e-5)
            clear = np.abs(scores / detector.threshold - 1) > 1e-4
            verdict = detector.detects(classifier, seen)
            np.testing.assert_array_equal(found.attack_suspected[clear], verdict[clear])
        assert [a.dtype for a in vars(found).values()] == ["f4", "f4", "i8", "f4", "?"]
        logits = classifier.predict(images, verbose=0)
        np.testing.assert_allclose(client.logits(images.astype("float64")), logits, atol=1e-5)


@SCHEMES
def test_versions_and_labels_are_chosen_and_a_detector_is_not_made_up(addresses, models, scheme):
    images, stable = random_images(2), {"label": "stable"}
    for name, choice, version in ((NAME, {"version": 1}, 1), (NAME, stable, 1), ("plain", {}, 1)):
        with Client(addresses[scheme], name, **choice) as client:
            found = client.classify(images)
        expected = models[1][name, version][0].predict(images, verbose=0)
        np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    assert found.score is None
    assert found.attack_suspected is None


@SCHEMES
@pytest.mark.parametrize("pixels", [True, False])
def test_what_the_server_refuses_is_a_value_error_in_its_words(addresses, scheme, pixels):
    large = np.ones((2, 16, 16, 1), "uint8" if pixels else "float32")
    with (
        Client(addresses[scheme], NAME) as client,
        pytest.raises(ValueError, match=r"\[2,16,16,1\] is not compatible with .*\[\?,8,8,1"),
    ):
        client.classify(large)


@pytest.mark.parametrize("address", ["localhost:8501", "http://:8501", "ftp://host", "grpc:8500"])
def test_an_address_says_how(address):
    with pytest.raises(ValueError, match="address must look like"):
        Client(address, NAME)
    with pytest.raises(ValueError, match="not both"):
        Client("http://host:8501", NAME, version=1, label="stable")


# ---- Faults ------------------------------------------------------------------------------


@SCHEMES
def test_an_unavailable_server_is_asked_again_and_a_refusal_is_not(loopback, scheme):
    server, addresses = loopback
    with Client(addresses[scheme], NAME) as client:
        server.requests, server.unavailable = 0, 2
        assert client.logits(random_images(1)).shape == (1, 5)
        assert server.requests == 3
        server.requests, server.unavailable = 0, 10
        with pytest.raises(ConnectionError, match=r"is unavailable.*the queue is full"):
            client.logits(random_images(1))
        assert server.requests == 5
        server.requests, server.unavailable = 0, 0
        with (
            Client(addresses[scheme], NAME, version=9) as refused,
            pytest.raises(ValueError, match="Servable not found"),
        ):
            refused.logits(random_images(1))
        assert server.requests == 1


@SCHEMES
def test_a_call_ends_at_its_time_out(loopback, scheme):
    server, addresses = loopback
    server.delay = 2.0
    try:
        start = time.monotonic()
        with (
            Client(addresses[scheme], NAME, timeout=0.3) as client,
            pytest.raises(TimeoutError, match=r"did not answer within timeout=0\.3 seconds"),
        ):
            client.logits(random_images(1))
        assert time.monotonic() - start < 1.5
    finally:
        server.delay = 0.0


@SCHEMES
def test_a_server_that_starts_late_is_found(loopback, scheme):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Client(f"{scheme}://127.0.0.1:{port}", NAME, timeout=60) as client:
        with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} is unavailable"):
            client.logits(random_images(1))
        with futures.ThreadPoolExecutor() as pool:
            asked = pool.submit(client.logits, random_images(1))
            time.sleep(0.3)
            with loopback[0].serving(**{f"{scheme}_port": port}):
                assert asked.result().shape == (1, 5)


@pytest.mark.parametrize("status", [200, 502])
def test_a_page_in_place_of_a_reply_is_shown(status):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>Welcome</html>")

        def log_message(self, *_):
            """Nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.handle_request, daemon=True).start()
    client = Client(f"http://127.0.0.1:{server.server_port}", NAME)
    with pytest.raises(RuntimeError, match="<html>Welcome"):
        client.logits(random_images(1))
    server.server_close()


# ---- What is beside the server -----------------------------------------------------------


def test_rest_needs_neither_keras_nor_tensorflow_and_grpc_says_what_it_needs(addresses):
    code = f"""
import sys
for name in ("keras", "tensorflow", "grpc"):
    sys.modules[name] = None  # any import of it fails
import numpy as np
from tvkeras.serving import Client
print(Client({addresses["http"]!r}, {NAME!r}).classify(np.ones((1, 8, 8, 1))).class_id.shape)
try:
    Client("grpc://host:8500", {NAME!r})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(1,)\n")
    assert "pip install 'tvkeras[serving]'" in done.stdout


@SCHEMES
@pytest.mark.slow
def test_the_load_script_measures(addresses, scheme):
    command = f"serving/load.py --address={addresses[scheme]} --model={NAME} --shape=8,8,1"
    for more in ("--requests=20 --threads=2", "--requests=5 --images=9 --uint8 --label=stable"):
        done = subprocess.run(
            [sys.executable, *command.split(), *more.split()],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert re.search(r"p50 [\d.]+ ms, p90 .*, p99 .*, \d+ images/s", done.stdout)


def test_the_compose_file_checks_the_health_of_the_server_it_starts(addresses):
    text = (ROOT / "serving" / "compose.yaml").read_text()
    (check,) = re.findall(r"- -c\n\s+- (.*)", text)
    for address, healthy in ((addresses["http"], True), ("http://127.0.0.1:9", False)):
        here = check.replace("127.0.0.1/8501", address.removeprefix("http://").replace(":", "/"))
        assert here != check
        done = subprocess.run(["bash", "-c", here], timeout=20, capture_output=True)
        assert (done.returncode == 0) == healthy


def test_the_models_are_described_in_the_servers_own_format():
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    text = (ROOT / "serving" / "models.config").read_text()
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert dict(model.version_labels) == LABELS
    assert set(LABELS.values()) == set(model.model_version_policy.specific.versions)
