"""Requests a second of `examples/guarded_server.py`, one in ten malformed, and its memory.

    python -m benchmarks.guarded_server [--requests=10000] [--clients=8]

The server is a process of its own; the clients are threads of this one, on the same
cores. Prints what each kind of request was answered.
"""

import collections
import http.client
import itertools
import json
import pathlib
import socket
import subprocess
import sys
import time
from concurrent import futures

import numpy as np
import psutil
from absl import app, flags

from tvkeras import data

_REQUESTS = flags.DEFINE_integer("requests", 10_000, "In all.")
_CLIENTS = flags.DEFINE_integer("clients", 8, "Threads, each with a connection.")
_SERVER = pathlib.Path(__file__).parents[1] / "examples" / "guarded_server.py"

Bodies = dict[str, list[bytes]]


def bodies() -> tuple[Bodies, Bodies]:
    """Digits, and what is none, by kind."""
    images = data.load("digits", "test").images / 255
    digit = images[0].tolist()
    wrong = {
        "deep": b"[" * 2500,
        "rank": json.dumps([digit]).encode(),
        "empty": b"",
        "NaN": json.dumps(np.full_like(images[0], np.nan).tolist()).encode(),
        "0-255": json.dumps((255 * images[0]).tolist()).encode(),
        "text": json.dumps([[["a"]] * 8] * 8).encode(),
        "no JSON": bytes(range(256)),
        "huge": b"1" * 1_000_000,
    }
    digits = [json.dumps(image.tolist()).encode() for image in images]
    return {"digit": digits}, {kind: [body] for kind, body in wrong.items()}


def ask(port: int, requests: list[tuple[str, bytes]]) -> collections.Counter:
    """The statuses of requests made one after the other, by kind."""
    found: collections.Counter = collections.Counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for kind, body in requests:
        connection.request("POST", "/", body)
        with connection.getresponse() as response:
            json.load(response)
            found[kind, response.status] += 1
    connection.close()
    return found


def main(_: list[str]) -> None:
    """Start, ask, print."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, _SERVER, "digits_tv_lip", str(port)])
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None:
                sys.exit("error: the server ended")
            time.sleep(0.2)
        good, bad = (
            itertools.cycle([(kind, body) for kind, all_ in of.items() for body in all_])
            for of in bodies()
        )
        requests = [next(bad if i % 10 == 9 else good) for i in range(_REQUESTS.value)]
        found: collections.Counter = collections.Counter()
        usage = psutil.Process(process.pid)
        with futures.ThreadPoolExecutor(_CLIENTS.value) as pool:
            for part in range(5):
                start, before = time.monotonic(), sum(usage.cpu_times()[:2])
                mine = requests[part::5]
                clients = [mine[i :: _CLIENTS.value] for i in range(_CLIENTS.value)]
                for counts in pool.map(ask, [port] * _CLIENTS.value, clients):
                    found += counts
                rate = len(mine) / (time.monotonic() - start)
                cost = 1000 * (sum(usage.cpu_times()[:2]) - before) / len(mine)
                print(
                    f"{rate:4.0f} requests/s, of the server's CPU time {cost:.1f} ms each; "
                    f"it holds {usage.memory_info().rss / 2**20:.1f} MiB",
                    flush=True,
                )
    finally:
        process.terminate()
        process.wait()
    for (kind, status), count in sorted(found.items()):
        print(f"{kind:<8} {status} {count:6}")


if __name__ == "__main__":
    app.run(main)
