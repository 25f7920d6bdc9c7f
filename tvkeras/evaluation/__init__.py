"""Measurements of classifiers, whether they can be believed, and their figures.

Names are imported on first use: a card is read without the attacks and without a plotting library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvkeras.evaluation.auditing import audit
    from tvkeras.evaluation.card import Card, Check
    from tvkeras.evaluation.figures import error_curves

_HOMES = {
    "Card": "card",
    "Check": "card",
    "audit": "auditing",
    "error_curves": "figures",
}

__all__ = ["Card", "Check", "audit", "error_curves"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}.")
