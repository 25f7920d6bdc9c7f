"""What training minimises: one frozen dataclass a defence."""

from tvkeras.defenses.adversarial import TRADES, AdversarialTraining
from tvkeras.defenses.base import Defense, Outputs, TrainingBatch, Undefended, Update
from tvkeras.defenses.tv_lipschitz import MIN_FD_STEP, TVLipschitz

__all__ = [
    "MIN_FD_STEP",
    "TRADES",
    "AdversarialTraining",
    "Defense",
    "Outputs",
    "TVLipschitz",
    "TrainingBatch",
    "Undefended",
    "Update",
]
