"""Measurements of trained classifiers, whether they can be believed, and their figures."""

from tvkeras.evaluation.audit import Audit, audit
from tvkeras.evaluation.case import Check
from tvkeras.evaluation.figures import error_curves
from tvkeras.evaluation.measure import measure

__all__ = ["Audit", "Check", "audit", "error_curves", "measure"]
