"""Images a second of the same attacks, native, adapted and by other libraries.

    python -m benchmarks.attacks [--images=250] [--model=resnext10]

On an untrained network of CIFAR-10's shape, whose rightly classified images are those
it is given as labels: every attack has to work on all of them. Times are medians of
rounds in which all attacks take turns; "x native" is a method's time over the native
one's. Foolbox's PGD is called directly, where no adapter is needed.
"""

import statistics
import time
from collections.abc import Callable

import tvkeras  # isort: skip  (first: it chooses TensorFlow's kernels)
import foolbox
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from tvkeras import attacks
from tvkeras.attacks.base import example_losses, input_gradient

EPSILONS = {"l2": 0.5, "linf": 8 / 255}
STEPS = 20
FOOLBOX_PGD = {"l2": foolbox.attacks.L2PGD, "linf": foolbox.attacks.LinfPGD}

_MODEL = flags.DEFINE_string("model", "resnext10", "A name of tvkeras.models.BUILDERS.")
_WIDTH = flags.DEFINE_integer("width", 12, "Its width.")
_IMAGES = flags.DEFINE_integer("images", 250, "Images, one batch.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed calls of each.")

Call = Callable[[], object]


def groups() -> dict[str, dict[str, Call]]:
    """What is compared, the native attack first in each group."""
    rng = np.random.default_rng(0)
    images = rng.random((_IMAGES.value, 32, 32, 3), "float32")
    keras.utils.set_random_seed(0)
    classifier = tvkeras.models.build(_MODEL.value, 10, width=_WIDTH.value)
    model = attacks.AttackedClassifier(classifier)
    labels = model.logits(images).argmax(axis=1)
    wrapped = foolbox.TensorFlowModel(classifier, bounds=(0, 1), device="/CPU:0")
    tensors = tf.constant(images), tf.constant(labels)

    def bare() -> None:
        def gradient(logits, x, y):
            return input_gradient(logits, x, lambda outputs: example_losses(outputs, y))[2]

        step = model.compiled("bare gradient", gradient)
        for _ in range(STEPS):
            step(images, labels)

    def call(attack: attacks.Attack, epsilon: float | None = None) -> Call:
        return lambda: attack(model, images, labels, epsilon=epsilon, batch_size=_IMAGES.value)

    found = {}
    for norm, epsilon in EPSILONS.items():
        peer = FOOLBOX_PGD[norm](steps=STEPS, random_start=False)
        found[f"PGD-{STEPS} {norm}"] = {
            "tvkeras": call(attacks.ProjectedGradient(norm=norm, steps=STEPS), epsilon),
            "CleverHans, adapted": call(attacks.CleverHansPGD(norm=norm, steps=STEPS), epsilon),
            "Foolbox": lambda peer=peer, epsilon=epsilon: peer(wrapped, *tensors, epsilons=epsilon),
            f"{STEPS} bare gradients": bare,
        }
    found["DDN, 100 steps"] = {
        "tvkeras": call(attacks.DecoupledDirectionNorm(steps=100)),
        "Foolbox, adapted": call(attacks.FoolboxDDN(steps=100)),
    }
    found["C&W, 50 steps, 1 weight"] = {
        "tvkeras": call(attacks.CarliniWagner(steps=50, weights=1)),
        "CleverHans, adapted": call(attacks.CleverHansCW(steps=50, search_steps=1)),
    }
    for name, member in attacks.AutoAttack(norm="linf").members(10)[1].items():
        found[f"AutoAttack's {name} linf"] = {"tvkeras": call(member, EPSILONS["linf"])}
    return found


def main(_: list[str]) -> None:
    """Print the table."""
    print(f"{_MODEL.value} of width {_WIDTH.value}, {_IMAGES.value} images in one batch")
    print(f"{'':28}{'':24}{'images/s':>10}{'x native':>10}")
    for group, methods in groups().items():
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for timed in range(_ROUNDS.value + 1):
            for name, method in methods.items():
                start = time.monotonic()
                method()
                if timed:  # the first call compiles
                    seconds[name].append(time.monotonic() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            speed = f"{_IMAGES.value / median:10.1f}{median / medians['tvkeras']:10.2f}"
            print(f"{group:28}{name:24}{speed}", flush=True)


if __name__ == "__main__":
    app.run(main)
