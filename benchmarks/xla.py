"""A training step as XLA compiles it, on JAX."""

from typing import Any

import jax

import tvkeras


def compiled_step(robust: tvkeras.RobustClassifier, batch: Any) -> tuple[Any, Any]:
    """The compiled `(state, batch) -> ...`, and the state it starts from.

    Args:
        robust: Compiled by Keras.
        batch: Images and labels, on the devices where they are meant to be.
    """
    robust.optimizer.build(robust.trainable_variables)
    groups = (
        robust.trainable_variables,
        robust.non_trainable_variables,
        robust.optimizer.variables,
        robust.metrics_variables,
    )
    state = tuple([variable.value for variable in group] for group in groups)
    return jax.jit(robust.train_step).lower(state, batch).compile(), state
