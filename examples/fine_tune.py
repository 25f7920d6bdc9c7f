"""Fine-tunes a classifier of the zoo on another data set, and keeps its defence.

    export TF_ENABLE_ONEDNN_OPTS=1  # faster on CPUs without AVX-512 VNNI
    python examples/fine_tune.py [--epochs=3] [--output=digits_from_cifar.keras]

The network was trained on CIFAR-10; its new task is scikit-learn's digits, enlarged to 32
by 32 pixels. The last layer is new, the others go on from their published weights, and
the penalty is the one they were trained with. Without it, fine-tuning forgets part of the
robustness: the script trains both ways and prints both.
"""

import dataclasses

import keras
import numpy as np
from absl import app, flags

import tvkeras
from tvkeras import data, zoo

ENTRY = "airbench_tv_lip"
DEFENSES = {
    "without penalty": tvkeras.Undefended(),
    "TV + Lipschitz": tvkeras.TVLipschitz(tv_weight=0.1, lipschitz_weight=7.8e-4, fd_step=0.1),
}

QUICK_CHECK = {
    "norm": "l2",
    "epsilons": (0.5, 1.0),
    "suite": [tvkeras.attacks.ProjectedGradient(steps=20)],
    "audited_images": 0,
}


def enlarged(examples: data.Examples) -> data.Examples:
    """Digits of shape `(8, 8, 1)` as images of shape `(32, 32, 3)`."""
    images = examples.images.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    return dataclasses.replace(examples, images=images)


def with_new_head(classifier: keras.Model, num_classes: int) -> keras.Model:
    """The same network with a last layer for other classes."""
    features = classifier.get_layer("dense").input
    return keras.Model(classifier.input, keras.layers.Dense(num_classes)(features))


def fine_tune(defense: tvkeras.Defense, training: data.Examples, epochs: int) -> keras.Model:
    """The zoo's classifier after `epochs` of the new data."""
    keras.utils.set_random_seed(0)
    classifier = with_new_head(zoo.load(ENTRY), training.num_classes)
    robust = tvkeras.RobustClassifier(classifier, defense)
    robust.compile(keras.optimizers.SGD(0.02, momentum=0.9), metrics=["accuracy"])
    robust.fit(data.Batches(training, 32, seed=0), epochs=epochs, shuffle=False, verbose=2)
    return classifier


def main(_: list[str]) -> None:
    """Trains with and without the penalty, prints the errors, saves the robust one."""
    given = flags.FLAGS
    training = enlarged(data.load("digits", "train"))
    test = enlarged(data.load("digits", "test")).take(np.arange(200), "first 200")
    if given.images:
        training = training.take(np.arange(given.images), "few")
        test = test.take(np.arange(min(given.images, len(test))), "few")
    for name, defense in DEFENSES.items():
        classifier = fine_tune(defense, training, given.epochs)
        print(tvkeras.benchmark(classifier, test.images, test.labels, name=name, **QUICK_CHECK))
    classifier.save(given.output)
    print(f"saved: {given.output}")


if __name__ == "__main__":
    flags.DEFINE_integer("epochs", 3, "Of each way.")
    flags.DEFINE_integer("images", None, "To train on, and to test on; default: all, and 200.")
    flags.DEFINE_string("output", "digits_from_cifar.keras", "File of the robust one.")
    app.run(main)
