"""Rounding error of the difference quotient by precision, norm and step.

    python -m benchmarks.precision

Prints the mean relative error of the quotient as an estimate of the gradient's norm
(in float32, from back-propagation), over 64 random images through an untrained
ResNeXt. `tvkeras.defenses.MIN_FD_STEP` rests on it.
"""

import keras
import numpy as np
from absl import app

import tvkeras
from tvkeras import backends, norms

STEPS = (1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
IMAGES = np.random.default_rng(0).random((64, 32, 32, 3), "float32")
LABELS = np.random.default_rng(1).integers(0, 10, 64)


def losses(classifier: keras.Model, images: np.ndarray) -> np.ndarray:
    """Losses of the 64 images, in inference mode."""
    logits = keras.ops.cast(classifier(images, training=False), "float32")
    return keras.ops.sparse_categorical_crossentropy(LABELS, logits, from_logits=True)


def main(_: list[str]) -> None:
    """Prints a row for each precision and norm."""
    print(f"{'':<24}" + "".join(f"{step:>8}" for step in STEPS))
    keras.utils.set_random_seed(0)
    full = tvkeras.models.build("resnext10", 10, width=16)
    _, (gradient,) = backends.value_and_gradient(
        lambda images: (keras.ops.sum(losses(full, images)), None),
        (keras.ops.convert_to_tensor(IMAGES),),
    )
    for policy in ("float32", "mixed_float16", "mixed_bfloat16"):
        keras.config.set_dtype_policy(policy)
        classifier = tvkeras.models.build("resnext10", 10, width=16)
        classifier.set_weights(full.get_weights())
        for norm in norms.DUALS:
            direction = keras.ops.convert_to_numpy(norms.steepest_direction(gradient, norm))
            size = keras.ops.convert_to_numpy(norms.dual_length(gradient, norm))
            errors = []
            for fd_step in STEPS:
                step = fd_step / (np.sqrt(IMAGES[0].size) if norm == "linf" else 1)
                ahead = losses(classifier, IMAGES + np.float32(step) * direction)
                change = keras.ops.convert_to_numpy(ahead - losses(classifier, IMAGES))
                errors.append(np.mean(np.abs(change / step - size) / size))
            print(f"{policy:<16}{norm:<8}" + "".join(f"{error:8.3f}" for error in errors))


if __name__ == "__main__":
    app.run(main)
