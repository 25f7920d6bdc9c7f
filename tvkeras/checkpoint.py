"""Checkpoint files: arrays and a JSON header under one checksum, replaced atomically."""

import hashlib
import io
import json
import os
import pathlib
import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

MAGIC = b"tvkeras1"
SHOWN_DIFFERENCES = 9
UNFINISHED = ".unfinished"  # ends the name of a file while it is written


class CheckpointError(ValueError):
    """The file is no checkpoint, is damaged, or does not fit the model."""


class DamagedError(CheckpointError):
    """The file is truncated, altered or something else."""


def save(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    previous: pathlib.Path | None = None,
) -> None:
    """Writes a checkpoint so that at every moment one of the paths holds a whole one.

    Args:
        path: Destination.
        arrays: By name.
        meta: Anything that JSON holds.
        previous: Where the file that is at `path` now goes; None replaces it.
    """
    buffer = io.BytesIO()
    header = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    entries: dict[str, Any] = {f"array:{name}": array for name, array in arrays.items()}
    np.savez(buffer, meta=header, **entries)
    payload = buffer.getvalue()
    write_atomically(path, MAGIC + hashlib.sha256(payload).digest() + payload, previous)


def load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the arrays and the header of a checkpoint.

    Raises:
        DamagedError: If the file is truncated, altered or something else.
    """
    return unpack(path.read_bytes(), path)


def kept(
    path: pathlib.Path, identity: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The result in the file at `path`, computed and written if there is none.

    Raises:
        ValueError: If the file holds a result of another identity.
    """
    if not path.exists():
        save(path, compute(), {"identity": identity})
    arrays, meta = load(path)
    if meta["identity"] != identity:
        raise ValueError(
            f"resume_dir {path.parent} holds another call's results (other settings, images, "
            "weights or backend). Use another folder, or remove that one."
        )
    return arrays


def unpack(content: bytes, path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the header that `save` wrote; `path` is named in the error.

    Raises:
        DamagedError: If the content is truncated, altered or something else.
    """
    start = len(MAGIC) + hashlib.sha256().digest_size
    digest, payload = content[len(MAGIC) : start], content[start:]
    if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != digest:
        raise DamagedError(
            f"{path} is not a whole tvkeras checkpoint: its checksum does not match."
        )
    with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
        arrays = {
            name.removeprefix("array:"): archive[name] for name in archive.files if name != "meta"
        }
        return arrays, json.loads(archive["meta"].tobytes())


def newest(paths: Sequence[pathlib.Path]) -> bytes:
    """Content of the first of `paths` that holds a whole checkpoint; empty if no file exists.

    One that is damaged or unreadable is passed over with a warning that names it and
    the one used instead, and renamed, so that it never takes the place of the whole one.

    Args:
        paths: Newest first.

    Raises:
        DamagedError: If there are files, and none is whole.
    """
    passed: dict[pathlib.Path, Exception] = {}
    for path in paths:
        if not path.exists():
            continue
        try:
            content = path.read_bytes()
            unpack(content, path)
        except (DamagedError, OSError) as error:
            passed[path] = error
            continue
        for old, found in passed.items():
            warnings.warn(f"{found} Going on from {path} instead.", stacklevel=2)
            os.replace(old, old.with_name(f"{old.name}.damaged"))
        return content
    for found in passed.values():
        raise DamagedError(f"{found} There is no other checkpoint beside it.")
    return b""


def write_atomically(
    path: pathlib.Path, content: bytes, previous: pathlib.Path | None = None
) -> None:
    """Replaces the file at `path`, which goes to `previous`; a crash leaves it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = secrets.token_hex(4)  # no other writer's
    temporary = path.with_name(f".{path.name}.{unique}{UNFINISHED}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def values(variables: list[keras.Variable]) -> dict[str, np.ndarray]:
    """Variables as arrays, named by position and path."""
    return {
        name: keras.ops.convert_to_numpy(variable)
        for name, variable in zip(_names(variables), variables, strict=True)
    }


def assign(variables: list[keras.Variable], arrays: Mapping[str, np.ndarray]) -> None:
    """Sets variables to the arrays that `values` made of them.

    Raises:
        CheckpointError: If names or shapes differ; the message shows where.
    """
    expected = {
        name: tuple(variable.shape)
        for name, variable in zip(_names(variables), variables, strict=True)
    }
    found = {name: array.shape for name, array in arrays.items()}
    require_fit(expected, found, "the checkpoint")
    for variable, array in zip(variables, arrays.values(), strict=True):
        variable.assign(array)


def assign_part(
    variables: list[keras.Variable], arrays: Mapping[str, np.ndarray], path: pathlib.Path
) -> None:
    """Sets variables to those of a checkpoint's arrays that are theirs, such as a part's.

    Raises:
        CheckpointError: If they do not stand in it, one after the other.
    """

    def kinds(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[Any]:
        return [(name.partition(":")[2], shape) for name, shape in shapes]

    own = kinds(zip(_names(variables), (tuple(v.shape) for v in variables), strict=True))
    found = kinds((name, array.shape) for name, array in arrays.items())
    starts = (i for i in range(len(found) - len(own) + 1) if found[i : i + len(own)] == own)
    start = next(starts, None)
    if start is None:
        raise CheckpointError(f"{path} holds no weights of this model: it is of another one.")
    for variable, array in zip(variables, list(arrays.values())[start:], strict=False):
        variable.assign(array)


def require_fit(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], file: str
) -> None:
    """Checks that a file holds arrays of the names and shapes that the model has.

    Raises:
        CheckpointError: If not; the message shows nine differences at most.
    """
    differences = [
        f"  {name}: the model has {expected.get(name, 'nothing')}, "
        f"the file {found.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if len(differences) > SHOWN_DIFFERENCES:
        differences[SHOWN_DIFFERENCES:] = [f"  and {len(differences) - SHOWN_DIFFERENCES} more"]
    if differences:
        raise CheckpointError("\n".join([f"{file} is of another model:", *differences]))


def _names(variables: list[keras.Variable]) -> list[str]:
    """Positions and names, without the numbers that count the layers of the process."""
    return [
        f"{index}:{re.sub(r'_[0-9]+', '', variable.path.split('/')[-1])}"
        for index, variable in enumerate(variables)
    ]
