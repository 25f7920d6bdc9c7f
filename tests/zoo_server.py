"""Zoos of the tests, and a loopback HTTP server that serves a folder, well or badly."""

import contextlib
import http.server
import os
import subprocess
import sys
import threading

from tests.conftest import ROOT
from tvkeras.zoo import store

ARGUMENTS = {"width": 4, "input_shape": (8, 8, 1)}


def index_of(folder, **settings):
    """The index entry of the files in a folder."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = {name: store.File.of(content)._asdict() for name, content in contents.items()}
    return {"schema": store.SCHEMA, "files": files, **settings}


def start(origin, code, backend):
    """A process in which the zoo is that of `origin`; it runs `code`."""
    preamble = f"""
import pathlib, sys
sys.modules["tensorflow" if {backend!r} == "jax" else "jax"] = None  # any import of it fails
import tvkeras
from tvkeras.zoo import store
store.INDEX, store.CHECKOUT = pathlib.Path({str(origin)!r}, "index.json"), None
"""
    return subprocess.Popen(
        [sys.executable, "-c", preamble + code],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        self.server.behaviour(self, (self.server.folder / self.path.lstrip("/")).read_bytes())

    def reply(self, content, length=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


# ---- Behaviours: (handler, content of the file that was asked for) ---------------------
def well(handler, content):
    handler.reply(content)


def tampered(handler, content):
    handler.reply(content[:-1] + bytes([content[-1] ^ 1]))


def short(handler, content):
    handler.reply(content[: len(content) // 2])


def truncated(handler, content):
    handler.reply(content[: len(content) // 2], length=len(content))


def stalled(handler, content):
    truncated(handler, content)
    handler.server.ended.wait(60)


def trickling(handler, content):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.ended.wait(0.05):
        handler.wfile.write(content[:1])


def trickling_headers(handler, content):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not handler.server.ended.wait(0.05):
        handler.wfile.write(b"a")


def endless(handler, content):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.ended.is_set():
        handler.wfile.write(content)


def silent(handler, content):
    handler.close_connection = True


def missing(handler, content):
    handler.send_error(404)


def web_page(handler, content):
    handler.reply(b"<!DOCTYPE html><html><body>Please sign in</body></html>")


def another_file(handler, content):
    handler.reply(b"the weights of another classifier")


@contextlib.contextmanager
def serving(folder):
    """Serves a folder; yields a server with `url`, `requests` and a `behaviour` to set."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.behaviour, server.requests = folder, well, []
    server.ended = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.handle_error = lambda *_: None  # clients go away
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
