"""The run folder: what a training run writes, and how its classifier is read.

config.gin            every setting that was used, defaults included
run.json              versions, backend, seed, data checksum, and the results
log.csv               one row an epoch
tensorboard/          the same, under the TensorFlow backend
checkpoints/          last and previous: weights, optimizer, seeds, position in the data
best.weights.h5       the classifier at its best held-out accuracy (robust, if measured), as float16
lock                  held by the process that trains in the folder
"""

import contextlib
import difflib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import socket
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import keras
import numpy as np

from tvkeras import checkpoint, models

# Settings that change when and where, not what, a run computes: a continuation may differ in them.
FREE_SETTINGS = ("train.checkpoint_minutes", "train.checkpoint_steps", "train.download")


@contextlib.contextmanager
def locked(run_dir: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a run folder; the lock dies with its process.

    Raises:
        ValueError: If another process is in the folder; names it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run_dir {run_dir} is in use by {file.read().strip() or 'another process'}. "
                "Wait for it, stop it, or choose another --run_dir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        for folder in (run_dir, run_dir / "checkpoints"):
            for unfinished in folder.glob(f"*{checkpoint.UNFINISHED}"):  # a killed process's
                unfinished.unlink()
        yield


def claim(
    run_dir: pathlib.Path,
    config: str,
    facts: Mapping[str, Any],
    machine: Mapping[str, str] | None = None,
) -> None:
    """Writes `config.gin` and `run.json` into a new run folder, or checks that they are this run's.

    Args:
        run_dir: The run folder.
        config: The gin configuration.
        facts: What else decides the run's result, as JSON holds it, by name.
        machine: What this machine chose, kept among the versions: a run may go on with
            others, with a warning.

    Raises:
        ValueError: With the difference, if the folder is of another configuration.
    """
    path = run_dir / "config.gin"
    known = _binding(path.read_text() if path.exists() else config)
    lines = list(
        difflib.unified_diff(known, _binding(config), str(path), "this command", lineterm="", n=0)
    )
    facts = dict(json.loads(json.dumps(facts)))
    described = _described(run_dir)
    for name in facts.keys() & described.keys():
        if facts[name] != described[name]:
            lines += [f"-{name} = {described[name]}", f"+{name} = {facts[name]}"]
    if lines:
        raise ValueError(
            f"run_dir {run_dir} holds a run of another configuration:\n"
            + "\n".join(lines)
            + "\nGo on with that configuration, or choose another --run_dir."
        )
    checkpoint.write_atomically(path, config.encode())
    found = {**versions(), **(machine or {})}
    earlier = described.get("versions", found)
    if earlier != found:
        warnings.warn(
            f"{run_dir} was begun with {earlier}; it goes on with {found}, and may end in slightly "
            "other numbers than an uninterrupted run.",
            stacklevel=2,
        )
        facts["earlier_versions"] = [*described.get("earlier_versions", []), earlier]
    describe(run_dir, **facts, versions=found)


def describe(run_dir: pathlib.Path, **entries: Any) -> None:
    """Adds entries to the folder's `run.json`."""
    text = json.dumps({**_described(run_dir), **entries}, indent=2) + "\n"
    checkpoint.write_atomically(run_dir / "run.json", text.encode())


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


def load(run_dir: pathlib.Path) -> tuple[keras.Model, dict[str, Any]]:
    """A run's classifier at its best epoch, and what `run.json` says of the run.

    Raises:
        ValueError: If the folder is no finished run of this version.
        checkpoint.DamagedError: If its `run.json` is no JSON object.
        checkpoint.CheckpointError: As `load_weights`.
    """
    path, weights = run_dir / "run.json", run_dir / "best.weights.h5"
    if not path.exists() or not weights.exists():
        raise ValueError(
            "model must be the folder of a finished run, with run.json and best.weights.h5, or a "
            f"name of tvkeras.zoo.names(), got {str(run_dir)!r}. Train one: "
            f"python -m tvkeras.train --run_dir={run_dir} ..."
        )
    about = _described(run_dir)
    missing = {"model", "model_arguments", "num_classes"} - about.keys()
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}: it was written by an older tvkeras.")
    try:
        classifier = models.build(about["model"], about["num_classes"], **about["model_arguments"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no network that can be built: {error}") from error
    load_weights(classifier, weights)
    return classifier, about


def load_start(classifier: keras.Model, source: pathlib.Path) -> str:
    """Sets a classifier to the weights that another run ended, or stood, with.

    Args:
        classifier: Of the same architecture.
        source: A run folder, of which the best weights are meant, or a checkpoint of a
            run, such as `RUN_FOLDER/checkpoints/last`.

    Returns:
        The sha256 of the file.

    Raises:
        ValueError: If there is no such file.
        checkpoint.CheckpointError: If it is damaged, or of another model.
    """
    path = source / "best.weights.h5" if source.is_dir() else source
    if not path.is_file():
        raise ValueError(
            "initial_weights must be a run folder, a checkpoint in one or a name of "
            f"tvkeras.zoo.names(), got {str(source)!r}; {path} does not exist."
        )
    if path.suffix == ".h5":
        load_weights(classifier, path)
    else:
        checkpoint.assign_part(classifier.variables, checkpoint.load(path)[0], path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def _described(run_dir: pathlib.Path) -> dict[str, Any]:
    """What `run.json` says; nothing where there is none.

    Raises:
        checkpoint.DamagedError: If it is no JSON object.
    """
    path = run_dir / "run.json"
    if not path.exists():
        return {}
    try:
        about, why = json.loads(path.read_bytes()), "it holds no JSON object"
    except (ValueError, RecursionError) as error:
        about, why = None, str(error)
    if isinstance(about, dict):
        return about
    raise checkpoint.DamagedError(
        f"{path} is damaged: {why}. Restore it, or train again in another --run_dir."
    )


def _binding(config: str) -> list[str]:
    """The lines of a configuration without those that a continuation may change."""
    return [line for line in config.splitlines() if not line.startswith(FREE_SETTINGS)]
