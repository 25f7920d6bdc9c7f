"""Attacks on classifiers, compiled, on every backend.

Those of CleverHans and Foolbox attack TensorFlow models; their names are imported on
first use.
"""

import importlib
from typing import Any

from tvkeras.attacks.apgd import AutoPGD, dlr_losses, targeted_dlr_losses
from tvkeras.attacks.autoattack import AutoAttack, AutoAttackResult
from tvkeras.attacks.base import Attack, AttackResult
from tvkeras.attacks.carlini_wagner import CarliniWagner, EvasiveCarliniWagner
from tvkeras.attacks.ddn import DecoupledDirectionNorm
from tvkeras.attacks.fab import FastAdaptiveBoundary
from tvkeras.attacks.fmn import FastMinimumNorm
from tvkeras.attacks.pgd import ProjectedGradient
from tvkeras.attacks.square import Square

__all__ = [
    "TENSORFLOW_ATTACKS",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackResult",
    "AutoPGD",
    "CarliniWagner",
    "DecoupledDirectionNorm",
    "EvasiveCarliniWagner",
    "FastAdaptiveBoundary",
    "FastMinimumNorm",
    "ProjectedGradient",
    "Square",
    "dlr_losses",
    "targeted_dlr_losses",
]

TENSORFLOW_ATTACKS = {
    "CleverHansBIM": "cleverhans",
    "CleverHansCW": "cleverhans",
    "CleverHansFGSM": "cleverhans",
    "CleverHansMIM": "cleverhans",
    "CleverHansPGD": "cleverhans",
    "CleverHansSPSA": "cleverhans",
    "FoolboxBoundary": "foolbox",
    "FoolboxBrendelBethge": "foolbox",
    "FoolboxHopSkipJump": "foolbox",
}


def __getattr__(name: str) -> Any:
    if name in TENSORFLOW_ATTACKS:
        return getattr(importlib.import_module(f"tvkeras.attacks.{TENSORFLOW_ATTACKS[name]}"), name)
    legal = sorted([*__all__, *TENSORFLOW_ATTACKS])
    raise AttributeError(f"module 'tvkeras.attacks' has no attribute {name!r}; it has {legal}.")


def __dir__() -> list[str]:
    return sorted([*__all__, *TENSORFLOW_ATTACKS])
