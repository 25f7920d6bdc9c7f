"""A card of a network of keras.applications, with its own preprocessing inside.

    python examples/benchmark_keras_application.py [--images=60] [--output=mobilenet_card]

The network starts from random weights (nothing is downloaded) and is trained on scikit-learn's
digits, enlarged to 32 by 32 pixels, in seconds. It takes pixels from 0 to 255, which `bounds`
says, and ends in a softmax, which `tvkeras.logits` takes off.
"""

import argparse

import keras
import numpy as np

import tvkeras
from tvkeras import data


def enlarged(images: np.ndarray) -> np.ndarray:
    """Digits of shape `(8, 8, 1)` as images of shape `(32, 32, 3)`."""
    return images.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)


def trained(epochs: int) -> keras.Model:
    """MobileNet, with its preprocessing inside, as Keras builds it and as anybody trains it."""
    digits = data.load("digits", "train")
    keras.utils.set_random_seed(0)
    images = keras.Input((32, 32, 3))
    network = keras.applications.MobileNet((32, 32, 3), alpha=0.25, weights=None, classes=10)
    scaled = keras.layers.Rescaling(1 / 127.5, offset=-1)(images)
    model = keras.Model(images, network(scaled), name="mobilenet")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(enlarged(digits.images), digits.labels, epochs=epochs, batch_size=32, verbose=2)
    return model


def main() -> None:
    """Trains, benchmarks, prints the card and saves its page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=60, help="Test images to attack.")
    parser.add_argument("--output", default="mobilenet_card")
    given = parser.parse_args()

    test = data.load("digits", "test")
    card = tvkeras.benchmark(
        tvkeras.logits(trained(given.epochs)),
        enlarged(test.images),
        test.labels,
        norm="l2",
        epsilons=(0.5, 1.0),
        suite="quick",
        bounds=(0, 255),
        attacked_images=given.images,
        audited_images=given.images,
        dataset="digits, enlarged",
        progress=True,
    )
    print(card)
    card.save(given.output)
    print(f"card: {given.output}/README.md")


if __name__ == "__main__":
    main()
