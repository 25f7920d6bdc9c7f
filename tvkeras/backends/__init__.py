"""The one place that knows which Keras backend runs: same names, same contracts.

The functions below come from `tensorflow.py` or `jax.py`; everything else in tvkeras
is written in `keras.ops`.
"""

import importlib

import keras

if keras.backend.backend() not in ("tensorflow", "jax"):
    raise ImportError(
        "tvkeras runs on the Keras backends 'tensorflow' and 'jax', "
        f"got KERAS_BACKEND={keras.backend.backend()!r}."
    )

_module = importlib.import_module(f"tvkeras.backends.{keras.backend.backend()}")

after = _module.after
compiled = _module.compiled
fast_twin = _module.fast_twin
maximum_of_replicas = _module.maximum_of_replicas
train_step = _module.train_step
value_and_gradient = _module.value_and_gradient
