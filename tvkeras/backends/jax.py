"""JAX's half of the training step: stateless, nothing here imports TensorFlow."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras

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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays under `jax.jit`."""
    return jax.jit(function)


def after(value: Tensor, dependencies: Any) -> Tensor:
    """`value`, computed only when all `dependencies` are."""
    held, _ = jax.lax.optimization_barrier((value, dependencies))  # type: ignore[no-untyped-call]
    return held


def maximum_of_replicas(value: Tensor) -> tuple[Tensor, float]:
    """`value` itself: a batch that is spread over devices is one array here."""
    return value, 1.0


def train_step(model: Any, state: Any, data: Any) -> tuple[dict[str, Tensor], Any]:
    """One optimizer step of a `RobustClassifier`; returns its logs and the new state."""
    trainable, non_trainable, optimizer, metrics = state
    images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with keras.StatelessScope(zip(model.optimizer.variables, optimizer, strict=True)):
        update, non_trainable = model.compute_update(
            trainable, non_trainable, images, labels, sample_weight
        )
    trainable, optimizer = model.optimizer.stateless_apply(optimizer, update.gradients, trainable)
    with keras.StatelessScope(zip(model.metrics_variables, metrics, strict=True)) as scope:
        logs = model.compute_logs(update, images, labels, sample_weight)
    metrics = [scope.get_current_value(variable) for variable in model.metrics_variables]
    return logs, (trainable, non_trainable, optimizer, metrics)


def fast_twin(classifier: keras.Model) -> keras.Model:
    """`classifier` itself: XLA fuses BatchNorm without help."""
    return classifier
