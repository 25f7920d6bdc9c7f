"""What the operations of a training step take: memory and time."""

import collections
import re

import keras
import numpy as np

import tvkeras


def peak_memory(robust: tvkeras.RobustClassifier, batch: tuple[np.ndarray, np.ndarray]) -> float:
    """MiB that a step's tensors take at the most, beside its arguments.

    On JAX, what the compiled step asks for. On TensorFlow, what lives at the same time while
    the step's gradients are computed once, one operation after the other. The optimizer's part
    is left out there, and what the process needs besides: compiled primitives, holes in the heap.

    Args:
        robust: Compiled by Keras.
        batch: Images and labels.
    """
    if keras.backend.backend() == "jax":
        from benchmarks.xla import compiled_step

        step, _ = compiled_step(robust, batch)
        return step.memory_analysis().temp_size_in_bytes / 2**20
    changes = sorted(
        (change.alloc_micros, change.alloc_bytes)
        for node in _executed(robust, batch)
        for memory in node.memory
        for change in memory.allocation_records
    )
    return float(np.cumsum([size for _, size in changes]).max()) / 2**20


def shares_of_time(
    robust: tvkeras.RobustClassifier, batch: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    """The share of each kind of TensorFlow operation in the seconds of a step's gradients."""
    micros: collections.Counter[str] = collections.Counter()
    for node in _executed(robust, batch):
        kind = re.search(r" = (?:_MklNative|_Mkl|_)?(\w+)\(", node.timeline_label)
        micros[kind[1] if kind else "other"] += node.op_end_rel_micros - node.op_start_rel_micros
    return {kind: count / micros.total() for kind, count in micros.most_common()}


def _executed(robust: tvkeras.RobustClassifier, batch: tuple[np.ndarray, np.ndarray]) -> list:
    """TensorFlow's record of each operation of a step, executed in turn; of its second time."""
    import tensorflow as tf

    groups = robust.trainable_variables, robust.non_trainable_variables
    arguments = *([v.numpy() for v in group] for group in groups), *batch

    @tf.function
    def gradients(trainable: list, state: list, images: tf.Tensor, labels: tf.Tensor) -> tuple:
        update, state = robust.compute_update(trainable, state, images, labels, None)
        return update.gradients, update.loss, state

    tensors = tf.nest.map_structure(tf.convert_to_tensor, arguments)
    function = gradients.get_concrete_function(*tensors)
    values = tf.nest.flatten(arguments)
    inputs = [tensor.name for tensor in function.inputs]
    count = robust.optimizer.iterations.numpy()
    in_turn = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=1)
    with tf.Graph().as_default(), tf.compat.v1.Session(config=in_turn) as session:
        iterations = tf.compat.v1.get_variable("iterations", initializer=count, use_resource=True)
        session.run(iterations.initializer)
        held = dict.fromkeys(inputs[len(values) :], iterations.handle)
        tf.import_graph_def(function.graph.as_graph_def(), held, name="")
        for _ in range(2):  # the first one compiles and allocates
            recorded = tf.compat.v1.RunMetadata()
            session.run(
                [tensor.name for tensor in function.outputs],
                dict(zip(inputs, values, strict=False)),
                tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.FULL_TRACE),
                recorded,
            )
    return [node for device in recorded.step_stats.dev_stats for node in device.node_stats]
