"""Attacks on classifiers, compiled, on every backend."""

from tvkeras.attacks.base import Attack, AttackedClassifier, AttackResult
from tvkeras.attacks.carlini_wagner import CarliniWagner, EvasiveCarliniWagner
from tvkeras.attacks.ddn import DecoupledDirectionNorm
from tvkeras.attacks.fmn import FastMinimumNorm
from tvkeras.attacks.pgd import ProjectedGradient

__all__ = [
    "Attack",
    "AttackResult",
    "AttackedClassifier",
    "CarliniWagner",
    "DecoupledDirectionNorm",
    "EvasiveCarliniWagner",
    "FastMinimumNorm",
    "ProjectedGradient",
]
