"""A small training run that can be killed: `python -m tests.resumable RUN_DIR [WHERE NUMBER]`."""

import os
import pathlib
import random
import signal
import sys

import keras
from keras import layers

import tvkeras
from tvkeras import checkpoint, runs
from tvkeras.training.averaging import Lookahead
from tvkeras.training.losses import SmoothedCrossentropy
from tvkeras.training.recorder import Recorder
from tvkeras.training.validation import RobustValidation

EPOCHS, STEPS = 3, 10
AUGMENTATION = tvkeras.data.Augmentation(
    crop=1, fill="reflect", flip="alternating", cutout=2, noise=0.1
)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def train(run_dir, end=None, steps_per_execution=1, checkpoint_steps=4, rate=0.1):
    """Trains, or goes on; `end` is called after each step and around each replaced file."""
    data = tvkeras.data.load("digits").take(range(8 * STEPS), "few")
    random.seed(0)
    images = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3)(images)
    x = layers.BatchNormalization()(x)
    x = layers.Flatten()(layers.Activation("gelu")(x))
    x = layers.Dropout(0.3)(x)
    classifier = keras.Model(images, layers.Dense(10)(x))
    robust = tvkeras.RobustClassifier(
        classifier,
        tvkeras.TVLipschitz(lipschitz_weight=0.1, fd_step=0.1),
        augmentation=AUGMENTATION,
        averaging=Lookahead(steps=EPOCHS * STEPS, every=4),
        ramp_steps=13,
    )
    rate = keras.optimizers.schedules.CosineDecay(rate, EPOCHS * STEPS)
    robust.compile(
        keras.optimizers.SGD(rate, momentum=0.9, use_ema=True, ema_overwrite_frequency=7),
        loss=SmoothedCrossentropy(0.1),
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
    )
    robust.optimizer.build(robust.trainable_variables)
    recorder = Recorder(runs.Run(pathlib.Path(run_dir)), checkpoint_steps=checkpoint_steps)
    recorder.restore(robust)
    held_out = tvkeras.data.Batches(data, 8)
    callbacks = [RobustValidation(held_out, norm="l2", epsilon=0.2), recorder]
    replace = os.replace
    if end is not None:
        step = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda *_, **__: end("step"),
            on_epoch_end=lambda *_, **__: end("epoch"),
        )
        callbacks.append(step)

        def replace_or_end(*arguments):
            end("write")
            replace(*arguments)

        checkpoint.os.replace = replace_or_end
    try:
        if recorder.epoch < EPOCHS:
            with recorder.catching_signals():
                robust.fit(
                    tvkeras.data.Batches(data, 8, seed=0, augmentation=AUGMENTATION),
                    validation_data=held_out,
                    epochs=EPOCHS,
                    initial_epoch=recorder.epoch,
                    initial_step=recorder.step,
                    callbacks=callbacks,
                    shuffle=False,
                    verbose=0,
                )
    finally:
        checkpoint.os.replace = replace
    return robust


def ending(where, number, stop):
    """Calls `stop` the `number`-th time that `where` comes by."""
    left = [int(number)]

    def end(here):
        if here == where:
            left[0] -= 1
            if left[0] == 0:
                stop()

    return end


if __name__ == "__main__":
    train(sys.argv[1], ending(*sys.argv[2:], kill) if sys.argv[2:] else None)
