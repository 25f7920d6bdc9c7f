"""Serves a classifier of the zoo, and refuses images on which its detector suspects an attack.

    python examples/guarded_server.py [NAME] [PORT]

POST a JSON list of rows of pixels in [0, 1]; the answer is the class, or 403. The detector
stops attacks that do not know it; its card says how often one that does evades it.
"""

import http.server
import json
import sys

import numpy as np

from tvkeras import zoo


def server(name: str, port: int) -> http.server.HTTPServer:
    """A server of the zoo entry `name` on this machine's `port` (0: any free one)."""
    classifier, detector = zoo.load(name), zoo.detector(name)

    def answer(body: bytes) -> tuple[int, dict[str, object]]:
        try:
            images = np.asarray(json.loads(body), "float32")[None]
            if not np.all((images >= 0) & (images <= 1)):
                raise ValueError("pixels must lie in [0, 1]")
            suspected = bool(detector.detects(classifier, images)[0])
        except (ValueError, TypeError) as error:
            return 400, {"error": str(error)}
        if suspected:
            return 403, {"error": "an attack is suspected"}
        return 200, {"class_id": int(classifier.predict(images, verbose=0).argmax())}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, content = answer(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    return http.server.HTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "digits_tv_lip"
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    print(f"serving {name} on http://127.0.0.1:{port}", flush=True)
    server(name, port).serve_forever()
