"""What the commands print where they end in an error: one message, theirs."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tvkeras import config, terminal

DIGITS = "--gin_file=gin/digits_tv_lip.gin"


CHOICES = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")


def printed(*arguments, **environment):
    """What a command prints where nobody has made TensorFlow's choices."""
    quiet = {name: value for name, value in os.environ.items() if name not in CHOICES}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**quiet, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    "program", ["train", "evaluate", "compare", "export", "quickstart", "zoo/__main__"]
)
def test_help_is_an_example_and_every_flag_of_the_program(program):
    module = f"tvkeras.{program.removesuffix('/__main__')}"
    asked = printed(module, "--help", KERAS_BACKEND="none")  # Keras, imported, would fail
    assert (asked.returncode, asked.stderr) == (0, "")
    assert f"python -m {module}" in asked.stdout
    source = (ROOT / f"tvkeras/{program}.py").read_text()
    defined = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source)
    if "config.define_flags" in source:
        defined += ["gin_file", "gin_param", "settings"]
    assert {f"--{name}" for name in defined} <= {*re.findall(r"--\w+", asked.stdout)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tvkeras.train", DIGITS, "--gin_param=Recipe.epoch=1"],
            "Configurable 'Recipe' doesn't have a parameter named 'epoch'",
        ),
        (
            ["tvkeras.train", DIGITS, "--dry_run", "--gin_param=Recipe.augmentation=3"],
            "augmentation must be None or an instance",
        ),
        (["tvkeras.evaluate", "--model=nowhere"], "--gin_file must name the attacks"),
        (["tvkeras.compare", "nowhere"], "name at least two evaluated models"),
        (["tvkeras.export", "--model=nowhere", "--output=x"], "must be the folder of a finished"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_error_is_all_that_a_command_prints(arguments, message, tmp_path):
    ended = printed(*arguments)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert message in ended.stderr
    assert "0x" not in ended.stderr


@pytest.mark.slow
def test_a_failed_import_is_shown_whole():
    ended = printed("tvkeras.zoo", "list", KERAS_BACKEND="none")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["", "0"])
def test_commands_choose_kernels_and_silence_and_who_has_chosen_is_heard(chosen, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os; atexit.register(lambda: print(os.environ['TF_ENABLE_ONEDNN_OPTS']))"
    )
    environment = {"KERAS_BACKEND": "tensorflow", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    if chosen:
        environment |= {"TF_ENABLE_ONEDNN_OPTS": chosen, "TF_CPP_MIN_LOG_LEVEL": chosen}
    ended = printed("tvkeras.zoo", "list", "nomatch", **environment)
    assert ended.stdout == f"{chosen or 1}\n"
    assert "error: no entry matches" in ended.stderr
    assert ended.stderr.startswith("error: ") == (not chosen)  # else TensorFlow's lines come first


def test_errors_from_gin_hold_no_addresses():
    config.bind(["gin/digits_tv_lip.gin"], ["Recipe.label_smoothing=@sgd"])
    with pytest.raises(ValueError, match="must be") as caught:
        config.settings()
    with pytest.raises(SystemExit, match="error: ") as ended:
        terminal.fail(caught.value)
    assert " at 0x" in str(caught.value)
    assert "0x" not in str(ended.value)
    assert "In call to configurable 'Recipe'" in str(ended.value)
