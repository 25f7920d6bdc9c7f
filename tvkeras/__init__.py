"""tvkeras: adversarially robust Keras image classifiers by TV and Lipschitz regularisation.

Names are imported on first use: `import tvkeras` loads neither Keras nor a backend.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvkeras import (
        attacks,
        bounds,
        data,
        detection,
        evaluation,
        inference,
        models,
        norms,
        saved_model,
        serving,
        zoo,
    )
    from tvkeras.defenses import TRADES, AdversarialTraining, Defense, TVLipschitz, Undefended
    from tvkeras.evaluation.benchmark import benchmark
    from tvkeras.models.head import logits
    from tvkeras.training.classifier import RobustClassifier
    from tvkeras.training.fine_tune import defend

__version__ = "0.1.0"

_HOMES = {
    "AdversarialTraining": "defenses",
    "Defense": "defenses",
    "RobustClassifier": "training.classifier",
    "TRADES": "defenses",
    "TVLipschitz": "defenses",
    "Undefended": "defenses",
    "benchmark": "evaluation.benchmark",
    "defend": "training.fine_tune",
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
    "defend",
    "detection",
    "evaluation",
    "inference",
    "logits",
    "models",
    "norms",
    "saved_model",
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


# So long as Python looks for the module of `python -m tvkeras.train`: before it imports Keras.
_programs = [a for a in sys.orig_argv if a.startswith(("tvkeras.", "-mtvkeras."))]
if sys.argv[:1] == ["-m"] and _programs:
    from tvkeras import terminal

    terminal.help_early(_programs[0])
    terminal.prepare()
