"""Attacks on classifiers, compiled, on every backend."""

from tvkeras.attacks.base import Attack, AttackedClassifier, AttackResult
from tvkeras.attacks.pgd import ProjectedGradient

__all__ = ["Attack", "AttackResult", "AttackedClassifier", "ProjectedGradient"]
