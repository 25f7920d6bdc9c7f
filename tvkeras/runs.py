"""The run folder: what a training run writes, and how it continues from it.

config.gin            every setting that was used, defaults included
run.json              versions, backend, seed, data checksum, and the results
log.csv               one row an epoch
tensorboard/          the same, under the TensorFlow backend
checkpoints/last      weights, optimizer, seeds, epoch: a run goes on from here
best.weights.h5       the classifier at its best held-out accuracy, as float16
"""

import csv
import difflib
import importlib.metadata
import io
import json
import math
import pathlib
import platform
import time
from typing import Any

import h5py
import keras
import numpy as np

from tvkeras import checkpoint

LOSS_CHECK_STEPS = 20


def claim(run_dir: pathlib.Path, config: str) -> None:
    """Writes `config.gin` into a new run folder, or checks that it is this one's.

    Raises:
        ValueError: With the difference, if the folder is of another configuration.
    """
    path = run_dir / "config.gin"
    if path.exists() and (known := path.read_text()) != config:
        lines = difflib.unified_diff(
            known.splitlines(), config.splitlines(), str(path), "this command", lineterm="", n=0
        )
        raise ValueError(
            f"run_dir {run_dir} holds a run of another configuration:\n"
            + "\n".join(lines)
            + "\nGo on with that configuration, or choose another --run_dir."
        )
    checkpoint.write_atomically(path, config.encode())


def describe(run_dir: pathlib.Path, **entries: Any) -> None:
    """Adds entries to the folder's `run.json`."""
    path = run_dir / "run.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    text = json.dumps({**known, **entries}, indent=2) + "\n"
    checkpoint.write_atomically(path, text.encode())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = ("tvkeras", "keras", "numpy", keras.backend.backend())
    found = {"python": platform.python_version(), "backend": keras.backend.backend()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def save_float16(classifier: keras.Model, path: pathlib.Path) -> None:
    """Saves a classifier's weights at half the size.

    The file is Keras's own `.weights.h5`; `load_weights` of the same architecture
    reads it into float32.
    """
    full = path.with_name(f".{path.stem}.full.weights.h5")
    classifier.save_weights(full)
    with h5py.File(full) as source:
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as target:
            _copy_float16(source, target)
    full.unlink()
    checkpoint.write_atomically(path, buffer.getvalue())


def _copy_float16(source: h5py.Group, target: h5py.Group) -> None:
    for name, value in source.attrs.items():
        target.attrs[name] = value
    for name, item in source.items():
        if isinstance(item, h5py.Group):
            _copy_float16(item, target.create_group(name))
        else:
            array = item[()]
            target[name] = array.astype(np.float16) if array.dtype.kind == "f" else array


class Recorder(keras.callbacks.Callback):
    """Logs, keeps the best weights and the last state, and stops on a lost loss.

    Args:
        run_dir: The run folder.

    Attributes:
        epoch: The epoch to go on with: 0 in a new folder.
        seconds: Training time so far, over all continuations.
    """

    def __init__(self, run_dir: pathlib.Path) -> None:
        super().__init__()
        self.path = run_dir / "checkpoints" / "last"
        self.best_path = run_dir / "best.weights.h5"
        self.log_path = run_dir / "log.csv"
        self.epoch = 0
        self.seconds = 0.0
        self._rows: list[dict[str, float]] = []
        self._checked = -LOSS_CHECK_STEPS

    def restore(self, model: keras.Model) -> None:
        """Sets the model to the last checkpoint, if there is one.

        Raises:
            checkpoint.CheckpointError: If it is damaged or of another model.
        """
        if self.path.exists():
            arrays, meta = checkpoint.load(self.path)
            checkpoint.assign(_variables(model), arrays)
            self.epoch, self.seconds = meta["epoch"], meta["seconds"]
            self._rows = meta["log"]

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts the clock."""
        self._started = time.monotonic() - self.seconds
        self._first_epoch = self.epoch
        self._resumed_at = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks at the loss every few steps: its running mean keeps a NaN."""
        if batch - self._checked >= LOSS_CHECK_STEPS or batch < self._checked:
            self._checked = batch
            self._check_loss(f"batch {batch}", logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the log, the best weights and the checkpoint, in this order."""
        row = {name: float(value) for name, value in (logs or {}).items()}
        self._check_loss("its end", row)
        row = {"epoch": epoch, "learning_rate": self._learning_rate(), **row}
        best = max((old.get("val_accuracy", 0.0) for old in self._rows), default=-1.0)
        self._rows.append(row)
        self.epoch = epoch + 1
        self.seconds = time.monotonic() - self._started
        checkpoint.write_atomically(self.log_path, _as_csv(self._rows))
        if row.get("val_accuracy", math.inf) >= best:
            save_float16(self.model.classifier, self.best_path)
        meta = {"epoch": self.epoch, "seconds": self.seconds, "log": self._rows}
        checkpoint.save(self.path, checkpoint.values(_variables(self.model)), meta)
        self._report(row)

    def _check_loss(self, where: str, logs: dict[str, Any]) -> None:
        lost = {name: float(logs[name]) for name in ("loss", "val_loss") if name in logs}
        lost = {name: value for name, value in lost.items() if not math.isfinite(value)}
        for name, value in lost.items():
            kept = f"{self.path} (epoch {self.epoch})" if self.path.exists() else "none yet"
            raise FloatingPointError(
                f"{name} is {value} in epoch {self.epoch + 1} at {where}, after "
                f"{int(self.model.optimizer.iterations)} steps, at learning rate "
                f"{self._learning_rate():.3g}. Last good checkpoint: {kept}. Lower the learning "
                "rate, raise fd_step, or clip the gradient (sgd.clip_norm)."
            )

    def _learning_rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _report(self, row: dict[str, float]) -> None:
        epochs = self.params["epochs"]
        pace = (time.monotonic() - self._resumed_at) / (self.epoch - self._first_epoch)
        left = pace * (epochs - self.epoch)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
        print(
            f"epoch {self.epoch}/{epochs}  {figures}  {pace:.1f} s/epoch, {left / 60:.0f} min left",
            flush=True,
        )


def _variables(model: keras.Model) -> list[keras.Variable]:
    return [*model.variables, *model.optimizer.variables]


def _as_csv(rows: list[dict[str, float]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
