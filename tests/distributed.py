"""A few training steps on some devices: `python -m tests.distributed OUT JSON`.

JSON: `local`, the virtual devices of this process, and `runs`, by name the arguments of
`train`, or of what `RUNS` has for the name's first word; OUT gets each run's weights and logs.
"""

import json
import os
import random
import signal
import sys

SETTINGS = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
os.environ["JAX_ENABLE_X64"] = "1"
DEVICES = f"--xla_force_host_platform_device_count={SETTINGS.get('local', 2)}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}"

import keras
import numpy as np

import tvkeras
from tests.conftest import net, prepared
from tests.resumable import ending, kill
from tvkeras import backends, config, data
from tvkeras.training import recorder
from tvkeras.training.averaging import Lookahead
from tvkeras.training.loop import train as tvkeras_train

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from tvkeras.training import mirrored

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )

DEFENSES = {
    "tv_lip": lambda: tvkeras.TVLipschitz(lipschitz_weight=0.5, fd_step=0.1),
    "double_backprop": lambda: tvkeras.TVLipschitz(lipschitz_weight=0.5, method="double_backprop"),
    "central": lambda: tvkeras.TVLipschitz(lipschitz_weight=0.5, fd_step=0.1, scheme="central"),
    "fraction": lambda: tvkeras.TVLipschitz(fd_step=0.1, penalty_fraction=0.5),
    "every": lambda: tvkeras.TVLipschitz(fd_step=0.1, penalty_every=2),
    "pgd": lambda: tvkeras.AdversarialTraining(norm="l2", epsilon=0.5, random_start=False),
}


def train(
    *,
    devices="all",
    defense="tv_lip",
    dtype="float64",
    steps=4,
    epochs=2,
    batch_norm=False,
    dropout=0.0,
    optimizer=None,
    compile_arguments=None,
    uneven=False,
    lookahead=False,
    ramp_steps=0,
):
    """Weights, statistics and logs after `steps` steps of 16 images."""
    rng = np.random.default_rng(0)
    examples = data.Examples(
        name="random",
        split="train",
        images=rng.integers(0, 256, (16 * steps, 6, 6, 2)).astype("uint8"),
        labels=rng.integers(0, 4, 16 * steps),
        num_classes=4,
        checksum="",
    )
    with backends.spread(devices) as spread:
        random.seed(0)
        classifier = net(dtype=dtype, batch_norm=batch_norm, dropout=dropout)
        rng = np.random.default_rng(1)
        classifier.set_weights(
            [w + rng.normal(size=w.shape, scale=0.1) ** 2 for w in classifier.get_weights()]
        )
        robust = tvkeras.RobustClassifier(
            classifier,
            DEFENSES[defense](),
            averaging=Lookahead(steps=steps * epochs, every=3) if lookahead else None,
            ramp_steps=ramp_steps,
            dtype=classifier.dtype,
        )
        robust.compile(
            keras.optimizers.SGD(0.1, momentum=0.9, **(optimizer or {})),
            metrics=["accuracy"],
            **(compile_arguments or {}),
        )
        validation = data.Batches(examples.take(np.arange(12), "few"), 8, devices=spread)
        batches = data.Batches(examples, 16, seed=0, devices=spread)
        if uneven:
            batches = tf.data.Dataset.from_tensor_slices((examples.images, examples.labels))
            batches = batches.take(16 * steps - 1).batch(16)
        history = robust.fit(
            batches,
            epochs=epochs,
            validation_data=validation,
            shuffle=False,
            verbose=0,
        ).history
        weights = robust.classifier.get_weights()
    return weights, history


def drawn(devices="all"):
    """One random number of each TensorFlow replica, whose seeds' states are equal."""
    with backends.spread(devices):
        strategy = tf.distribute.get_strategy()

        def draw():
            state = mirrored.own_seed(tf.constant([5, 0], tf.int64))
            return tf.random.stateless_uniform((1,), state)

        values = strategy.experimental_local_results(strategy.run(draw))
    return [np.concatenate([value.numpy() for value in values])], {}


def imagenet(run_dir, builder_dir, kill_at=None):
    """`gin/imagenet_tv.gin` on a few small images, streamed, until a kill."""
    builder = prepared(builder_dir, range(40, 60))
    data.arrays.prepared_builder = lambda name, download=False: builder
    if kill_at is not None:
        end = ending("step", kill_at, kill)
        recorder.Recorder.on_train_batch_begin = lambda *_, **__: end("step")
    settings = {
        "Network.name": "'small_cnn'",
        "Network.arguments": "{'width': 4, 'activation': 'softplus'}",
        "Task.image_size": 8,
        "Recipe.batch_size": 16,
        "Recipe.epochs": 2,
        "Task.validation_fraction": 0.05,
        "Task.attacked_images": 10,
        "Execution.checkpoint_steps": 1,
        "Execution.devices": "'all'",
    }
    bindings = [f"{name}={value}" for name, value in settings.items()]
    config.bind(["gin/imagenet_tv.gin"], bindings)
    tvkeras_train(run_dir, **config.settings())
    return [], {}


def digits(run_dir, signal_at=None):
    """A run of digits through `train`; `signal_at` a step this process gets SIGTERM."""
    if signal_at is not None:
        end = ending("step", signal_at, lambda: signal.raise_signal(signal.SIGTERM))
        recorder.Recorder.on_train_batch_begin = lambda *_, **__: end("step")
    settings = {
        "Network.arguments": "{'width': 4, 'activation': 'softplus'}",
        "Recipe.batch_size": 16,
        "Recipe.epochs": 1,
        "Task.attacked_images": 10,
        "Execution.devices": "'all'",
    }
    config.bind(["gin/digits_tv_lip.gin"], [f"{name}={value}" for name, value in settings.items()])
    tvkeras_train(run_dir, **config.settings())
    return [], {}


def refused(**arguments):
    """The message of the error that `train` ends in, on TensorFlow."""
    try:
        train(**arguments)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        return [np.array(str(error))], {}
    raise AssertionError(f"{arguments} was not refused.")


RUNS = {"drawn": drawn, "imagenet": imagenet, "digits": digits, "refused": refused}

if __name__ == "__main__":
    results = {}
    for name, arguments in SETTINGS["runs"].items():
        try:
            weights, history = RUNS.get(name.partition(" ")[0], train)(**arguments)
        except recorder.TrainingInterrupt as interruption:
            sys.exit(128 + interruption.number)
        results |= {f"{name}/{index}": array for index, array in enumerate(weights)}
        results |= {f"{name}/{key}": values for key, values in history.items()}
    np.savez(sys.argv[1], **results)
