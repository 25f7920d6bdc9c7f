"""Measurements of trained classifiers."""

from tvkeras.evaluation.measure import measure

__all__ = ["measure"]
