"""Serves a packaged entry as Hugging Face's hub does, and loads it.

python -m tests.hub_server FOLDER NAME
"""

import hashlib
import http.server
import json
import os
import pathlib
import sys
import tempfile
import threading

COMMIT = "a" * 40
REPOSITORY = "user/net"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers what is asked of one repository: its files, and the content of each."""

    def do_GET(self):
        self.wfile.write(self.answer())

    def do_HEAD(self):
        self.answer()

    def answer(self):
        path, folder = self.path.split("?")[0], self.server.folder
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        status, headers, content = 200, {}, b"{}"
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(file), "oid": _sha256(file)}
                for name, file in files.items()
            ]
            content = json.dumps(listed).encode()
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in files]
            content = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"/{REPOSITORY}/resolve/") and path.split("/")[-1] in files:
            content = files[path.split("/")[-1]]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_sha256(content)}"'}
        else:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        return content

    def log_message(self, *_):
        pass


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def main(folder, name):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder = pathlib.Path(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {  # read when huggingface_hub is imported
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": tempfile.mkdtemp(),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "*",
    }
    import keras
    import numpy as np
    import pytest

    from tvkeras import zoo

    published = zoo.load(name)
    images = np.random.default_rng(0).random((3, *published.input_shape[1:]), dtype="float32")
    expected, address = published(images), f"hf://{REPOSITORY}"
    for model in (zoo.load(address), keras.saving.load_model(address)):
        np.testing.assert_array_equal(model(images), expected)
    assert zoo.card(address) == zoo.card(name)
    os.environ["TVKERAS_OFFLINE"] = "1"
    server.shutdown()
    np.testing.assert_array_equal(zoo.load(address)(images), expected)
    with pytest.raises(zoo.DownloadError, match="'hf://user/other' cannot be downloaded"):
        zoo.load("hf://user/other")


if __name__ == "__main__":
    main(*sys.argv[1:])
