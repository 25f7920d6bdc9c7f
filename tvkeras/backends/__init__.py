"""The one place that knows which Keras backend runs: same names, same contracts.

The functions below come from `tensorflow.py` or `jax.py`; everything else in tvkeras
is written in `keras.ops`.
"""

import contextlib
import importlib
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import keras

if keras.backend.backend() not in ("tensorflow", "jax"):
    raise ImportError(
        "tvkeras runs on the Keras backends 'tensorflow' and 'jax', "
        f"got KERAS_BACKEND={keras.backend.backend()!r}."
    )


class PeerError(ConnectionError):
    """Another of the processes that train together has failed."""


class Devices(NamedTuple):
    """What a training run computes on.

    Attributes:
        total: Devices that share each batch, over all processes.
        process: Number of this process, from 0.
        processes: How many processes run together.
    """

    total: int = 1
    process: int = 0
    processes: int = 1


def processor_gains_from_bfloat16(cpuinfo: str | os.PathLike[str] = "/proc/cpuinfo") -> bool:
    """Whether the CPU is faster in bfloat16 than in float32, as far as Linux's `cpuinfo` says so.

    AVX-512's instructions for it are, on AMD; on an Intel Xeon without AMX they have 0.6 times the
    rate of float32 (see BUILD.md).
    """
    path = pathlib.Path(cpuinfo)
    words = set(path.read_text().split()) if path.exists() else set()
    return bool(words & {"amx_bf16", "bf16"}) or words >= {"AuthenticAMD", "avx512_bf16"}


_module = importlib.import_module(f"tvkeras.backends.{keras.backend.backend()}")

after = _module.after
compiled = _module.compiled
fast_twin = _module.fast_twin
from_first_process = _module.from_first_process
gains_from_bfloat16 = _module.gains_from_bfloat16
maximum_of_processes = _module.maximum_of_processes
maximum_of_replicas = _module.maximum_of_replicas
spread = _module.spread
recomputed = _module.recomputed
value_and_gradient = _module.value_and_gradient


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends in an error in all processes, or in none of them.

    Without it the others would wait, in their next collective operation, for the one
    that failed.

    Raises:
        PeerError: If another process failed inside; this one's own errors pass.
    """
    failed = 1
    try:
        yield
        failed = 0
    finally:
        failures = maximum_of_processes(failed)
    if failures:
        raise PeerError("another process of this run has failed; its own output says why.")
