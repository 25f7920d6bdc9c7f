"""The training step under TensorFlow."""

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from tvkeras.training import mirrored

if TYPE_CHECKING:
    from tvkeras.training.classifier import RobustClassifier

Tensor = Any


def train_step(model: "RobustClassifier", data: Any) -> dict[str, Tensor]:
    """One optimizer step; returns its logs.

    Raises:
        ValueError: On several replicas, with a strategy or a setting that fails on them.
    """
    images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    replicas = tf.distribute.get_replica_context().num_replicas_in_sync
    state = [tf.convert_to_tensor(variable) for variable in model.non_trainable_variables]
    own = state
    if replicas > 1:
        mirrored.check(model)
        images = mirrored.with_equal_shares(images)
        own = [mirrored.own_seed(value) for value in state]
    trainable = [tf.convert_to_tensor(variable) for variable in model.trainable_variables]
    update, new_state = model.compute_update(trainable, own, images, labels, sample_weight)
    if replicas > 1:
        update = mirrored.averaged(update, model.optimizer)
        new_state = mirrored.averaged_state(new_state, own, state)
    for variable, value in zip(model.non_trainable_variables, new_state, strict=True):
        variable.assign(value)
    model.optimizer.apply(update.gradients, model.trainable_variables)
    model.average_weights()
    return model.compute_logs(update, images, labels, sample_weight)
