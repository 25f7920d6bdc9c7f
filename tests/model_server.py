"""A loopback stand-in for `tensorflow_model_server`, over the official protocol buffers.

It runs SavedModels by the session loader that the real one uses, through calls that check no
shapes, as in C++. Faults are made to order.
"""

import contextlib
import http.server
import json
import pathlib
import re
import threading
import time
from concurrent import futures

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

URL = re.compile(r"/v1/models/(?P<name>[^/:]+)(/versions/(?P<version>\d+)|/labels/(?P<label>\w+))?")
HTTP_STATUS = {
    tf.errors.INVALID_ARGUMENT: 400,
    tf.errors.NOT_FOUND: 404,
    tf.errors.UNAVAILABLE: 503,
}
GRPC_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class SavedModel:
    """One version, loaded into a session."""

    def __init__(self, path):
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph)
        with graph.as_default():
            meta = tf.compat.v1.saved_model.loader.load(self._session, ["serve"], str(path))
        self._signatures = {
            name: signature
            for name, signature in meta.signature_def.items()
            if not name.startswith("__")
        }
        self._calls = {name: self._callable(value) for name, value in self._signatures.items()}

    def _callable(self, signature):
        options = config_pb2.CallableOptions()
        options.feed.append(signature.inputs["images"].name)
        options.fetch.extend(output.name for output in signature.outputs.values())
        return self._session._make_callable_from_options(options)  # checks no shapes

    def predict(self, signature, images):
        """Outputs by name; lists of numbers become what the signature takes."""
        if signature not in self._signatures:
            raise tf.errors.InvalidArgumentError(
                None, None, f'Serving signature key "{signature}" not found.'
            )
        known = self._signatures[signature]
        if isinstance(images, list):
            images = np.array(images, tf.as_dtype(known.inputs["images"].dtype).as_numpy_dtype)
        return dict(zip(known.outputs, self._calls[signature](images), strict=True))


class ModelServer:
    """Serves every version under `models/NAME/VERSION` on two ports of the loopback.

    Args:
        models: Folder of the models.
        labels: Versions by label.

    Attributes:
        unavailable: How many of the next requests are refused as UNAVAILABLE.
        delay: Seconds that every request waits.
        requests: How many there were.
    """

    def __init__(self, models, labels):
        self._models = {
            (path.parent.name, int(path.name)): SavedModel(path)
            for path in pathlib.Path(models).glob("*/[0-9]*")
        }
        self._labels = labels
        self.unavailable, self.delay, self.requests = 0, 0.0, 0

    def predict(self, name, version, label, signature, images):
        """Answers one request, or raises a `tf.errors.OpError`."""
        self.requests += 1
        time.sleep(self.delay)
        if self.unavailable > 0:
            self.unavailable -= 1
            raise tf.errors.UnavailableError(None, None, "the queue is full")
        versions = [number for model, number in self._models if model == name]
        number = version or self._labels.get(label) or max(versions, default=0)
        if (name, number) not in self._models:
            raise tf.errors.NotFoundError(
                None, None, f"Servable not found for request: Specific({name}, {number})"
            )
        return self._models[name, number].predict(signature, images)

    @contextlib.contextmanager
    def serving(self, *, grpc_port=0, http_port=0):
        """Yields the addresses, by scheme; port 0 is any free one."""
        service = grpc.server(
            futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)]
        )
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(_Grpc(self), service)
        port = service.add_insecure_port(f"127.0.0.1:{grpc_port}")
        service.start()
        handler = type("Handler", (_Rest,), {"models": self})
        rest = http.server.ThreadingHTTPServer(("127.0.0.1", http_port), handler)
        threading.Thread(target=rest.serve_forever, daemon=True).start()
        yield {
            "grpc": f"grpc://127.0.0.1:{port}",
            "http": f"http://127.0.0.1:{rest.server_port}",
        }
        rest.shutdown()
        rest.server_close()
        service.stop(None)


class _Grpc(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models):
        self._models = models

    def Predict(self, request, context):  # noqa: N802  (the protocol's name)
        spec = request.model_spec
        try:
            outputs = self._models.predict(
                spec.name,
                spec.version.value,
                spec.version_label,
                spec.signature_name,
                tf.make_ndarray(request.inputs["images"]),
            )
        except tf.errors.OpError as error:
            context.abort(GRPC_STATUS[error.error_code], error.message)
        response = predict_pb2.PredictResponse()
        for name, value in outputs.items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return response


class _Rest(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        """The model's state: all that are there can be had."""
        self._reply(200, {"model_version_status": [{"state": "AVAILABLE"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        spec = URL.match(self.path).groupdict()
        try:
            outputs = self.models.predict(
                spec["name"],
                int(spec["version"] or 0),
                spec["label"],
                request["signature_name"],
                request["inputs"]["images"],
            )
        except tf.errors.OpError as error:
            self._reply(HTTP_STATUS[error.error_code], {"error": error.message})
            return
        lists = {name: value.tolist() for name, value in outputs.items()}
        if len(lists) == 1:  # columnar replies do not name a single output
            (lists,) = lists.values()
        self._reply(200, {"outputs": lists})

    def _reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have gone
            self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""
