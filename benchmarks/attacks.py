"""Images a second of the same attacks, native, adapted and by other libraries.

    python -m benchmarks.attacks [--images=250] [--entry=airbench_tv_lip]

On noisy copies of the probe images of a zoo entry, with the labels that it gives them:
every attack has to work on all of them. Times are medians of rounds in which all
attacks take turns; "x first" is a method's time over that of the first in its group,
the native one where there is one, on the wall and in CPU time, which other work on the
machine disturbs less. Other libraries are called directly, ART and
torchattacks (on a PyTorch copy of the network) where they are installed.
"""

import contextlib
from collections.abc import Callable

import foolbox
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from benchmarks.common import Clock, described
from tvkeras import attacks, zoo
from tvkeras.inference import CompiledClassifier, example_losses, input_gradient

EPSILONS = {"l2": 0.5, "linf": 8 / 255}
STEPS = 20
FOOLBOX_PGD = {"l2": foolbox.attacks.L2PGD, "linf": foolbox.attacks.LinfPGD}

_ENTRY = flags.DEFINE_string("entry", "airbench_tv_lip", "An entry of the zoo.")
_IMAGES = flags.DEFINE_integer("images", 250, "Images, one batch.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed calls of each.")

Call = Callable[[], object]


def groups() -> dict[str, dict[str, Call]]:
    """What is compared, the native attack first in each group."""
    with np.load(zoo.store.folder(_ENTRY.value, "probe.npz") / "probe.npz") as probe:
        images = np.resize(probe["images"] / 255, (_IMAGES.value, *probe["images"].shape[1:]))
    noise = np.random.default_rng(0).normal(0, 0.02, images.shape)
    images = np.clip(images + noise, 0, 1).astype("float32")
    classifier = zoo.load(_ENTRY.value)
    model = CompiledClassifier(classifier)
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
            **other_pgd(classifier, images, labels, norm),
        }
    found["DDN, 100 steps"] = {
        "tvkeras": call(attacks.DecoupledDirectionNorm(steps=100)),
        "Foolbox": lambda: foolbox.attacks.DDNAttack(steps=100)(wrapped, *tensors, epsilons=None),
    }
    found["C&W, 50 steps, 1 weight"] = {
        "tvkeras": call(attacks.CarliniWagner(steps=50, search_steps=1)),
        "CleverHans, adapted": call(attacks.CleverHansCW(steps=50, search_steps=1)),
    }
    boundary = attacks.FoolboxBoundary(steps=STEPS)
    upstream = boundary.attack(images.shape)
    starts = boundary.prepared(model, images, labels)[1]
    found[f"Boundary, {STEPS} steps"] = {
        "Foolbox, adapted": call(boundary),
        "Foolbox": lambda: upstream(
            wrapped, *tensors, starting_points=tf.constant(starts), epsilons=None
        ),
    }
    for name, member in attacks.AutoAttack(norm="linf").members(10)[1].items():
        found[f"AutoAttack's {name} linf"] = {"tvkeras": call(member, EPSILONS["linf"])}
    return found


def other_pgd(
    classifier: keras.Model, images: np.ndarray, labels: np.ndarray, norm: str
) -> dict[str, Call]:
    """PGD of the other libraries that are installed."""
    epsilon, found = EPSILONS[norm], {}
    with contextlib.suppress(ImportError):
        from art.attacks.evasion import ProjectedGradientDescentTensorFlowV2
        from art.estimators.classification import TensorFlowV2Classifier

        estimator = TensorFlowV2Classifier(
            classifier,
            nb_classes=classifier.output_shape[1],
            input_shape=images.shape[1:],
            loss_object=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            clip_values=(0, 1),
        )
        order = {"l2": 2, "linf": np.inf}[norm]
        settings = {"eps": epsilon, "eps_step": epsilon / 8, "batch_size": len(images)}
        art = ProjectedGradientDescentTensorFlowV2(
            estimator, order, max_iter=STEPS, verbose=False, **settings
        )
        found["ART"] = lambda: art.generate(images, labels)
    with contextlib.suppress(ImportError):
        import torch
        import torchattacks

        from benchmarks.autoattack_torch import Network, set_fastest

        network = Network(*described(classifier))
        tensors = torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
        set_fastest(network, *tensors)
        kind = {"l2": torchattacks.PGDL2, "linf": torchattacks.PGD}[norm]
        pgd = kind(network, epsilon, epsilon / 8, STEPS, random_start=False)
        found["torchattacks"] = lambda: pgd(*tensors)
    return found


def main(_: list[str]) -> None:
    """Print the table."""
    print(f"{_ENTRY.value}, {_IMAGES.value} images in one batch")
    print(f"{'':28}{'':24}{'images/s':>10}{'x first':>10}{'in CPU':>8}")
    for group, methods in groups().items():
        seconds: dict[str, list[np.ndarray]] = {name: [] for name in methods}
        for timed in range(_ROUNDS.value + 1):
            for name, method in methods.items():
                clock = Clock()
                clock.timed(name, method)()
                if timed:  # the first call compiles
                    seconds[name].append(clock.seconds[name])
        medians = {name: np.median(times, axis=0) for name, times in seconds.items()}
        first = next(iter(medians.values()))
        for name, median in medians.items():
            wall, cpu = median / first
            speed = f"{_IMAGES.value / median[0]:10.1f}{wall:10.2f}{cpu:8.2f}"
            print(f"{group:28}{name:24}{speed}", flush=True)


if __name__ == "__main__":
    app.run(main)
