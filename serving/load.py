"""Measures a model server: latency and throughput of `tvkeras.serving.Client`.

python serving/load.py --address=grpc://localhost:8500 --model=airbench_tv_lip --shape=32,32,3
"""

import time
from concurrent import futures

import numpy as np
from absl import app, flags

from tvkeras.serving import Client


def main(_: list[str]) -> None:
    """Sends random images from several threads and prints what came of it."""
    given = flags.FLAGS
    shape = (given.images, *map(int, given.shape))
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if not given.uint8:
        images = (images / 255).astype(np.float32)

    with Client(given.address, given.model, label=given.label) as client:
        ask = client.logits if given.logits else client.classify
        for _ in range(3):
            ask(images)  # the first requests wait for the graph's optimisation

        def seconds(_: int) -> float:
            start = time.perf_counter()
            ask(images)
            return time.perf_counter() - start

        start = time.perf_counter()
        with futures.ThreadPoolExecutor(given.threads) as pool:
            latencies = 1e3 * np.array(list(pool.map(seconds, range(given.requests))))
        elapsed = time.perf_counter() - start
    p50, p90, p99 = np.percentile(latencies, (50, 90, 99))
    print(
        f"{given.requests} requests of {given.images} {images.dtype} images, {given.threads} "
        f"threads: p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms, "
        f"{given.requests * given.images / elapsed:.0f} images/s"
    )


if __name__ == "__main__":
    flags.DEFINE_string("address", None, "http://host:8501 or grpc://host:8500.", required=True)
    flags.DEFINE_string("model", None, "The model's name.", required=True)
    flags.DEFINE_string("label", None, "Label of the version to ask.")
    flags.DEFINE_list("shape", None, "Height, width and channels.", required=True)
    flags.DEFINE_integer("images", 1, "Images in a request.")
    flags.DEFINE_integer("requests", 500, "In all.")
    flags.DEFINE_integer("threads", 8, "At once.")
    flags.DEFINE_bool("uint8", False, "Send 8-bit pixels.")
    flags.DEFINE_bool("logits", False, "Ask for logits only, without the detector.")
    app.run(main)
