"""The zoo from the command line.

python -m tvkeras.zoo list [PATTERN]                 names, size of the weights, where they are
python -m tvkeras.zoo show NAME                      what was measured, and how to load it
python -m tvkeras.zoo verify [NAME]                  checks files and logits of one entry or all
python -m tvkeras.zoo publish RUN_DIR NAME           makes an entry of an evaluated run
python -m tvkeras.zoo site [PATTERN] [--output=site] builds a leaderboard to look at
python -m tvkeras.zoo package NAME FOLDER            writes an entry for Hugging Face
python -m tvkeras.zoo robustbench FOLDER             writes AutoAttack figures for RobustBench
"""

import inspect
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from tvkeras import terminal, zoo
from tvkeras.zoo import publishing, store


def list_(pattern: str = "*") -> None:
    """Prints the entries."""
    if not (found := zoo.names(pattern)):
        raise ValueError(f"no entry matches pattern={pattern!r}; there are {zoo.names()}.")
    for name in found:
        try:
            size = store.files(name)["best.weights.h5"].size
            print(f"{name:<32}{size / 1e6:6.1f} MB  {store.place(name)}")
        except ValueError as error:  # a newer schema
            print(f"{name:<32}{error}")


def show(name: str) -> None:
    """Prints an entry's card as a short table."""
    card, page = zoo.card(name), store.folder(name, "README.md") / "README.md"
    about, training = card.model, card.training
    print(card)
    print(f"  {about['model']}, {about['parameters']:,} parameters, from images in [0, 1]")
    print(f"  {training['dataset']}, {training['epochs']} epochs of {card.defense}")
    print(f'  tvkeras.zoo.load("{name}"), {page}')


def verify(name: str | None = None) -> None:
    """Checks one entry or all; exits with 1 if one fails."""
    failed = False
    for entry in zoo.names() if name is None else [name]:
        try:
            print(f"{entry}: files as published, logits differ by {zoo.verify(entry):.1e}")
        except (ValueError, OSError) as error:
            failed = True
            print(f"{entry}: FAILED: {error}")
    sys.exit(int(failed))


def publish(run_dir: str, name: str) -> None:
    """Publishes a run."""
    print(f"published: {publishing.publish(run_dir, name)}")


def site(pattern: str = "*") -> None:
    """Builds the pages of the entries."""
    from tvkeras.zoo import site as pages  # what makes pages is needed here alone

    index = pages.build(zoo.names(pattern), pathlib.Path(flags.FLAGS.output))
    print(f"open in a browser: {index}")


def package(name: str, folder: str) -> None:
    """Writes an entry for Hugging Face."""
    from tvkeras.zoo import exporting

    print(f"packaged: {exporting.package(name, folder)}")


def robustbench(folder: str) -> None:
    """Writes the entries' model infos."""
    from tvkeras.zoo import exporting

    left_out = exporting.robustbench([zoo.card(name) for name in zoo.names()], folder)
    print(f"left out, without a figure of AutoAttack: {', '.join(left_out) or 'none'}")


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_,
    "show": show,
    "verify": verify,
    "publish": publish,
    "site": site,
    "package": package,
    "robustbench": robustbench,
}


def main(argv: Sequence[str]) -> None:
    """Parse, call: absl knows no commands, so the first argument names one of these functions."""
    name, *arguments = argv[1:] or [""]
    try:
        inspect.signature(COMMANDS[name]).bind(*arguments)
    except (KeyError, TypeError) as error:
        raise app.UsageError(f"no such command: {' '.join(argv[1:]) or 'none'}") from error
    COMMANDS[name](*arguments)


if __name__ == "__main__":
    flags.DEFINE_string("output", "site", "Folder of the site's pages.")
    terminal.run(main)
