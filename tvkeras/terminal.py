"""What the programs `python -m tvkeras...` share: kernels, log lines, errors."""

import ast
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

_ADDRESSES = re.compile(r" \(<[^<>]* at 0x[0-9a-f]+>\)| at 0x[0-9a-f]+")


def help_early(program: str) -> None:
    """Answers --help by the docstring of the program's module, which nothing need import.

    Args:
        program: The module, such as "tvkeras.train".
    """
    if not {"--help", "-help", "-h"} & {*sys.argv}:
        return
    path = pathlib.Path(__file__).parent.joinpath(*program.removeprefix("-m").split(".")[1:])
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if source.exists():  # else Python says that there is no such module
        text = ast.get_docstring(ast.parse(source.read_text()))
        sys.stdout.write(f"{text}\n\n--helpfull shows every flag, those of log lines too.\n")
        sys.exit()


def prepare() -> None:
    """Imports Keras and its backend for a program; variables that are set win.

    TensorFlow reads TF_ENABLE_ONEDNN_OPTS when it is first imported, and leaves oneDNN off
    on CPUs without AVX-512 VNNI, where it is 1.5 times faster too. It writes log lines
    before it reads TF_CPP_MIN_LOG_LEVEL: stderr is closed to them meanwhile, and shown all
    the same if the import fails.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # 2 would show that there is no GPU as an error
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            import keras  # noqa: F401
        except BaseException:
            kept.seek(0)
            os.write(terminal, kept.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def run(main: Callable[[list[str]], Any]) -> None:
    """Absl's `app.run` of a program whose last message is the error it ends in.

    Log lines are shown from warnings on; `--verbosity=0` shows all.
    """
    verbosity = flags.FLAGS["verbosity"]
    verbosity.value = logging.WARNING
    verbosity.using_default_value = False  # else absl takes INFO

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            fail(error)

    app.run(guarded)


def fail(error: BaseException) -> NoReturn:
    """Ends the program with an error's message; gin's state addresses of objects, which go."""
    sys.exit(f"error: {_ADDRESSES.sub('', str(error))}")
