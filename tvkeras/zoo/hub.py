"""Classifiers in folders of the form that `exporting.package` writes, here or on Hugging Face."""

import json
import os
import pathlib

import keras

from tvkeras import checkpoint
from tvkeras.zoo import store

HASHES = "hashes.json"  # size and sha256 of the other files, by name
MODEL = "model.keras"
SCHEME = "hf://"


def is_address(name: str | os.PathLike[str]) -> bool:
    """Whether this is an `hf://` address or a path, and no name of an entry."""
    text = os.fspath(name)
    return "/" in text or os.sep in text or (text not in store.index() and os.path.isdir(text))


def load(address: str | os.PathLike[str]) -> keras.Model:
    """The classifier in a folder or at `hf://USER/NAME`; runs no code that it brings.

    Raises:
        checkpoint.CheckpointError: If a file is not the one that was packaged, or Keras
            refuses it.
        store.DownloadError: If it cannot be downloaded.
    """
    path = folder(address, MODEL) / MODEL
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # a stranger's file may fail anywhere
        raise checkpoint.CheckpointError(
            f"{path} is not loaded: {error} Only models of Keras's own layers are; export it "
            "again with: python -m tvkeras.zoo package NAME FOLDER"
        ) from error
    if isinstance(model, keras.Model):
        return model
    raise checkpoint.CheckpointError(f"{path} must hold a Keras model, got a {type(model)}.")


def folder(address: str | os.PathLike[str], *wanted: str) -> pathlib.Path:
    """The folder at an address, after its wanted files were compared with its hashes.

    The hashes are the folder's own: they show damage, and not who made it.

    Raises:
        checkpoint.DamagedError, store.DownloadError: As `load`.
    """
    text = os.fspath(address)
    remote = text.startswith(SCHEME)
    found = _download(text, [HASHES, *wanted]) if remote else pathlib.Path(text)
    # Hugging Face's cache keeps files elsewhere in its folder of the model, and links to them.
    whole = (found.parents[1] if remote else found).resolve()
    for file in (HASHES, *wanted):
        path = found / file
        if not path.is_file() or not path.resolve().is_relative_to(whole):
            raise checkpoint.DamagedError(
                f"name={text!r} must be a folder that holds the file {file} itself, and it does "
                "not. Make one with: python -m tvkeras.zoo package NAME FOLDER"
            )
    hashes = _hashes(found / HASHES)
    for file in wanted:
        content = store.File.of((found / file).read_bytes())
        if hashes.get(file) != content:
            raise checkpoint.DamagedError(
                f"{found / file} is not the packaged file: {HASHES} says "
                f"{hashes.get(file, 'nothing')}, found {content}. Copy or download it again."
            )
    return found


def _hashes(path: pathlib.Path) -> dict[str, store.File]:
    try:
        return {name: store.File(**about) for name, about in json.loads(path.read_bytes()).items()}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise checkpoint.DamagedError(
            f"{path} must hold size and sha256 of files by name: {error}. Copy it again."
        ) from error


def _download(address: str, files: list[str]) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise store.DownloadError(
            f"name={address!r} needs huggingface_hub: pip install 'tvkeras[hub]'"
        ) from error
    offline = os.environ.get("TVKERAS_OFFLINE", "0") not in ("", "0")
    try:
        snapshot = huggingface_hub.snapshot_download(
            address.removeprefix(SCHEME), allow_patterns=files, local_files_only=offline
        )
    except Exception as error:  # its own, and those of its HTTP library
        raise store.DownloadError(
            f"name={address!r} cannot be downloaded: {error}. It must be hf://USER/NAME, at "
            "HF_ENDPOINT if that is set; TVKERAS_OFFLINE=1 forbids to ask the network."
        ) from error
    return pathlib.Path(snapshot)
