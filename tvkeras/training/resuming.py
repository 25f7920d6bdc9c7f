"""Training that begins inside an epoch."""

import itertools
from typing import Any

import keras


def check(model: keras.Model, x: Any, initial_step: int) -> None:
    """Raises ValueError unless training can begin after `initial_step` steps of an epoch."""
    if not initial_step:
        return
    if initial_step % model.steps_per_execution or not hasattr(x, "begin_epoch"):
        raise ValueError(
            "initial_step must be a multiple of steps_per_execution="
            f"{model.steps_per_execution}, with an x that has begin_epoch (such as "
            f"tvkeras.data.Batches), got initial_step={initial_step}, x={x!r}."
        )
    if len(x) % model.steps_per_execution:
        raise ValueError(
            f"steps_per_execution must divide the {len(x)} steps of an epoch to go on inside "
            f"one, got steps_per_execution={model.steps_per_execution}: the last call of an "
            "epoch would do more steps than are left."
        )


class EpochStarter(keras.callbacks.Callback):
    """Tells the data which epoch begins, and passes over the steps of it that are done."""

    def __init__(self, batches: Any, initial_step: int) -> None:
        super().__init__()
        self._batches = batches
        self._done = initial_step

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Orders the data; in a first epoch that is partly done, skips its steps."""
        self._batches.begin_epoch(epoch, self._done)
        if self._done:
            self._pass_over(self._done // self.model.steps_per_execution)
            self._done = 0

    def _pass_over(self, count: int) -> None:
        """Keras counts an epoch's steps from 0, and has no other place to begin at."""
        model, step = self.model, self.model.train_function
        left = itertools.chain([True] * count, itertools.repeat(False))

        def passing(*arguments: Any) -> Any:
            if next(left):  # the arguments end in the data; what precedes is JAX's state
                return ({}, *arguments[:-1]) if arguments[1:] else {}
            model.train_function = step
            return step(*arguments)

        model.train_function = passing
