import gc
import pathlib

import keras
import numpy as np
import pytest

import tvkeras
from tvkeras.runs import Run
from tvkeras.training.recorder import Recorder

EPOCHS, STEPS = 6, 1000


def resident_mib():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
def test_thousands_of_steps_neither_retrace_nor_grow(tmp_path, digits):
    traced, traces, objects, memory = [], [], [], []

    class Counted(tvkeras.TVLipschitz):
        def update(self, batch):
            traced.append(1)
            return super().update(batch)

    class Census(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            gc.collect()
            traces.append(len(traced))
            objects.append(len(gc.get_objects()))
            memory.append(resident_mib())

    train = digits[0].take(np.arange(STEPS), "few")
    robust = tvkeras.RobustClassifier(
        tvkeras.models.build("small_cnn", 10, width=2),
        Counted(lipschitz_weight=0.1, fd_step=0.1),
        augmentation=tvkeras.data.Augmentation(crop=1, cutout=2),
    )
    robust.compile(keras.optimizers.SGD(1e-3), metrics=["accuracy"], steps_per_execution=10)
    robust.fit(
        tvkeras.data.Batches(train, 1, seed=0),
        validation_data=tvkeras.data.Batches(train, 100),
        epochs=EPOCHS,
        callbacks=[Recorder(Run(tmp_path), checkpoint_steps=500), Census()],
        shuffle=False,
        verbose=0,
    )
    assert int(robust.optimizer.iterations) == EPOCHS * STEPS
    assert traces == [traces[0]] * EPOCHS
    # A leak of one a step would be 4,000; other tests' leftovers come and go by a thousand.
    assert objects[-1] - objects[1] < STEPS * (EPOCHS - 2) / 2
    assert memory[-1] - memory[1] < 30
