"""The public functions that take a classifier, images and labels, called alike."""

import functools
import importlib.util

import keras
import numpy as np
from keras import layers

import tvkeras
from tests.conftest import BACKEND
from tvkeras import attacks, bounds, evaluation
from tvkeras.detection import GradientNormDetector, gradient_norms
from tvkeras.evaluation import suite, trials
from tvkeras.inference import CompiledClassifier, loss_statistics

COUNT, SHAPE, CLASSES = 6, (4, 4, 1), 4
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8)
IMAGES = PIXELS.astype("float32") / 255
LABELS = np.arange(COUNT) % CLASSES


def network(before=(), after=()):
    """A classifier of tiny images with the same weights at every call."""
    keras.utils.set_random_seed(1)
    hidden = [layers.Flatten(), layers.Dense(8, activation="softplus"), layers.Dense(CLASSES)]
    return keras.Sequential([keras.Input(SHAPE), *before, *hidden, *after])


@functools.cache
def shared():
    """What all cases attack: compiled once."""
    return CompiledClassifier(network())


@functools.cache
def trained():
    """What all cases train, by a learning rate of 0."""
    robust = tvkeras.RobustClassifier(network(), tvkeras.TVLipschitz(fd_step=0.1))
    robust.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    return robust


# ---- (model, images, labels) -> what it answers --------------------------------------------

NATIVE = {
    "pgd": attacks.ProjectedGradient(steps=2),
    "apgd": attacks.AutoPGD(steps=3),
    "apgd-t": attacks.AutoPGD(loss="targeted_dlr", steps=3),
    "fab": attacks.FastAdaptiveBoundary(norm="l2", steps=2),
    "square": attacks.Square(queries=3),
    "autoattack": attacks.AutoAttack(),
    "ddn": attacks.DecoupledDirectionNorm(steps=3),
    "fmn": attacks.FastMinimumNorm(steps=3),
    "cw": attacks.CarliniWagner(steps=3, search_steps=2),
    "evasive": attacks.EvasiveCarliniWagner(steps=3, search_steps=1, threshold=1.0),
}


def attacking(attack):
    radius = {"epsilon": 0.1} if attack.fixed_epsilon else {}
    return lambda model, images, labels: attack(model, images, labels, **radius)


DETECTOR = GradientNormDetector(norm="l2", statistic="loss", threshold=0.3)
TRIALS = [trials.Trial(name="pgd", attack=NATIVE["pgd"], epsilons=(0.1,), images=4)]
BRIEF = {
    "epsilons": {"l2": (0.1,)},
    "suite": TRIALS,
    "audited_images": 0,
    "corruptions": False,
}
FIT = {"batch_size": 2, "verbose": 0, "shuffle": False}

LABELLED = {
    **{name: attacking(attack) for name, attack in NATIVE.items()},
    "loss_statistics": lambda m, x, y: loss_statistics(m, x, y, "l2"),
    "estimated": bounds.estimated_bound,
    "audit": lambda m, x, y: evaluation.audit(m, x, y, norm="l2", epsilons=(0.1,), steps=2),
    "benchmark": lambda m, x, y: tvkeras.benchmark(m, x, y, **BRIEF),
    "suite": lambda m, x, y: suite.run(m, x, y, TRIALS)[0].results[0.1],
}
UNLABELLED = {
    "gradient_norms": lambda m, x, _: gradient_norms(m, x, "l2", "model"),
    "scores": lambda m, x, _: DETECTOR.scores(m, x),
    "detects": lambda m, x, _: DETECTOR.detects(m, x),
    "detector": lambda m, x, _: GradientNormDetector.fit(m, x, 0.3),
    "smoothed": lambda m, x, _: bounds.Smoothed(m, 0.1).certify(x, samples=20),
}
TRAINED = {
    "fit": lambda m, x, y: trained().fit(x, y, **FIT).history["loss"],
    "validation": lambda m, x, y: (
        trained().fit(IMAGES, LABELS, validation_data=(x, y), **FIT).history["val_loss"]
    ),
    "evaluate": lambda m, x, y: trained().evaluate(x, y, verbose=0, return_dict=True)["loss"],
}


# Others' attacks are met by bad input alone; their own tests feed them.
OTHERS = {}
if BACKEND == "tensorflow":
    for name, home in attacks.TENSORFLOW_ATTACKS.items():
        if home == "cleverhans" or importlib.util.find_spec("foolbox"):
            norm = {"norm": "linf"} if name == "CleverHansSPSA" else {}
            OTHERS[name] = attacking(getattr(attacks, name)(**norm))

ENTRIES = {**LABELLED, **UNLABELLED, **TRAINED}
# What computes here: the dear ones have tests of their own, and JAX gets one of each family.
COMPUTED = [name for name in ENTRIES if name not in ("audit", "autoattack")]
if BACKEND != "tensorflow":
    COMPUTED = ["pgd", "fmn", "benchmark", "scores", "smoothed", "fit"]


def numbers(result):
    """All numbers of a result, in one order."""
    if hasattr(result, "__dataclass_fields__"):
        result = [getattr(result, field) for field in result.__dataclass_fields__]
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [number for part in result for number in numbers(part)]
    if isinstance(result, str) or result is None:
        return []
    array = np.asarray(result)
    return array.ravel().tolist() if array.dtype.kind in "biuf" else []
