"""Attacks a model and writes its card.

    python -m tvkeras.evaluate --gin_file=gin/evaluate_cifar.gin --model=MODEL

MODEL is a run folder, the name of a zoo entry, or a `.keras` file, for which --dataset names the
test images; `--gin_param='benchmark.bounds=(0, 255)'` if it takes such. The same command goes on
with an evaluation that was interrupted.
"""

import pathlib
import shlex
import sys

from absl import flags

from tvkeras import config, terminal, zoo
from tvkeras.evaluation import subject, trials
from tvkeras.evaluation.benchmark import benchmark
from tvkeras.evaluation.certified import Certification
from tvkeras.evaluation.detecting import Detection


def main(_: list[str]) -> None:
    """Parse, bind, call."""
    given = flags.FLAGS
    output = pathlib.Path(given.output or f"{given.model.removesuffix('.keras')}/evaluation")
    configured = config.configurable(
        benchmark, (Certification, Detection, *trials.library_attacks())
    )
    try:
        if not given.gin_file and not given.gin_param:
            raise ValueError("--gin_file must name the attacks, such as gin/evaluate_cifar.gin.")
        config.bind(given.gin_file, given.gin_param)
        if given.settings:
            print(config.listing())
            return
        model = subject.Subject.of(zoo.find(given.model), given.dataset, given.split)
        twin = subject.twin(pathlib.Path(given.twin), model.dataset) if given.twin else None
        command = shlex.join(["python", "-m", "tvkeras.evaluate", *sys.argv[1:]])
        card = model.evaluated(configured, output, command=command, twin=twin, progress=True)
    except (ValueError, OSError) as error:
        terminal.fail(error)
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on with what is in {output}/attacks.")
    print(f"{card}\ncard: {output}/README.md")


if __name__ == "__main__":
    config.define_flags()
    flags.DEFINE_string(
        "model", None, "A run folder, a zoo entry, or a .keras file.", required=True
    )
    flags.DEFINE_string("output", None, "Where to write; default: <model>/evaluation.")
    flags.DEFINE_string("dataset", None, "Of the test images; default: the run's.")
    flags.DEFINE_string("split", "test", "Of the data set.")
    flags.DEFINE_string("twin", None, "The evaluation of an undefended network, to set beside.")
    terminal.run(main)
