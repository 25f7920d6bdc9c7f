"""Measurements of trained classifiers, and their figures."""

from tvkeras.evaluation.figures import error_curves
from tvkeras.evaluation.measure import measure

__all__ = ["error_curves", "measure"]
