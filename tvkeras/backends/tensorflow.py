"""TensorFlow's primitives."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tvkeras.backends import Devices, processor_gains_from_bfloat16
from tvkeras.backends.fused import fast_twin as fast_twin

Tensor = Any


def value_and_gradient(
    function: Callable[..., tuple[Tensor, Any]], arguments: Sequence[Any]
) -> tuple[tuple[Tensor, Any], Any]:
    """Value, auxiliary output and gradient of a scalar function.

    Args:
        function: Maps `arguments` to (scalar, auxiliary output).
        arguments: Tensors or lists of tensors.

    Returns:
        ((value, auxiliary), gradients), the gradients structured like `arguments`,
        zero where the value does not depend on an argument.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tf.nest.flatten(arguments))
        value, auxiliary = function(*arguments)
    gradients = tape.gradient(value, arguments, unconnected_gradients="zero")
    return (value, auxiliary), gradients


def gains_from_bfloat16() -> bool:
    """Whether what trains is faster in bfloat16 than in float32."""
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    if details:
        return all(about.get("compute_capability", (0, 0)) >= (8, 0) for about in details)
    return bool(tf.config.list_physical_devices("TPU")) or processor_gains_from_bfloat16()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors as one graph; under XLA on an accelerator, not on a CPU."""
    accelerated = bool(tf.config.list_physical_devices("GPU"))
    own = functools.partial(function)  # else closures of one function count as its retracing
    return tf.function(own, jit_compile=accelerated, autograph=False, reduce_retracing=True)


def after(value: Tensor, dependencies: Any) -> Tensor:
    """`value`, computed only when all `dependencies` are."""
    with tf.control_dependencies(tf.nest.flatten(dependencies)):
        return tf.identity(value)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose gradient computes again what lies between arguments and results.

    Of first order alone: TensorFlow refuses the gradient of such a gradient.
    """

    def call(*arguments: Any) -> Any:
        structure: Any = None

        @tf.recompute_grad
        def flat(*tensors: Tensor) -> list[Tensor]:
            nonlocal structure
            structure = function(*tf.nest.pack_sequence_as(arguments, tensors))
            return tf.nest.flatten(structure)

        results = flat(*tf.nest.flatten(arguments))
        return tf.nest.pack_sequence_as(structure, results)

    return call


def maximum_of_replicas(value: Tensor) -> tuple[Tensor, Tensor | float]:
    """Maximum of a scalar over the replicas, and its owner's share of a mean over them.

    Returns:
        The maximum, and the number of replicas on the first that attains it, 0 on the
        others.
    """
    context = tf.distribute.get_replica_context()
    count = context.num_replicas_in_sync
    if count == 1:
        return value, 1.0
    values = context.all_gather(tf.reshape(tf.stop_gradient(value), (1,)), axis=0)
    owner = tf.argmax(values, output_type=tf.int32)
    own = owner == context.replica_id_in_sync_group
    return tf.reduce_max(values), tf.where(own, tf.cast(count, value.dtype), 0)


def maximum_of_processes(number: int) -> int:
    """`number` itself: TensorFlow trains in one process here."""
    return number


def from_first_process(content: bytes) -> bytes:
    """`content` itself: TensorFlow trains in one process here."""
    return content


@contextlib.contextmanager
def spread(devices: int | str) -> Iterator[Devices]:
    """Spreads the models that are built and trained inside over devices, mirrored.

    Args:
        devices: How many of this machine's GPUs (without one, CPUs), or "all".

    Raises:
        ValueError: If there are fewer, or `TF_CONFIG` names several workers.
    """
    workers = json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {}).get("worker", [])
    if len(workers) > 1:
        raise ValueError(
            f"TF_CONFIG names {len(workers)} workers, but TensorFlow trains on one: Keras's fit "
            "fails under MultiWorkerMirroredStrategy. Use KERAS_BACKEND=jax for several processes "
            "(BUILD.md, 'Many devices')."
        )
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    total = len(found) if devices == "all" else int(devices)
    if total > len(found):
        raise ValueError(
            f"devices must be 'all' or at most {len(found)} (this machine has "
            f"{[device.name for device in found]}), got devices={devices!r}."
        )
    if total == 1:
        yield Devices()
        return
    with _mirrored(tuple(device.name for device in found[:total])).scope():
        yield Devices(total)


@functools.cache
def _mirrored(names: tuple[str, ...]) -> Any:
    """One strategy for a set of devices: TensorFlow mixes up the collectives of two."""
    return tf.distribute.MirroredStrategy(names)
