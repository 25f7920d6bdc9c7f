"""Makes an entry of an evaluated run."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile

from tvkeras import checkpoint, data
from tvkeras.evaluation import card, page
from tvkeras.runs import Run
from tvkeras.zoo import probe, store

PROBE_IMAGES = 8


def publish(run_dir: str | os.PathLike[str], name: str) -> pathlib.Path:
    """Makes an entry of a run and its evaluation, in a checkout of tvkeras.

    The run stays as it is; its files are copied to the checkout's `zoo/<name>` and
    their sha256 put into the index. A name that was published once is never replaced.

    Args:
        run_dir: Folder of a finished run, with the card of `tvkeras.evaluate` in
            `evaluation`.
        name: Of the entry: lower-case letters, digits and "_".

    Returns:
        The entry's folder.

    Raises:
        ValueError: For an illegal name or one that exists, a run that is not finished
            and evaluated, files that are links, or a card that was measured on other
            weights or names other files than figures.
        OSError: If this is no checkout, or it cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"name must be lower-case letters, digits and '_', got name={name!r}.")
    if store.CHECKOUT is None:
        raise OSError("entries are published in a checkout of tvkeras, and this is none.")
    entry, entries = store.CHECKOUT / name, store.index()
    if name in entries:
        raise ValueError(f"zoo entry {name!r} exists and stays as it is. Choose another name.")
    if entry.exists():
        raise ValueError(
            f"{entry} exists and is no zoo entry. Move it away; if it is the run itself, publish "
            "it from where you moved it."
        )
    measured, copied = _evaluated(Run(pathlib.Path(run_dir)))
    dataset, split = measured.dataset.rsplit(" ", 1)
    images = data.load(dataset, split).images[:PROBE_IMAGES]

    store.CHECKOUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=store.CHECKOUT) as temporary:
        work = pathlib.Path(temporary) / name
        work.mkdir()
        for path in copied:
            shutil.copyfile(path, work / path.name)
        page.write(dataclasses.replace(measured, name=name), work)
        probe.write(work, images)
        files = {path.name: store.File.of(path.read_bytes()) for path in sorted(work.iterdir())}
        work.rename(entry)
    entries[name] = {
        "schema": store.SCHEMA,
        "files": {file: about._asdict() for file, about in files.items()},
    }
    text = json.dumps(entries, indent=1, sort_keys=True) + "\n"
    checkpoint.write_atomically(store.INDEX, text.encode())
    return entry


def _evaluated(run: Run) -> tuple[card.Card, list[pathlib.Path]]:
    """The card of a run, and the files beside it that an entry takes over."""
    evaluation = run.folder / "evaluation"
    copied = [run.about_path, run.weights_path, run.config_path, run.log_path]
    _require(run, [*copied, evaluation / "card.json"])
    measured = card.Card.from_json((evaluation / "card.json").read_text())
    copied += [evaluation / file for file in ("examples.csv", *measured.figures.values())]
    _require(run, copied)
    sha256 = store.File.of(run.weights_path.read_bytes()).sha256
    if measured.model["weights_sha256"] != sha256:
        raise ValueError(
            f"the card in {evaluation} was measured on other weights: sha256 "
            f"{measured.model['weights_sha256']}, those of {run.folder} have {sha256}. Evaluate "
            f"again: python -m tvkeras.evaluate --model={run.folder} ..."
        )
    return measured, copied


def _require(run: Run, paths: list[pathlib.Path]) -> None:
    names = {path: str(path.relative_to(run.folder)) for path in paths}
    if missing := sorted(name for path, name in names.items() if not path.is_file()):
        raise ValueError(
            f"run_dir must be a finished run with its evaluation, and {run.folder} lacks "
            f"{missing}. Evaluate it: python -m tvkeras.evaluate --model={run.folder} ..."
        )
    whole = run.folder.resolve()
    if linked := [name for path, name in names.items() if path.resolve() != whole / name]:
        raise ValueError(f"run_dir must hold its files itself, and {linked} are links elsewhere.")
