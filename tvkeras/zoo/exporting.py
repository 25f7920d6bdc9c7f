"""Entries in the forms that others read: a Hugging Face folder, RobustBench's model info."""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from tvkeras import zoo
from tvkeras.evaluation import card, page
from tvkeras.zoo import hub, store

THREATS = {"l2": "L2", "linf": "Linf"}  # as RobustBench calls the norms


def package(name: str, output: str | os.PathLike[str]) -> pathlib.Path:
    """Writes an entry as a folder that can be put on Hugging Face as it is.

    It holds `model.keras`, the same as Keras reads it from `hf://` (`config.json`,
    `metadata.json`, `model.weights.h5`), the card with its figures, a README.md with the
    metadata of the hub, and the size and sha256 of all of them in `hashes.json`.

    Args:
        name: One of `zoo.names()`.
        output: The folder; it must be empty, or not exist.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds something; as `zoo.load`.
        DownloadError: As `zoo.load`.
        OSError: If the folder cannot be written.
    """
    target = pathlib.Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output must be a new or empty folder, got output={str(target)!r}.")
    measured, classifier = zoo.card(name), zoo.load(name)
    copied = ("card.json", "examples.csv", *measured.figures.values())
    entry = store.folder(name, *copied)
    target.mkdir(parents=True, exist_ok=True)
    classifier.save(target, zipped=False)
    classifier.save(target / hub.MODEL)
    for file in copied:
        shutil.copyfile(entry / file, target / file)
    (target / "README.md").write_text(page.render(measured), encoding="utf-8")
    files = [path for path in sorted(target.iterdir()) if path.is_file()]
    hashes = {path.name: store.File.of(path.read_bytes())._asdict() for path in files}
    (target / hub.HASHES).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    return target


def robustbench(cards: Sequence[card.Card], output: str | os.PathLike[str]) -> list[str]:
    """Writes RobustBench's `<dataset>/<threat>/<name>.json`, one for each AutoAttack figure.

    Its fields about a paper, and whether other data helped, stay empty: no card knows them.

    Args:
        cards: Of classifiers.
        output: The folder to write into.

    Returns:
        The names of the cards that are left out: they hold no figure of AutoAttack,
        which a custom suite or another attack is not.

    Raises:
        OSError: If the folder cannot be written.
    """
    left_out = []
    for about in cards:
        found = list(_model_infos(about))
        for threat, info in found:
            # An entry has one radius a norm; of more, each has a file of its own.
            radius = f"_{info['eps'].replace('/', '_')}" if _several(found, threat) else ""
            path = pathlib.Path(output, info["dataset"], threat, f"{about.name}{radius}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        if not found:
            left_out.append(about.name)
    return left_out


def _several(found: list[tuple[str, dict[str, Any]]], threat: str) -> bool:
    return sum(other == threat for other, _ in found) > 1


def _model_infos(about: card.Card) -> Iterator[tuple[str, dict[str, Any]]]:
    """Threat model and contents of the files of a card."""
    for report in about.attacks:
        if not report.settings.startswith("AutoAttack("):  # of custom suites it starts otherwise
            continue
        for radius, error in report.error.items():
            accuracy = f"{100 * (1 - error.value):.2f}"
            yield (
                THREATS[report.norm],
                {
                    "link": "",
                    "name": about.name,
                    "authors": "",
                    "additional_data": None,
                    "number_forward_passes": 1,
                    "dataset": about.dataset.split(" ")[0],
                    "venue": "",
                    "architecture": about.model["model"],
                    "eps": radius,
                    "clean_acc": f"{100 * (1 - about.clean_error.value):.2f}",
                    "reported": accuracy,
                    "autoattack_acc": accuracy,
                    "footnote": f"AutoAttack on the first {error.n} test images, clean accuracy "
                    f"on {about.clean_error.n}.",
                    "unreliable": about.unreliable,
                },
            )
