"""The one place that knows which Keras backend runs: same names, same contracts.

`value_and_gradient`, `compiled`, `fast_twin` and `train_step` come from
`tensorflow.py` or `jax.py`; everything else in tvkeras is written in `keras.ops`.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from tvkeras.backends.tensorflow import (
        compiled,
        train_step,
        fast_twin,
        value_and_gradient,
    )
elif keras.backend.backend() == "jax":
    from tvkeras.backends.jax import compiled, train_step, fast_twin, value_and_gradient
else:
    raise ImportError(
        "tvkeras runs on the Keras backends 'tensorflow' and 'jax', "
        f"got KERAS_BACKEND={keras.backend.backend()!r}."
    )

__all__ = ["compiled", "train_step", "fast_twin", "value_and_gradient"]
