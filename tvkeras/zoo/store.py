"""Where the files of zoo entries are, and that they are the published ones.

`index.json`, a part of the package, holds the size and sha256 of every file of every
entry; nothing is used that does not match it. A checkout of tvkeras has the files
themselves, in its folder `zoo`. Elsewhere they are looked for in the cache
(`TVKERAS_ZOO_DIR`, by default `~/.cache/tvkeras/zoo`), then downloaded into it from
`TVKERAS_ZOO_URL`, unless `TVKERAS_OFFLINE` is 1.
"""

import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import threading
import urllib.parse
import urllib.request
import warnings
from typing import Any, NamedTuple

from tvkeras import checkpoint, checks

SCHEMA = 1
TIMEOUT_SECONDS = 30  # for a server that says nothing
SLOWEST = 10_000  # bytes a second that a whole download must reach, beyond that time
INDEX = pathlib.Path(__file__).with_name("index.json")

_ROOT = pathlib.Path(__file__).parents[2]
CHECKOUT = _ROOT / "zoo" if (_ROOT / "pyproject.toml").exists() else None


class DownloadError(OSError):
    """A file of the zoo is not on this machine and cannot be fetched."""


class File(NamedTuple):
    """What the index says of a file: its size in bytes and its sha256."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "File":
        """The description of a file with that content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())

    def __str__(self) -> str:
        return f"{self.size} bytes with sha256 {self.sha256}"


def index() -> dict[str, Any]:
    """The entries by name, each with `schema` and `files`."""
    return json.loads(INDEX.read_text())


def files(name: str) -> dict[str, File]:
    """The files of an entry, by file name.

    Raises:
        ValueError: For an unknown entry, or one of a newer schema.
    """
    entries = index()
    entry = entries[checks.one_of("name", name, entries)]
    if entry["schema"] > SCHEMA:
        raise ValueError(
            f"zoo entry {name!r} has schema={entry['schema']}, this tvkeras reads {SCHEMA} and "
            "older. Install a newer tvkeras."
        )
    return {file: File(**about) for file, about in entry["files"].items()}


def folder(name: str, *wanted: str) -> pathlib.Path:
    """The folder that holds an entry's files, after they were fetched and compared.

    Args:
        name: The entry.
        *wanted: The files that are needed.

    Raises:
        ValueError: For an unknown entry, or one of a newer schema.
        checkpoint.DamagedError: If a file is not the published one.
        DownloadError: If a file is not here and cannot be fetched.
    """
    known = files(name)
    for file in wanted:
        checks.one_of(f"a file of zoo entry {name!r}", file, known)
    if CHECKOUT is not None and (CHECKOUT / name).is_dir():
        for file in wanted:
            _check_checkout(CHECKOUT / name / file, known[file])
        return CHECKOUT / name
    for file in wanted:
        _check_cache(name, file, known[file])
    return cache() / name


def place(name: str) -> str:
    """Where an entry's weights are: "checkout", "cache" or "to download"."""
    if CHECKOUT is not None and (CHECKOUT / name).is_dir():
        return "checkout"
    return "cache" if (cache() / name / "best.weights.h5").exists() else "to download"


def cache() -> pathlib.Path:
    """The folder of downloaded entries."""
    return pathlib.Path(os.environ.get("TVKERAS_ZOO_DIR", "~/.cache/tvkeras/zoo")).expanduser()


def _check_checkout(path: pathlib.Path, expected: File) -> None:
    found = File.of(path.read_bytes()) if path.is_file() else "no file"
    if found != expected:
        raise checkpoint.DamagedError(
            f"{path} is not the published file: expected {expected}, found {found}. "
            f"Restore it: git checkout -- {path}"
        )


def _check_cache(name: str, file: str, expected: File) -> None:
    """Leaves the published file in the cache, or none."""
    path = cache() / name / file
    if path.exists() and not path.is_file():
        raise OSError(f"{path} must be a file and is none (a folder, a pipe). Remove it.")
    if path.exists():
        found = File.of(path.read_bytes())
        if found == expected:
            return
        warnings.warn(
            f"{path} is not the published file: expected {expected}, found {found}. "
            "Removing it, and fetching it again.",
            stacklevel=4,
        )
        with contextlib.suppress(OSError):  # a cache that cannot be written is reported below
            path.unlink()
    by_hand = f"To put the file there by hand: {path}, {expected}."
    content = _download(f"{name}/{file}", expected, by_hand)
    try:
        checkpoint.write_atomically(path, content)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error}. Make room, or set TVKERAS_ZOO_DIR to a folder "
            "that can be written."
        ) from error


def _download(file: str, expected: File, by_hand: str) -> bytes:
    base = os.environ.get("TVKERAS_ZOO_URL", "")
    if os.environ.get("TVKERAS_OFFLINE", "0") not in ("", "0"):
        raise DownloadError(
            f"{file} of the zoo is not on this machine, and TVKERAS_OFFLINE forbids to download "
            f"it: unset it. {by_hand}"
        )
    if not base:
        raise DownloadError(
            f"{file} of the zoo is not on this machine. Set TVKERAS_ZOO_URL to the address of a "
            f"copy of the folder zoo of tvkeras. {by_hand}"
        )
    url = f"{base.rstrip('/')}/{urllib.parse.quote(file)}"
    try:
        content = _read(url, expected.size + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} cannot be downloaded: {error}. {by_hand}") from error
    found = File.of(content)
    if found == expected:
        return content
    page = " It is a web page: is the address right?" if content.lstrip()[:1] == b"<" else ""
    more = "more than " if found.size > expected.size else ""
    raise checkpoint.DamagedError(
        f"{url} is not the published file, and was not kept: expected {expected}, found {more}"
        f"{found}.{page} {by_hand}"
    )


def _read(url: str, size: int) -> bytes:
    """At most `size` bytes of what is at an address.

    Raises:
        OSError, ValueError, http.client.HTTPException: If it cannot be had, or not in
            time: a server may send too little at once for time-outs of its socket.
    """
    future: concurrent.futures.Future[bytes] = concurrent.futures.Future()

    def read() -> None:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
                future.set_result(response.read(size))
        except Exception as error:
            future.set_exception(error)

    seconds = TIMEOUT_SECONDS + size / SLOWEST
    threading.Thread(target=read, daemon=True).start()  # ends with the process, if not before
    if concurrent.futures.wait([future], seconds).not_done:
        raise TimeoutError(f"it took more than {seconds:.0f} s")
    return future.result()
