"""Averages of the weights along a run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from tvkeras import checks

Tensor = Any


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookahead:
    """An average of the weights that training itself goes on from.

    Every few steps, and at the end of an epoch, the average moves towards the weights, and
    they are set to it:

        average <- k average + (1 - k) weights,   weights <- average

    with k = decay^every (step / steps)^3: hardly at all while the rate is high, over the
    last few tens of steps at the end. (Steps that float16's loss scaling skips do not
    count.) BatchNorm's moving statistics are averaged along,
    so that the weights that are validated, chosen, saved and published are the average,
    and its statistics.

    Attributes:
        steps: Steps of the run.
        epoch_steps: Those of an epoch; by default of the run.
        every: Steps between averages, counted from the beginning of an epoch.
        decay: What a step keeps of the average at the end of the run.

    Raises:
        ValueError: For an illegal argument.

    Reference: Zhang et al. (2019), arXiv:1907.08610; with this k, Jordan (2024),
    arXiv:2404.00498.
    """

    steps: int
    epoch_steps: int | None = None
    every: int = 5
    decay: float = 0.95

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.whole_number("steps", self.steps, minimum=1)
        if self.epoch_steps is not None:
            checks.whole_number("epoch_steps", self.epoch_steps, minimum=1)
        checks.whole_number("every", self.every, minimum=1)
        checks.number("decay", self.decay, minimum=0.0, maximum=1.0)

    def __call__(
        self, step: Tensor, weights: Sequence[Tensor], averages: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and averages after a step, which is counted from 1."""
        due = step % (self.epoch_steps or self.steps) % self.every == 0
        progress = ops.minimum(ops.cast(step, "float32") / self.steps, 1.0)
        kept = self.decay**self.every * progress**3
        averages = [
            ops.where(due, weight + ops.cast(kept, weight.dtype) * (average - weight), average)
            for weight, average in zip(weights, averages, strict=True)
        ]
        weights = [
            ops.where(due, average, weight)
            for weight, average in zip(weights, averages, strict=True)
        ]
        return weights, averages

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras's serialisation."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Lookahead":
        """The inverse of `get_config`."""
        return cls(**config)
