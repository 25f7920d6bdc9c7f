"""The run folder: what a training run writes, and how its classifier is read."""

import contextlib
import dataclasses
import difflib
import fcntl
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import re
import socket
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import keras
import numpy as np

from tvkeras import checkpoint, models
from tvkeras.defenses import Defense

# Settings that change how a run is kept and measured, not what it trains: a continuation may
# differ in them.
FREE_SETTINGS = (
    "Execution.checkpoint_minutes",
    "Execution.checkpoint_steps",
    "Task.attacked_images",
    "Task.download",
    "Task.epsilons",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder, and the names of the files in it.

    Attributes:
        folder: The folder, of a run that is finished or not; `open` asks for a finished one.
    """

    folder: pathlib.Path

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Run":
        """A finished run, whose classifier can be read.

        Raises:
            ValueError: If the folder is no finished run of this version.
            checkpoint.DamagedError: If its `run.json` is no JSON object.
        """
        run = cls(pathlib.Path(folder))
        if not run.about_path.exists() or not run.weights_path.exists():
            raise ValueError(
                f"model must be the folder of a finished run, with {run.about_path.name} and "
                f"{run.weights_path.name}, or a name of tvkeras.zoo.names(), got {str(folder)!r}. "
                f"Train one: python -m tvkeras.train --run_dir={folder} ..."
            )
        if missing := {"model", "model_arguments", "num_classes"} - run.about.keys():
            raise ValueError(
                f"{run.about_path} lacks {sorted(missing)}: it was written by an older tvkeras."
            )
        return run

    # ---- Files -------------------------------------------------------------------------
    @property
    def config_path(self) -> pathlib.Path:
        """Every setting that was used, defaults included, as gin."""
        return self.folder / "config.gin"

    @property
    def about_path(self) -> pathlib.Path:
        """Network, defence, data, versions, backend, seed, and the results, as JSON."""
        return self.folder / "run.json"

    @property
    def log_path(self) -> pathlib.Path:
        """One row an epoch, as CSV."""
        return self.folder / "log.csv"

    @property
    def tensorboard_path(self) -> pathlib.Path:
        """The same, under the TensorFlow backend."""
        return self.folder / "tensorboard"

    @property
    def checkpoint_path(self) -> pathlib.Path:
        """The newest weights, optimizer, seeds and position in the data."""
        return self.folder / "checkpoints" / "last"

    @property
    def previous_checkpoint_path(self) -> pathlib.Path:
        """The checkpoint before it."""
        return self.folder / "checkpoints" / "previous"

    @property
    def weights_path(self) -> pathlib.Path:
        """The classifier at its best held-out accuracy (robust, if measured), as float16."""
        return self.folder / "best.weights.h5"

    @property
    def lock_path(self) -> pathlib.Path:
        """Held by the process that trains in the folder."""
        return self.folder / "lock"

    # ---- Reading -----------------------------------------------------------------------
    @property
    def about(self) -> dict[str, Any]:
        """What `run.json` says; nothing where there is none.

        Raises:
            checkpoint.DamagedError: If it is no JSON object.
        """
        if not self.about_path.exists():
            return {}
        try:
            about, why = json.loads(self.about_path.read_bytes()), "it holds no JSON object"
        except (ValueError, RecursionError) as error:
            about, why = None, str(error)
        if isinstance(about, dict):
            return about
        raise checkpoint.DamagedError(
            f"{self.about_path} is damaged: {why}. Restore it, or train again in another --run_dir."
        )

    @property
    def defense(self) -> Defense:
        """What the run minimised.

        Raises:
            ValueError: If `run.json` names no defence of this version.
        """
        stored = self.about.get("defense")
        try:
            found = keras.saving.deserialize_keras_object(stored)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.about_path} names no defence: {error}") from error
        if not isinstance(found, Defense):
            raise ValueError(f"{self.about_path} names no defence: {stored!r}.")
        return found

    def classifier(self) -> keras.Model:
        """The run's classifier at its best epoch.

        Raises:
            ValueError: If `run.json` describes no network.
            checkpoint.CheckpointError: As `load_weights`.
        """
        about = self.about
        try:
            classifier = models.build(
                about["model"], about["num_classes"], **about["model_arguments"]
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.about_path} describes no network that can be built: {error}"
            ) from error
        load_weights(classifier, self.weights_path)
        return classifier

    # ---- Writing -----------------------------------------------------------------------
    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out of the folder; the lock dies with its process.

        Raises:
            ValueError: If another process is in the folder; names it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.lock_path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"run_dir {self.folder} is in use by {file.read().strip() or 'another process'}"
                    ". Wait for it, stop it, or choose another --run_dir."
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            for folder in (self.folder, self.checkpoint_path.parent):
                for unfinished in folder.glob(f"*{checkpoint.UNFINISHED}"):  # a killed process's
                    unfinished.unlink()
            yield

    def claim(
        self, config: str, facts: Mapping[str, Any], machine: Mapping[str, str] | None = None
    ) -> None:
        """Writes the configuration and `facts`, or checks that the folder is of this run.

        Args:
            config: The gin configuration.
            facts: What else decides the run's result, as JSON holds it, by name.
            machine: What this machine chose, kept among the versions: a run may go on with
                others, with a warning.

        Raises:
            ValueError: With the difference, if the folder is of another configuration.
        """
        path = self.config_path
        known = _binding(path.read_text() if path.exists() else config)
        ours = _binding(config)
        lines = [*difflib.unified_diff(known, ours, str(path), "this command", lineterm="", n=0)]
        facts = dict(json.loads(json.dumps(facts)))
        about = self.about
        for name in facts.keys() & about.keys():
            if facts[name] != about[name]:
                lines += [f"-{name} = {about[name]}", f"+{name} = {facts[name]}"]
        if lines:
            raise ValueError(
                f"run_dir {self.folder} holds a run of another configuration:\n"
                + "\n".join(lines)
                + "\nGo on with that configuration, or choose another --run_dir."
            )
        checkpoint.write_atomically(path, config.encode())
        found = {**versions(), **(machine or {})}
        earlier = about.get("versions", found)
        if earlier != found:
            warnings.warn(
                f"{self.folder} was begun with {earlier}; it goes on with {found}, and may end in "
                "slightly other numbers than an uninterrupted run.",
                stacklevel=2,
            )
            facts["earlier_versions"] = [*about.get("earlier_versions", []), earlier]
        self.describe(**facts, versions=found)

    def describe(self, **entries: Any) -> None:
        """Adds entries to `run.json`."""
        text = json.dumps({**self.about, **entries}, indent=2) + "\n"
        checkpoint.write_atomically(self.about_path, text.encode())


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the packages that a result depends on, and of `more` packages."""
    packages = ("tvkeras", "keras", "numpy", keras.backend.backend(), *more)
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


def load_weights(classifier: keras.Model, path: pathlib.Path) -> None:
    """Sets a classifier to the weights in a `.weights.h5` file, whose names and shapes must fit.

    Raises:
        checkpoint.DamagedError: If the file cannot be read.
        checkpoint.CheckpointError: If it holds other weights, or more than numbers; the
            message shows the difference.
    """
    own = _MemoryFile()
    classifier.save_weights(own)
    try:
        checkpoint.require_fit(_shapes(own), _shapes(path), str(path))
        classifier.load_weights(path)
    except checkpoint.CheckpointError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, SystemError) as error:  # h5py's, on damage
        raise checkpoint.DamagedError(f"{path} cannot be read as Keras weights: {error}") from error


class _MemoryFile(io.BytesIO):
    """A file in memory whose name Keras accepts as that of weights."""

    def __str__(self) -> str:
        return "memory.weights.h5"


def _shapes(file: pathlib.Path | io.BytesIO) -> dict[str, tuple[int, ...]]:
    """Shapes of all arrays of an HDF5 file, which must hold numbers, and hold them itself."""
    shapes: dict[str, tuple[int, ...]] = {}
    refused = []

    def look(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            shapes[name] = item.shape
            if item.dtype.kind not in "fiu" or item.is_virtual or item.external:
                refused.append(f"{name} is no array of numbers")

    def look_at_link(name: str, link: Any) -> None:
        if not isinstance(link, h5py.HardLink):
            refused.append(f"{name} points elsewhere")

    with h5py.File(file, "r") as content:
        content.visititems_links(look_at_link)
        content.visititems(look)
    if refused:  # not raised above: h5py loses errors there
        raise checkpoint.CheckpointError(f"{file} holds more than weights: {refused[0]}.")
    return shapes


def _copy_float16(source: h5py.Group, target: h5py.Group) -> None:
    for name, value in source.attrs.items():
        target.attrs[name] = value
    for name, item in source.items():
        if isinstance(item, h5py.Group):
            _copy_float16(item, target.create_group(name))
        else:
            array = item[()]
            target[name] = array.astype(np.float16) if array.dtype.kind == "f" else array


def _binding(config: str) -> list[str]:
    """The lines of a configuration that a continuation must keep."""
    free = "|".join(map(re.escape, FREE_SETTINGS))
    # gin puts a long value on lines of its own, indented, and a heading over each group
    left = re.sub(rf"^(({free}) =.*\n([ \t]+.*\n)*|#.*\n|\n)", "", f"{config}\n", flags=re.M)
    return left.splitlines()
