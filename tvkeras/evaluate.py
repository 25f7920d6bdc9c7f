"""Attacks a model and writes its card.

    python -m tvkeras.evaluate --gin_file=gin/evaluate_cifar.gin --model=MODEL

MODEL is a run folder, the name of a zoo entry, or a `.keras` file, for which --dataset names the
test images; `--gin_param='benchmark.bounds=(0, 255)'` if it takes such. The same command goes on
with an evaluation that was interrupted.

--gin_file=FILE     the attacks, such as gin/evaluate_cifar.gin; repeated, later ones win
--gin_param=SETTING such as benchmark.attacked_images=1000; may be repeated, wins over files
--model=MODEL       what is attacked
--output=FOLDER     what is written; default: MODEL/evaluation
--dataset=NAME      of the test images; default: the run's
--split=test        of the data set
--twin=FOLDER       the evaluation of an undefended network, to set beside
--settings          prints what is set, and the defaults of all that can be, and stops
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
    configured = config.configurable(
        benchmark, (Certification, Detection, *trials.library_attacks())
    )
    config.bind(given.gin_file, given.gin_param)
    if given.settings:
        print(config.listing())
        return
    if not given.gin_file and not given.gin_param:
        raise ValueError("--gin_file must name the attacks, such as gin/evaluate_cifar.gin.")
    if not given.model:
        raise ValueError("--model must name a run folder, a zoo entry or a .keras file.")
    output = pathlib.Path(given.output or f"{given.model.removesuffix('.keras')}/evaluation")
    model = subject.Subject.of(zoo.find(given.model), given.dataset, given.split)
    twin = subject.twin(pathlib.Path(given.twin), model.dataset) if given.twin else None
    command = shlex.join(["python", "-m", "tvkeras.evaluate", *sys.argv[1:]])
    try:
        card = model.evaluated(configured, output, command=command, twin=twin, progress=True)
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on with what is in {output}/attacks.")
    print(f"{card}\ncard: {output}/README.md")


if __name__ == "__main__":
    config.define_flags()
    flags.DEFINE_string("model", None, "A run folder, a zoo entry, or a .keras file.")
    flags.DEFINE_string("output", None, "Where to write; default: <model>/evaluation.")
    flags.DEFINE_string("dataset", None, "Of the test images; default: the run's.")
    flags.DEFINE_string("split", "test", "Of the data set.")
    flags.DEFINE_string("twin", None, "The evaluation of an undefended network, to set beside.")
    terminal.run(main)
