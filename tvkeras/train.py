"""Trains a robust classifier.

    python -m tvkeras.train --gin_file=gin/cifar_tv_lip.gin [--gin_param=Recipe.epochs=30]

The same command goes on with a run that was interrupted.

--gin_file=FILE     an experiment, such as those in gin/; repeated, later ones win
--gin_param=SETTING such as Recipe.epochs=30; may be repeated, wins over files
--run_dir=FOLDER    what is written; default: runs/<gin files' names>
--settings          prints what is set, and the defaults of all that can be, and stops
--dry_run           prints the plan and the time of an epoch, and stops
"""

import json
import pathlib
import shlex
import signal
import sys
from typing import Any, NoReturn

from absl import flags

from tvkeras import config, terminal
from tvkeras.training.loop import plan, train
from tvkeras.training.recorder import TrainingInterrupt

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    """Parse, bind, call."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        config.bind(FLAGS.gin_file, FLAGS.gin_param)
        if FLAGS.settings:
            print(config.listing())
            return
        if not FLAGS.gin_file:
            raise ValueError("--gin_file must name an experiment, such as gin/cifar_tv_lip.gin.")
        name = "-".join(pathlib.Path(file).stem for file in FLAGS.gin_file)
        run_dir = FLAGS.run_dir or f"runs/{name}"
        settings = config.settings()
        if FLAGS.dry_run:
            print(json.dumps(plan(**settings), indent=2))
            return
        card = train(run_dir, **settings, configuration=config.operative)
    except TrainingInterrupt as interruption:
        command = shlex.join(["python", "-m", "tvkeras.train", *sys.argv[1:]])
        print(f"{interruption} The same command goes on:\n{command}", file=sys.stderr)
        sys.exit(128 + interruption.number)
    if card is not None:
        print(f"{card}\nrun folder: {run_dir}")


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Stops the command outside `fit`, which has its own way (`Recorder.catching_signals`)."""
    raise TrainingInterrupt(f"{signal.Signals(number).name} stopped it between steps.", number)


if __name__ == "__main__":
    config.define_flags()
    flags.DEFINE_string("run_dir", None, "The run folder; default: runs/<gin files' names>.")
    flags.DEFINE_bool("dry_run", False, "Print the plan and the time of an epoch only.")
    terminal.run(main)
