"""What training writes while it runs, and how it continues from it."""

import contextlib
import csv
import io
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tvkeras import backends, checkpoint, runs
from tvkeras.backends import Devices
from tvkeras.progress import Progress
from tvkeras.runs import Run

CHECK_STEPS = 20  # between looks at the loss and, of several processes, at each other's signals
# A checkpoint that took s seconds is followed by at least this many times s of training.
PAUSE_PER_COST = 50
# The best epoch is that of the highest accuracy, by the first of these that is measured.
CHOOSING = ("val_robust_accuracy", "val_noisy_accuracy", "val_accuracy")


class TrainingInterrupt(KeyboardInterrupt):
    """A signal stopped training; a checkpoint was written. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Recorder(keras.callbacks.Callback):
    """Logs, keeps the best weights and the state, and stops on a lost loss or a signal.

    The best weights are those of the highest held-out accuracy: robust or noisy, where a
    callback of `tvkeras.training.validation` measures it before, else clean.

    The state is written to `checkpoints/last` when it is due, the one before it is kept
    as `checkpoints/previous`. It holds all that the next step depends on: weights,
    optimizer, seeds, the metrics' sums, and the position in the data.

    Args:
        run: The run folder.
        checkpoint_minutes: Minutes between checkpoints inside an epoch, at least. They
            are also at least 50 times as far apart as one takes to write.
        checkpoint_steps: Steps between them instead, whatever it costs.
        devices: What trains: the first of several processes writes, and all stop together.

    Attributes:
        epoch: The epoch to go on with: 0 in a new folder.
        step: Steps of that epoch that are done.
        seconds: Training time so far, over all continuations.
        writing_seconds: The part of it that went into files.
    """

    def __init__(
        self,
        run: Run,
        *,
        checkpoint_minutes: float = 10.0,
        checkpoint_steps: int | None = None,
        devices: Devices = Devices(),  # noqa: B008 (immutable)
    ) -> None:
        super().__init__()
        self._run = run
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.writing_seconds = 0.0
        self._minutes = checkpoint_minutes
        self._steps = checkpoint_steps
        self._processes = devices.processes
        self._writes = devices.process == 0
        self._rows: list[dict[str, float]] = []
        self._metrics: list[Any] = []
        self._checked = 0
        self._cost = 0.0
        self._signal: int | None = None

    def restore(self, model: keras.Model) -> bool:
        """Sets the model to the newest whole checkpoint, and returns whether there is one.

        Several processes get the first one's, whatever is on their own disks.

        Raises:
            checkpoint.CheckpointError: If all are damaged, or of another model.
        """
        content = b""
        with backends.together():
            if self._writes:
                content = checkpoint.newest(
                    (self._run.checkpoint_path, self._run.previous_checkpoint_path)
                )
        content = backends.from_first_process(content)
        if content:
            arrays, meta = checkpoint.unpack(content, self._run.checkpoint_path)
            checkpoint.assign(_variables(model), arrays)
            self.epoch, self.step = meta["epoch"], meta["step"]
            self.seconds, self.writing_seconds = meta["seconds"], meta["writing_seconds"]
            self._rows, self._metrics = meta["log"], meta["metrics"]
        return bool(content)

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and Ctrl-C stop training after the step, with a checkpoint.

        A second one acts at once, as it would without this.

        Raises:
            TrainingInterrupt: From the training inside.
        """
        old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # only it receives signals
            old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: Any) -> None:
            self._signal = number
            signal.signal(number, old[number])

        try:
            for number in old:
                signal.signal(number, note)
            yield
            if self._signal is not None:  # it came after the last step
                self._stop(self._signal)
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts the clocks."""
        self._started = time.monotonic() - self.seconds
        self._first = (self.epoch, self.step)
        self._resumed_at = self._saved_at = time.monotonic()
        self._unsaved_steps = 0
        # Else an epoch's last call is a shorter one, which a continuation could not repeat.
        self._inside = self.params["steps"] % self.model.steps_per_execution == 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """In an epoch that is partly done, sets the metrics to their sums so far."""
        self._checked = self.step
        steps, epochs = self.params["steps"], self.params["epochs"]
        self._said = Progress(
            f"epoch {epoch + 1}/{epochs}",
            steps,
            "steps",
            done=self.step,
            shown=self._writes and not sys.stdout.isatty(),  # where Keras shows its bar
        )
        if self.step:
            for variable, value in zip(self.model.metrics_variables, self._metrics, strict=True):
                variable.assign(np.array(value))

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks at the loss every few steps, and writes a checkpoint when it is due."""
        done = batch + 1
        if done <= self.step or done >= self.params["steps"]:
            return  # done in an earlier process, or left to the end of the epoch
        self._unsaved_steps += done - self.step
        self.step = done  # (`self.model` here would synchronise JAX's state)
        self._said.update(done)
        number, logs = 0, logs or {}
        checking = done - self._checked >= CHECK_STEPS
        if self._inside and (checking or self._processes == 1):
            number = backends.maximum_of_processes(self._signal or 0)
        if checking or number:  # the same in all processes, which end at the same step
            self._checked = done
            self._check_loss(f"step {done}", logs)  # a running mean keeps a NaN
        if number or (self._inside and self._is_due() and not lost(logs)):
            try:
                self._save()
            except OSError as error:
                warnings.warn(
                    f"no checkpoint was written ({error}); {self._last_good()}. Make room, or mend "
                    "the folder's permissions, before the epoch ends.",
                    stacklevel=2,
                )
        if number:
            self._stop(number)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the log, the best weights and, when it is due, the checkpoint."""
        row = {name: float(value) for name, value in (logs or {}).items()}
        self._check_loss("its end", row)
        row = {"epoch": epoch, "learning_rate": self._learning_rate(), **row}
        chosen_by = next((name for name in CHOOSING if name in row), CHOOSING[-1])
        best = max((old.get(chosen_by, 0.0) for old in self._rows), default=-1.0)
        self._rows.append(row)
        self._unsaved_steps += self.params["steps"] - self.step
        self.epoch, self.step = epoch + 1, 0
        last = self.epoch == self.params["epochs"]
        number = backends.maximum_of_processes(self._signal or 0)
        with backends.together():
            try:
                if self._writes:
                    with self._writing():
                        checkpoint.write_atomically(self._run.log_path, _as_csv(self._rows))
                        if row.get(chosen_by, math.inf) >= best:
                            runs.save_float16(self.model.classifier, self._run.weights_path)
                if last or number or self._is_due(minutes=0.0):
                    self._save()
            except OSError as error:
                raise OSError(
                    f"{error}: the run folder cannot be written after epoch {self.epoch}. "
                    f"{self._last_good()}. Make room or mend its permissions; then the same "
                    "command goes on from there."
                ) from error
        if self._writes:
            self._report(row)
        if number:
            self._stop(number)

    def _is_due(self, minutes: float | None = None) -> bool:
        if self._steps is not None:
            return self._unsaved_steps >= self._steps
        pause = 60 * (self._minutes if minutes is None else minutes)
        return time.monotonic() - self._saved_at >= max(pause, PAUSE_PER_COST * self._cost)

    def _save(self) -> None:
        """Writes the state, if this process is the one that does."""
        if not self._writes:
            return
        started = self._saved_at = time.monotonic()
        self._unsaved_steps = 0
        self.seconds = started - self._started
        metrics = self.model.metrics_variables if self.step else []
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "writing_seconds": self.writing_seconds,
            "log": self._rows,
            "metrics": [keras.ops.convert_to_numpy(variable).tolist() for variable in metrics],
        }
        with self._writing():
            arrays = checkpoint.values(_variables(self.model))
            for name, array in arrays.items():  # BatchNorm may hide it from the loss of the step
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise self._diverged(f"{name} is not finite", self._position())
            checkpoint.save(
                self._run.checkpoint_path, arrays, meta, previous=self._run.previous_checkpoint_path
            )
        self._cost = time.monotonic() - started

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.writing_seconds += time.monotonic() - started

    def _stop(self, number: int) -> None:
        raise TrainingInterrupt(
            f"{signal.Signals(number).name} stopped training after {self._position()}. "
            f"{self._last_good()}.",
            number,
        )

    def _position(self) -> str:
        inside = f"step {self.step} of epoch {self.epoch + 1}"
        return inside if self.step else f"epoch {self.epoch}"

    def _last_good(self) -> str:
        return (
            f"Last good checkpoint: {self._run.checkpoint_path}"
            if self._run.checkpoint_path.exists()
            else "No checkpoint yet"
        )

    def _check_loss(self, where: str, logs: dict[str, Any]) -> None:
        for name, value in lost(logs).items():
            raise self._diverged(f"{name} is {value}", f"epoch {self.epoch + 1} at {where}")

    def _diverged(self, what: str, where: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what} in {where}, after {int(self.model.optimizer.iterations)} steps, at learning "
            f"rate {self._learning_rate():.3g}. {self._last_good()}. Lower the learning rate, "
            "raise fd_step, or clip the gradient (sgd.clip_norm)."
        )

    def _learning_rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _report(self, row: dict[str, float]) -> None:
        epochs, (epoch, step) = self.params["epochs"], self._first
        done = self.epoch - epoch - step / self.params["steps"]
        pace = (time.monotonic() - self._resumed_at) / done
        left = pace * (epochs - self.epoch)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
        print(
            f"epoch {self.epoch}/{epochs}  {figures}  {pace:.1f} s/epoch, {left / 60:.0f} min left",
            flush=True,
        )


def lost(logs: dict[str, Any]) -> dict[str, float]:
    """The losses in an epoch's logs that are no longer finite, by name."""
    losses = {name: float(logs[name]) for name in ("loss", "val_loss") if name in logs}
    return {name: value for name, value in losses.items() if not math.isfinite(value)}


def _variables(model: keras.Model) -> list[keras.Variable]:
    return [*model.variables, *model.optimizer.variables]


def _as_csv(rows: list[dict[str, float]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
