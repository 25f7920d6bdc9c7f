"""Optimizers and learning rates in fractions of a run, so that any length fits."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from tvkeras import checks

Tensor = Any
Schedule: TypeAlias = keras.optimizers.schedules.LearningRateSchedule

UNDECAYED = ("beta", "bias", "gamma")  # the names of BatchNorm's and bias weights


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


@keras.saving.register_keras_serializable("tvkeras")
class Triangle(Schedule):
    """A rate that climbs linearly to its peak and falls linearly to its end.

    Args:
        start: The first rate.
        peak: The highest.
        end: The last.
        climb: Steps to the peak.
        steps: Steps to the end.
    """

    def __init__(self, start: float, peak: float, end: float, climb: int, steps: int) -> None:
        super().__init__()
        self._config = {"start": start, "peak": peak, "end": end, "climb": climb, "steps": steps}

    def __call__(self, step: Tensor) -> Tensor:
        """The rate at a step, a scalar."""
        start, peak, end, climb, steps = self._config.values()
        step = ops.minimum(ops.cast(step, "float32"), steps)
        rising = start + (peak - start) * step / climb
        falling = peak + (end - peak) * (step - climb) / (steps - climb)
        return ops.where(step < climb, rising, falling)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras's serialisation."""
        return self._config


def triangle(
    total_steps: int,
    *,
    learning_rate: float = 1.5,
    warmup: float = 0.23,
    start: float = 0.2,
    end: float = 0.07,
) -> Schedule:
    """Linear warm-up to `learning_rate`, then a linear fall: for runs of few epochs.

    Args:
        total_steps: Steps of the run.
        learning_rate: The highest rate.
        warmup: Fraction of the run that the rate climbs.
        start: The first rate, as a fraction of the highest.
        end: The last rate, as a fraction of the highest.

    Reference: Jordan (2024), "94% on CIFAR-10 in 3.29 seconds", arXiv:2404.00498.
    """
    for name, value in (("warmup", warmup), ("start", start), ("end", end)):
        checks.number(name, value, minimum=0.0, maximum=1.0)
    rate = checks.number("learning_rate", learning_rate, minimum=0.0)
    climb = min(max(1, round(warmup * total_steps)), max(1, total_steps - 1))
    return Triangle(start * rate, rate, end * rate, climb, max(total_steps, climb + 1))


@keras.saving.register_keras_serializable("tvkeras")
class SGD(keras.optimizers.SGD):
    """`keras.optimizers.SGD` with another rate for BatchNorm's biases.

    Args:
        *arguments: As in Keras.
        bias_rate: Factor on the rate of variables named "beta".
        **kwargs: As in Keras.
    """

    def __init__(self, *arguments: Any, bias_rate: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        self.bias_rate = bias_rate

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        """Keras's own step at the variable's rate."""
        # Under TensorFlow `variable` is the backend's own, of another name.
        name = self._trainable_variables[self._get_variable_index(variable)].name
        factor = self.bias_rate if name == "beta" else 1.0
        super().update_step(gradient, variable, learning_rate * factor)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras's serialisation."""
        return {**super().get_config(), "bias_rate": self.bias_rate}


def sgd(
    total_steps: int,
    *,
    schedule: Callable[[int], Schedule] = step_decay,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 5e-3,
    bias_rate: float = 1.0,
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
            5e-3 here. BatchNorm's and bias weights do not decay.
        bias_rate: Factor on the learning rate of BatchNorm's biases.
        clip_norm: Largest global norm of the gradient, or None.
    """
    checks.number("bias_rate", bias_rate, minimum=0.0)
    arguments: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov}
    optimizer = SGD(
        schedule(total_steps),
        weight_decay=weight_decay,
        global_clipnorm=clip_norm,
        bias_rate=bias_rate,
        **arguments,
    )
    optimizer.exclude_from_weight_decay(var_names=UNDECAYED)
    return optimizer
