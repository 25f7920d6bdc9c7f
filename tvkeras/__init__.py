"""tvkeras: adversarially robust Keras image classifiers by TV and Lipschitz regularisation.

Names are imported on first use: `import tvkeras` loads neither Keras nor a backend.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvkeras import (
        attacks,
        bounds,
        data,
        detection,
        evaluation,
        export,
        inference,
        models,
        norms,
        serving,
        zoo,
    )
    from tvkeras.defenses import TRADES, AdversarialTraining, Defense, TVLipschitz, Undefended
    from tvkeras.evaluation.benchmark import benchmark
    from tvkeras.models.head import logits
    from tvkeras.training.classifier import RobustClassifier

__version__ = "0.1.0"

# TensorFlow leaves oneDNN off on CPUs without AVX-512, where it is 1.5 times faster too
# (BUILD.md, "Speed"). It reads the variable when it is first imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

if sys.argv[:1] == ["-m"]:  # so long as Python looks for the module of `python -m tvkeras.train`
    from tvkeras import terminal

    terminal.quiet()

_HOMES = {
    "AdversarialTraining": "defenses",
    "Defense": "defenses",
    "RobustClassifier": "training.classifier",
    "TRADES": "defenses",
    "TVLipschitz": "defenses",
    "Undefended": "defenses",
    "benchmark": "evaluation.benchmark",
    "logits": "models.head",
}

__all__ = [
    "TRADES",
    "AdversarialTraining",
    "Defense",
    "RobustClassifier",
    "TVLipschitz",
    "Undefended",
    "attacks",
    "benchmark",
    "bounds",
    "data",
    "detection",
    "evaluation",
    "export",
    "inference",
    "logits",
    "models",
    "norms",
    "serving",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"tvkeras.{_HOMES[name]}"), name)
    if name in __all__:  # a module
        return importlib.import_module(f"tvkeras.{name}")
    raise AttributeError(f"module 'tvkeras' has no attribute {name!r}; it has {__all__}.")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
