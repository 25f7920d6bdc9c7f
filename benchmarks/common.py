"""What several benchmarks need; free of Keras and of PyTorch, for those of one alone."""

import collections
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np


class Clock:
    """Seconds that functions took.

    Attributes:
        seconds: By name, those on the wall and those of the process's CPU time, in which
            other work on the machine counts less.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, the seconds of whose calls are added up under `name`."""

        @functools.wraps(function)
        def call(*arguments: object, **named: object) -> object:
            start = _now()
            result = function(*arguments, **named)
            self.seconds[name] += _now() - start
            return result

        return call


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def resident(entry: str) -> float:
    """MiB this process holds (VmRSS) or has held at most (VmHWM), on Linux.

    Not `resource.getrusage`, whose maximum a process inherits from its parent.
    """
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(entry))


def described(classifier: Any) -> tuple[list[dict], dict[str, np.ndarray]]:
    """A functional Keras model's layers, as configured, and weights: "conv/0" is conv's first."""
    layers = json.loads(classifier.to_json())["config"]["layers"]
    weights = {
        f"{layer.name}/{i}": array
        for layer in classifier.layers
        for i, array in enumerate(layer.get_weights())
    }
    return layers, weights
