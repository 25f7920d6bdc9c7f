"""A client of exported classifiers behind TensorFlow Serving, over REST or gRPC.

REST needs nothing but NumPy; gRPC needs the official stubs: `pip install 'tvkeras[serving]'`.
"""

import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np

from tvkeras import checks, inputs

PAUSES = (0.2, 0.4, 0.8, 1.6)  # seconds before another attempt; five attempts are gRPC's limit
DTYPES = {
    "logits": np.float32,
    "probabilities": np.float32,
    "class_id": np.int64,
    "score": np.float32,
    "attack_suspected": np.bool_,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """What a server says of images.

    Attributes:
        logits: float32, shape `(count, num_classes)`.
        probabilities: Their softmax.
        class_id: int64 `(count,)`, the predicted classes.
        score: float32 `(count,)`, the detector's gradient norms; None if the model was
            exported without a detector.
        attack_suspected: bool `(count,)`, whether the score reaches the detector's
            threshold; None likewise.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    class_id: np.ndarray
    score: np.ndarray | None = None
    attack_suspected: np.ndarray | None = None


class Client:
    """Asks one model of a server; threads may share it.

    What the server cannot take now (connection refused or lost, 503, UNAVAILABLE) is asked
    again, up to five times in three seconds.

    Args:
        address: "http://host:8501" or "https://..." for REST, "grpc://host:8500" for
            gRPC, which sends pixels as bytes instead of text; it is not encrypted.
        model: The model's name at the server.
        version: Version to ask; default: the server's choice, its newest.
        label: Or the label of one, such as "stable".
        timeout: Seconds for a call, all attempts together.

    Raises:
        ValueError: For an illegal argument.
        ImportError: For gRPC without the stubs.

    Example:
        with Client("grpc://localhost:8500", model="digits") as client:
            client.classify(images).attack_suspected
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        version: int | None = None,
        label: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https", "grpc") or not parts.hostname:
            raise ValueError(
                "address must look like 'http://host:8501', 'https://host' or "
                f"'grpc://host:8500', got address={address!r}."
            )
        if version is not None and label is not None:
            raise ValueError(f"give version={version!r} or label={label!r}, not both.")
        if version is not None:
            checks.whole_number("version", version, minimum=1)
        self._address = address
        self._timeout = checks.number("timeout", timeout, minimum=0.0, exclusive=True)
        transport = _Grpc if parts.scheme == "grpc" else _Rest
        self._transport = transport(address, model, version, label)

    def classify(self, images: np.ndarray) -> Classification:
        """Classes, probabilities, and what the exported detector thinks of the images.

        Args:
            images: float32 in [0, 1] or uint8, shape
                `(count, height, width, channels)`.

        Raises:
            ValueError: If the images, the model or its version are refused, by this
                client or by the server, whose words are in the message.
            TimeoutError: If there is no answer in time.
            ConnectionError: If the server stays unavailable.
            RuntimeError: If the server fails, or is no such server.
        """
        images = _checked(images)
        signature = "serving_uint8" if images.dtype == np.uint8 else "serving_default"
        return Classification(**self._ask(signature, images))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits alone, shape `(count, num_classes)`: cheaper, without the detector.

        Args:
            images: float32 in [0, 1], shape `(count, height, width, channels)`.

        Raises:
            ValueError: As `classify`, and for uint8 images; so are the other errors.
        """
        images = _checked(images)
        if images.dtype == np.uint8:
            raise ValueError("images must be float in [0, 1], got uint8. Divide them by 255.")
        return self._ask("predict", images)["logits"]

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, signature: str, images: np.ndarray) -> dict[str, np.ndarray]:
        try:
            outputs = self._transport.ask(signature, images, self._timeout)
        except ConnectionError as error:
            raise ConnectionError(f"{self._address} is unavailable: {error}") from error
        except TimeoutError as error:
            raise TimeoutError(
                f"{self._address} did not answer within timeout={self._timeout:g} seconds."
            ) from error
        return {name: np.asarray(outputs[name], DTYPES[name]) for name in outputs}


def _checked(images: np.ndarray) -> np.ndarray:
    """Images as uint8 or float32, if a server can take them.

    Servers check again; but one that batches refuses all requests that it joined to a
    bad one.
    """
    images = inputs.images(images, hint="Divide 8-bit pixels by 255, or pass them as uint8.")
    return images if images.dtype == np.uint8 else images.astype(np.float32)


# ---- Transports: their errors are those that `Client` names ------------------------------


class _Rest:
    """JSON over HTTP, in TensorFlow Serving's columnar form."""

    def __init__(self, address: str, model: str, version: int | None, label: str | None) -> None:
        path = f"/v1/models/{urllib.parse.quote(model, safe='')}"
        if version is not None:
            path += f"/versions/{version}"
        if label is not None:
            path += f"/labels/{urllib.parse.quote(label, safe='')}"
        self._url = f"{address.rstrip('/')}{path}:predict"

    def ask(self, signature: str, images: np.ndarray, timeout: float) -> Mapping[str, Any]:
        content = {"signature_name": signature, "inputs": {"images": images.tolist()}}
        request = urllib.request.Request(
            self._url, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        deadline = time.monotonic() + timeout
        for pause in PAUSES:
            try:
                return self._attempt(request, deadline - time.monotonic())
            except ConnectionError:
                if time.monotonic() + pause >= deadline:
                    raise
                time.sleep(pause)
        return self._attempt(request, deadline - time.monotonic())

    def _attempt(self, request: urllib.request.Request, timeout: float) -> Mapping[str, Any]:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                reply = response.read()
        except urllib.error.HTTPError as error:
            raise _http_error(error) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise error.reason from error
            raise ConnectionError(error.reason) from error
        except http.client.HTTPException as error:  # it hung up in the middle
            raise ConnectionError(repr(error)) from error
        try:
            outputs = json.loads(reply)["outputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise RuntimeError(f"{self._url} is no TensorFlow Serving: {reply[:200]!r}") from error
        return outputs if isinstance(outputs, dict) else {"logits": outputs}  # one has no name

    def close(self) -> None:
        """Every request has a connection of its own."""


def _http_error(error: urllib.error.HTTPError) -> Exception:
    text = error.read().decode(errors="replace")
    try:
        text = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        text = text[:200]  # of a proxy
    message = f"the server refused with status {error.code}: {text}"
    kinds = {400: ValueError, 404: ValueError, 503: ConnectionError, 504: TimeoutError}
    return kinds.get(error.code, RuntimeError)(message)


class _Grpc:
    """The official stubs over an insecure channel, which tries again by its own policy."""

    def __init__(self, address: str, model: str, version: int | None, label: str | None) -> None:
        try:
            import grpc
            import tensorflow as tf
            from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
        except ImportError as error:
            raise ImportError(
                "grpc:// needs TensorFlow Serving's stubs: pip install 'tvkeras[serving]'."
            ) from error
        self._tf, self._grpc = tf, grpc
        self._request = predict_pb2.PredictRequest()
        self._request.model_spec.name = model
        if version is not None:
            self._request.model_spec.version.value = version
        if label is not None:
            self._request.model_spec.version_label = label
        policy = {
            "maxAttempts": len(PAUSES) + 1,
            "initialBackoff": f"{PAUSES[0]}s",
            "maxBackoff": f"{PAUSES[-1]}s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        options = {
            "grpc.service_config": json.dumps(
                {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
            ),
            "grpc.initial_reconnect_backoff_ms": 100,  # by default a second
            "grpc.max_reconnect_backoff_ms": 1000,
            "grpc.max_receive_message_length": -1,
        }
        target = urllib.parse.urlsplit(address).netloc
        self._channel = grpc.insecure_channel(target, list(options.items()))
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)

    def ask(self, signature: str, images: np.ndarray, timeout: float) -> Mapping[str, Any]:
        request = type(self._request)()
        request.CopyFrom(self._request)
        request.model_spec.signature_name = signature
        request.inputs["images"].CopyFrom(self._tf.make_tensor_proto(images))
        try:
            outputs = self._stub.Predict(request, timeout).outputs
        except self._grpc.RpcError as error:
            raise self._error(error) from error
        return {name: self._tf.make_ndarray(outputs[name]) for name in outputs}

    def close(self) -> None:
        self._channel.close()

    def _error(self, error: Any) -> Exception:
        code = self._grpc.StatusCode
        kinds = {
            code.INVALID_ARGUMENT: ValueError,
            code.NOT_FOUND: ValueError,
            code.FAILED_PRECONDITION: ValueError,
            code.UNAVAILABLE: ConnectionError,
            code.DEADLINE_EXCEEDED: TimeoutError,
        }
        message = f"the server refused with status {error.code().name}: {error.details()}"
        return kinds.get(error.code(), RuntimeError)(message)
