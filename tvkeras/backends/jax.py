"""JAX's primitives; nothing here imports TensorFlow."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from tvkeras.backends import Devices

Tensor = Any


def value_and_gradient(
    function: Callable[..., tuple[Tensor, Any]], arguments: Sequence[Any]
) -> tuple[tuple[Tensor, Any], Any]:
    """Value, auxiliary output and gradient of a scalar function.

    Args:
        function: Maps `arguments` to (scalar, auxiliary output).
        arguments: Arrays or lists of arrays.

    Returns:
        ((value, auxiliary), gradients), the gradients structured like `arguments`.
    """
    positions = tuple(range(len(arguments)))
    return jax.value_and_grad(function, argnums=positions, has_aux=True)(*arguments)


def gains_from_bfloat16() -> bool:
    """Whether what trains is faster in bfloat16; XLA's code for CPUs is not."""
    platforms = {device.platform for device in jax.devices()}
    if platforms == {"gpu"}:
        return all(float(device.compute_capability) >= 8.0 for device in jax.devices())
    return platforms == {"tpu"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays under `jax.jit`."""
    return jax.jit(function)


def after(value: Tensor, dependencies: Any) -> Tensor:
    """`value` itself: XLA orders a program for its memory without help (BUILD.md, "Speed")."""
    return value


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose gradient computes again what lies between arguments and results."""
    return jax.checkpoint(function)


def maximum_of_replicas(value: Tensor) -> tuple[Tensor, float]:
    """`value` itself: a batch that is spread over devices is one array here."""
    return value, 1.0


def maximum_of_processes(number: int) -> int:
    """The largest of the processes' numbers; all of them must call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def from_first_process(content: bytes) -> bytes:
    """The first process's `content`, in all of them; all must call it."""
    if jax.process_count() == 1:
        return content
    length = maximum_of_processes(len(content) if jax.process_index() == 0 else 0)
    buffer = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()


@contextlib.contextmanager
def spread(devices: int | str) -> Iterator[Devices]:
    """Spreads the models that are built and trained inside over devices.

    With `KERAS_DISTRIBUTION_JOB_ADDRESSES`, `..._NUM_PROCESSES` and `..._PROCESS_ID`
    set, this process joins the others, and "all" are the devices of all of them.

    Args:
        devices: How many, or "all".

    Raises:
        ValueError: If there are fewer, or processes run together with less than all.
    """
    if os.environ.get("KERAS_DISTRIBUTION_JOB_ADDRESSES") and not jax.distributed.is_initialized():
        keras.distribution.initialize()
    found = jax.devices()
    total = len(found) if devices == "all" else int(devices)
    if total > len(found) or (jax.process_count() > 1 and total < len(found)):
        raise ValueError(
            f"devices must be 'all' or at most {len(found)} ({jax.process_count()} processes see "
            f"{found}; several processes use all), got devices={devices!r}."
        )
    if total == 1:
        yield Devices()
        return
    names = keras.distribution.list_devices()[:total]
    distribution = keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    try:
        yield Devices(total, jax.process_index(), jax.process_count())
    finally:
        keras.distribution.set_distribution(None)


def fast_twin(classifier: keras.Model) -> keras.Model:
    """`classifier` itself: XLA fuses BatchNorm without help."""
    return classifier
