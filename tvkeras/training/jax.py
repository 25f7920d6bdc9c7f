"""The training step under JAX: stateless."""

from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from tvkeras.training.classifier import RobustClassifier

Tensor = Any


def train_step(
    model: "RobustClassifier", state: Any, data: Any
) -> tuple[dict[str, Tensor], tuple[list[Tensor], ...]]:
    """One optimizer step; returns its logs and the new state."""
    trainable, non_trainable, optimizer, metrics = state
    images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with keras.StatelessScope(zip(model.optimizer.variables, optimizer, strict=True)):
        update, non_trainable = model.compute_update(
            trainable, non_trainable, images, labels, sample_weight
        )
    trainable, optimizer = model.optimizer.stateless_apply(optimizer, update.gradients, trainable)
    groups = (
        (model.trainable_variables, trainable),
        (model.non_trainable_variables, non_trainable),
        (model.optimizer.variables, optimizer),
        (model.metrics_variables, metrics),
    )
    pairs = [pair for group in groups for pair in zip(*group, strict=True)]
    with keras.StatelessScope(pairs) as scope:
        model.average_weights()
        logs = model.compute_logs(update, images, labels, sample_weight)
    new = ([scope.get_current_value(variable) for variable in group] for group, _ in groups)
    return logs, tuple(new)
