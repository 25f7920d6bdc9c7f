"""Exports a model and its detector to TensorFlow Serving.

    python -m tvkeras.export --model=airbench_tv_lip --output=served/airbench_tv_lip

--model=MODEL               a run folder, or the name of a zoo entry
--output=FOLDER             of the model's versions
--version=NUMBER            default: the next free one
--statistic=loss            the detector's
--false_positive_rate=SHARE of clean images to reject; default: the card's detector's, or 0.05
"""

from absl import flags

from tvkeras import saved_model, terminal, zoo
from tvkeras.inference import STATISTICS
from tvkeras.runs import Run


def main(_: list[str]) -> None:
    """Parse and call."""
    given = flags.FLAGS
    run = Run.open(zoo.find(given.model))
    detector = saved_model.run_detector(
        run, statistic=given.statistic, false_positive_rate=given.false_positive_rate
    )
    target = saved_model.export(
        run.classifier(), given.output, detector=detector, version=given.version
    )
    print(f"{detector}\nexported: {target}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A run folder, or the name of a zoo entry.", required=True)
    flags.DEFINE_string("output", None, "Folder of the model's versions.", required=True)
    flags.DEFINE_integer("version", None, "Default: the next free number.")
    flags.DEFINE_enum("statistic", "loss", STATISTICS, "The detector's.")
    flags.DEFINE_float(
        "false_positive_rate",
        None,
        "Share of clean images to reject; default: the detector of the run's card, or 0.05.",
    )
    terminal.run(main)
