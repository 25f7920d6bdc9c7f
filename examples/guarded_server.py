"""Serves a classifier of the zoo, and refuses images on which its detector suspects an attack.

    pip install 'tvkeras[examples]'
    python examples/guarded_server.py [NAME] [PORT]

POST a JSON list of rows of pixels in [0, 1]; the answer is the class, or 403. The detector
stops attacks that do not know it; its card says how often one that does evades it. What
is no image gets another 4xx, and every refusal says why in JSON. Images that come together
share one call of the model. On the open internet, put it behind a proxy that ends TLS.
"""

import asyncio
import contextlib
import json
import sys

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from tvkeras import zoo
from tvkeras.inference import CompiledClassifier

BATCH = 8  # images in a call of the model, always: another number would be compiled anew
PAUSE = 0.001  # seconds in which others may join a call
SECONDS = 5  # for a client to send its request
BYTES_PER_PIXEL = 32  # of JSON text, at most


class Guard:
    """A classifier and its detector, for images that come one by one."""

    def __init__(self, name: str) -> None:
        self._model = CompiledClassifier(zoo.load(name))  # keeps what is compiled
        self._detector = zoo.detector(name)
        self.shape = self._model.classifier.input_shape[1:]
        self._waiting: list[np.ndarray] = []
        self._answers: asyncio.Task[list[tuple[int, bool]]]
        self.look([np.zeros(self.shape, np.float32)])  # compiles

    def look(self, images: list[np.ndarray]) -> list[tuple[int, bool]]:
        """The class of each of at most `BATCH` images, and whether it looks attacked."""
        batch = np.zeros((BATCH, *self.shape), np.float32)
        batch[: len(images)] = images
        classes = self._model.logits(batch).argmax(axis=1).tolist()
        suspected = self._detector.detects(self._model, batch).tolist()
        return list(zip(classes, suspected, strict=True))[: len(images)]

    async def ask(self, image: np.ndarray) -> tuple[int, bool]:
        """What `look` says of one image, and of those that come at the same time."""
        if not self._waiting:
            self._answers = asyncio.create_task(self._look_at_all())
        self._waiting.append(image)
        place, answers = len(self._waiting) - 1, self._answers
        return (await answers)[place]

    async def _look_at_all(self) -> list[tuple[int, bool]]:
        await asyncio.sleep(PAUSE)
        images, self._waiting = self._waiting, []
        parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        # Not in a thread: the two would wait for one another's lock.
        return [answer for part in parts for answer in self.look(part)]


def parse(body: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The image in a request."""
    try:
        pixels = np.asarray(json.loads(body))
    except (ValueError, RecursionError) as error:  # no JSON, rows of unequal length, too deep
        raise HTTPException(400, f"no JSON list of rows of pixels: {error}") from error
    if pixels.shape != shape or pixels.dtype.kind not in "iuf":
        raise HTTPException(400, f"pixels must be numbers of shape {shape}, got {pixels.shape}")
    if not np.all((pixels >= 0) & (pixels <= 1)):  # NaN is not
        raise HTTPException(400, "pixels must lie in [0, 1]")
    return pixels.astype(np.float32)


async def read(request: Request, limit: int) -> bytes:
    """The body of a request, if it comes in time and is not too long."""
    body = b""
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise HTTPException(413, f"more than {limit} bytes")
    except (TimeoutError, ClientDisconnect) as error:
        close = {"Connection": "close"}
        raise HTTPException(408, f"no whole body in {SECONDS} s", close) from error
    return body


def application(name: str) -> Starlette:
    """The application for the zoo entry `name`."""
    guard = Guard(name)
    limit = 1000 + BYTES_PER_PIXEL * int(np.prod(guard.shape))

    async def classify(request: Request) -> JSONResponse:
        image = parse(await read(request, limit), guard.shape)
        class_id, suspected = await guard.ask(image)
        if suspected:
            raise HTTPException(403, "an attack is suspected")
        return JSONResponse({"class_id": class_id})

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    routes = [Route("/", classify, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse})


class Protocol(H11Protocol):
    """HTTP/1.1 that closes silent connections, and refuses in JSON what is no HTTP."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Waits for a request, but not for ever."""
        super().connection_made(transport)
        self.loop.call_later(SECONDS, lambda: self.cycle or transport.close())

    def send_400_response(self, msg: str) -> None:
        """Says that the request is no HTTP."""
        head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close"
        self.transport.write(f"{head}\r\n\r\n{json.dumps({'error': msg})}".encode())
        self.transport.close()


def server(name: str, port: int) -> uvicorn.Server:
    """A server of the zoo entry `name` on this machine's `port`."""
    settings = {"http": Protocol, "ws": "none", "log_level": "error", "limit_concurrency": 1000}
    return uvicorn.Server(uvicorn.Config(application(name), port=port, **settings))


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "digits_tv_lip"
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    guarded = server(name, port)
    print(f"serving {name} on http://127.0.0.1:{port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        guarded.run()
