"""What the programs `python -m tvkeras...` show: their own messages, without other libraries'."""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

_ADDRESSES = re.compile(r" \(<[^<>]* at 0x[0-9a-f]+>\)| at 0x[0-9a-f]+")


def quiet() -> None:
    """Imports Keras and its backend without their log lines, unless TF_CPP_MIN_LOG_LEVEL is set.

    TensorFlow writes some before it reads that variable: stderr is closed to them while
    it is imported, and shown all the same if the import fails.
    """
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
    """Absl's `app.run`, which shows log lines from warnings on; `--verbosity=0` shows all."""
    verbosity = flags.FLAGS["verbosity"]
    verbosity.value = logging.WARNING
    verbosity.using_default_value = False  # else absl takes INFO
    app.run(main)


def fail(error: BaseException) -> NoReturn:
    """Ends the program with an error's message; gin's state addresses of objects, which go."""
    sys.exit(f"error: {_ADDRESSES.sub('', str(error))}")
