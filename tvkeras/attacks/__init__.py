"""Attacks on classifiers, compiled, on every backend."""

from tvkeras.attacks.pgd import ProjectedGradient

__all__ = ["ProjectedGradient"]
