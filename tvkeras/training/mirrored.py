"""What a replica's step does under TensorFlow's `MirroredStrategy`.

Gradients and BatchNorm's moving statistics are averaged over the replicas, gradients
before they are clipped; each replica draws random numbers of its own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tvkeras.defenses import Update

if TYPE_CHECKING:
    from tvkeras.training.classifier import RobustClassifier

Tensor = Any


def check(model: "RobustClassifier") -> None:
    """Raises ValueError for another strategy, or a setting that fails on several replicas."""
    strategy = _context().strategy
    if not isinstance(strategy, tf.distribute.MirroredStrategy):
        raise ValueError(
            "the tf.distribute strategy must be a MirroredStrategy, got "
            f"{type(strategy).__name__}. Use KERAS_BACKEND=jax for several processes."
        )
    optimizer: Any = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    refused = {
        "jit_compile": (model.jit_compile, False),
        "steps_per_execution": (model.steps_per_execution, 1),
        "gradient_accumulation_steps": (optimizer.gradient_accumulation_steps, None),
        "ema_overwrite_frequency": (optimizer.use_ema and optimizer.ema_overwrite_frequency, None),
        "averaging": (model.averaging, None),
        "penalty_every": (getattr(model.defense, "penalty_every", 1), 1),
    }
    for name, (value, only) in refused.items():
        if value and value != only:
            raise ValueError(
                f"{name} must be {only} on several TensorFlow devices, got {name}={value!r}. "
                "Change it, or use KERAS_BACKEND=jax."
            )


def with_equal_shares(images: Tensor) -> Tensor:
    """`images`, if all replicas have as many: else the mean over them would be another."""
    counts = _context().all_gather(tf.shape(images)[:1], axis=0)
    equal = tf.debugging.assert_equal(
        counts,
        counts[0],
        "every batch must be a multiple of the number of devices: drop the last, smaller one "
        "(drop_remainder=True), or use tvkeras.data.Batches.",
    )
    with tf.control_dependencies([equal]):
        return tf.identity(images)


def own_seed(value: Tensor) -> Tensor:
    """A seed's state (seed, counter) moved so that each replica draws its own numbers."""
    if value.dtype.is_floating:
        return value
    shift = tf.cast(_context().replica_id_in_sync_group, value.dtype) * 1_000_003
    return value + tf.concat([shift[None], tf.zeros_like(value[1:])], axis=0)


def averaged(update: Update, optimizer: Any) -> Update:
    """The whole batch's update, its gradients as Keras's optimizer wants them: it sums them.

    The same numbers on all replicas: their metrics then survive a checkpoint exactly.
    """
    gradients, loss, penalties = _context().all_reduce(
        tf.distribute.ReduceOp.MEAN,
        (list(update.gradients), update.loss, dict(update.penalties)),
    )
    count = _context().num_replicas_in_sync
    gradients = [gradient / count for gradient in clipped(gradients, optimizer)]
    return update._replace(gradients=gradients, loss=loss, penalties=penalties)


def averaged_state(
    new: Sequence[Tensor], own: Sequence[Tensor], shared: Sequence[Tensor]
) -> list[Tensor]:
    """Moving statistics averaged over the replicas, seeds moved back by their `own_seed`."""
    return [
        _context().all_reduce(tf.distribute.ReduceOp.MEAN, value)
        if value.dtype.is_floating
        else value - (seed - old)
        for value, seed, old in zip(new, own, shared, strict=True)
    ]


def clipped(gradients: Sequence[Tensor], optimizer: Any) -> Sequence[Tensor]:
    """Averaged gradients, clipped as the optimizer would clip them on one device.

    Keras's optimizers clip each replica's gradients before they add them up; what is
    clipped here already passes that unchanged.
    """
    scale = optimizer.scale_loss(tf.constant(1.0))
    settings = getattr(optimizer, "inner_optimizer", optimizer)
    gradients = [gradient / tf.cast(scale, gradient.dtype) for gradient in gradients]
    if settings.clipnorm:
        gradients = [tf.clip_by_norm(gradient, settings.clipnorm) for gradient in gradients]
    elif settings.global_clipnorm:
        gradients, _ = tf.clip_by_global_norm(gradients, settings.global_clipnorm)
    elif limit := settings.clipvalue:
        gradients = [  # an overflow stays one, for the loss scale to see
            tf.where(tf.math.is_finite(g), tf.clip_by_value(g, -limit, limit), g) for g in gradients
        ]
    return [gradient * tf.cast(scale, gradient.dtype) for gradient in gradients]


def _context() -> Any:
    return tf.distribute.get_replica_context()
