"""Attacks on classifiers, compiled, on every backend."""

from tvkeras.attacks.apgd import AutoPGD, dlr_losses, targeted_dlr_losses
from tvkeras.attacks.autoattack import AutoAttack, AutoAttackResult
from tvkeras.attacks.base import Attack, AttackedClassifier, AttackResult
from tvkeras.attacks.fab import FastAdaptiveBoundary
from tvkeras.attacks.pgd import ProjectedGradient
from tvkeras.attacks.square import Square

__all__ = [
    "Attack",
    "AttackResult",
    "AttackedClassifier",
    "AutoAttack",
    "AutoAttackResult",
    "AutoPGD",
    "FastAdaptiveBoundary",
    "ProjectedGradient",
    "Square",
    "dlr_losses",
    "targeted_dlr_losses",
]
