"""Measures a model server: latency and throughput of `tvkeras.serving.Client`.

python serving/load.py --address=grpc://localhost:8500 --model=resnet9_32_tv_lip --shape 32 32 3
"""

import argparse
import time
from concurrent import futures

import numpy as np

from tvkeras.serving import Client


def main() -> None:
    """Sends random images from several threads and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--address", required=True, help="http://host:8501 or grpc://host:8500.")
    add("--model", required=True, help="The model's name.")
    add("--label", help="Label of the version to ask.")
    add("--shape", type=int, nargs=3, required=True, metavar=("HEIGHT", "WIDTH", "CHANNELS"))
    add("--images", type=int, default=1, help="Images in a request.")
    add("--requests", type=int, default=500)
    add("--threads", type=int, default=8)
    add("--uint8", action="store_true", help="Send 8-bit pixels.")
    add("--logits", action="store_true", help="Ask for logits only, without the detector.")
    given = parser.parse_args()

    images = np.random.default_rng(0).integers(0, 256, (given.images, *given.shape), np.uint8)
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
    main()
