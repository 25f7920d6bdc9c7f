"""Optimizers and learning-rate schedules in fractions of a run, so that any length fits."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras

from tvkeras import checks

Schedule: TypeAlias = keras.optimizers.schedules.LearningRateSchedule


def step_decay(
    total_steps: int,
    *,
    learning_rate: float = 0.1,
    boundaries: Sequence[float] = (0.3, 0.6, 0.8),
    factors: Sequence[float] = (1.0, 0.2, 0.04, 0.008),
) -> Schedule:
    """A rate that drops at fractions of the run.

    Args:
        total_steps: Steps of the run.
        learning_rate: The rate that `factors` multiply.
        boundaries: Fractions of the run where the rate changes; the default is
            epochs 60, 120 and 160 of 200.
        factors: One more than there are boundaries.

    Raises:
        ValueError: If the lengths do not fit.
    """
    checks.number("learning_rate", learning_rate, minimum=0.0)
    if len(factors) != len(boundaries) + 1:
        raise ValueError(
            f"factors must have one entry more than boundaries, got {len(factors)} factors "
            f"and {len(boundaries)} boundaries."
        )
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [round(fraction * total_steps) for fraction in boundaries],
        [learning_rate * factor for factor in factors],
    )


def one_cycle(total_steps: int, *, learning_rate: float = 0.2, warmup: float = 0.2) -> Schedule:
    """Linear warm-up to `learning_rate`, then a cosine to zero: for short runs.

    Args:
        total_steps: Steps of the run.
        learning_rate: The highest rate.
        warmup: Fraction of the run that the rate climbs.

    Reference: Smith & Topin (2018), arXiv:1708.07120.
    """
    checks.number("learning_rate", learning_rate, minimum=0.0)
    checks.number("warmup", warmup, minimum=0.0, maximum=1.0)
    climb = max(1, round(warmup * total_steps))
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=max(1, total_steps - climb),
        warmup_target=learning_rate,
        warmup_steps=climb,
    )


def sgd(
    total_steps: int,
    *,
    schedule: Callable[[int], Schedule] = step_decay,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 5e-3,
    clip_norm: float | None = None,
) -> keras.optimizers.Optimizer:
    """Stochastic gradient descent with momentum.

    Args:
        total_steps: Steps of the run.
        schedule: Maps `total_steps` to a schedule.
        momentum: Of the gradient.
        nesterov: Whether to look ahead.
        weight_decay: Keras shrinks the weights by learning_rate * weight_decay
            outside the momentum. A decay of 5e-4 that is added to the gradient, as
            in the reference code, passes through a momentum of 0.9 ten times over:
            5e-3 here.
        clip_norm: Largest global norm of the gradient, or None.
    """
    arguments: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov}
    return keras.optimizers.SGD(
        schedule(total_steps), weight_decay=weight_decay, global_clipnorm=clip_norm, **arguments
    )
