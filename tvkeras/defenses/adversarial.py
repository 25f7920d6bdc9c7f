"""Training on adversarial images, and TRADES: clean loss plus divergence on them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from tvkeras import checks, norms
from tvkeras.defenses.base import Defense, Outputs, TrainingBatch, Undefended, Update

Tensor = Any


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Defense):
    """Trains on adversarial images found by projected gradient ascent in each step.

    One step without random start and bounds is total variation with
    fd_step = tv_weight, gradient for gradient: FGSM training for norm="linf",
    the talk's l1 TV. Seven steps with random start are Madry's. The attack sees the
    training-mode network with the same masks, and the moving statistics are those
    of the adversarial images.

    Attributes:
        norm: Norm of the threat model.
        epsilon: Perturbation radius in pixel units; a number or "8/255".
        steps: Gradient steps of the attack.
        step_size: Length of one, by default 2.5 epsilon / steps (epsilon for one).
        random_start: Whether the attack starts from a random point of the ball.
        bounds: Legal pixel values, or None for no clipping; a pixel that the augmentation's
            noise put beyond them may stay where it is.

    Raises:
        ValueError: For an illegal argument.

    Reference: Goodfellow et al. (2015), arXiv:1412.6572; Madry et al. (2018),
    arXiv:1706.06083.
    """

    norm: str = "linf"
    epsilon: float | str = "8/255"
    steps: int = 7
    step_size: float | str | None = None
    random_start: bool = True
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_attack(self)

    @property
    def passes(self) -> float:
        """Forward-backward passes over a batch in one step."""
        return 1.0 + self.steps

    def update(self, batch: TrainingBatch) -> Update:
        """Gradient of the mean loss on the adversarial images."""

        def gradient(images: Tensor) -> Tensor:
            def loss(images: Tensor) -> tuple[Tensor, None]:
                return batch.outputs(batch.trainable, images).loss, None

            _, _, (image_gradient,) = batch.gradient(loss, images)
            return batch.input_gradient(image_gradient)

        start = ops.zeros_like(batch.images)
        if self.random_start:
            radius = checks.epsilon(self.epsilon)
            start = norms.random_in_ball(batch.images, self.norm, radius, batch.seed)
            start = batch.strength * start
        x_adv = _attack(self, gradient, batch.images, start, batch.strength)
        return Undefended().update(dataclasses.replace(batch, images=x_adv))


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TRADES(Defense):
    """Clean loss plus `beta` times the divergence between clean and attacked outputs.

    mean_i l_i + beta * mean_i KL(p(x_i) || p(x_adv_i)), where x_adv maximises the
    divergence by projected gradient ascent from a small Gaussian perturbation.

    Attributes:
        norm: Norm of the threat model.
        epsilon: Perturbation radius in pixel units; a number or "8/255".
        steps: Gradient steps of the attack.
        step_size: Length of one, by default 2.5 epsilon / steps (epsilon for one).
        beta: Weight of the divergence, 1 / lambda in the paper.
        bounds: Legal pixel values, or None for no clipping.

    Raises:
        ValueError: For an illegal argument.

    Reference: Zhang et al. (2019), arXiv:1901.08573.
    """

    norm: str = "linf"
    epsilon: float | str = "8/255"
    steps: int = 10
    step_size: float | str | None = None
    beta: float = 6.0
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_attack(self)
        checks.number("beta", self.beta, minimum=0.0)

    @property
    def passes(self) -> float:
        """Forward-backward passes over a batch in one step, a forward one counted as a third."""
        return 2.0 + self.steps + 1 / 3

    def update(self, batch: TrainingBatch) -> Update:
        """Gradient of the objective; the moving statistics are those of the clean pass."""
        clean_logits = ops.stop_gradient(batch.outputs(batch.trainable, batch.images).logits)

        def gradient(images: Tensor) -> Tensor:
            def divergence(images: Tensor) -> tuple[Tensor, None]:
                logits = batch.outputs(batch.trainable, images).logits
                return batch.mean(_kl_divergence(clean_logits, logits)), None

            _, _, (image_gradient,) = batch.gradient(divergence, images)
            return batch.input_gradient(image_gradient)

        def objective(trainable: Sequence[Tensor]) -> tuple[Tensor, Outputs]:
            clean = batch.outputs(trainable, batch.images)
            attacked = batch.outputs(trainable, x_adv)
            divergence = batch.mean(_kl_divergence(clean.logits, attacked.logits))
            return clean.loss + batch.strength * self.beta * divergence, clean

        shape, dtype = ops.shape(batch.images), batch.images.dtype
        start = keras.random.normal(shape, stddev=1e-3, dtype=dtype, seed=batch.seed)
        x_adv = _attack(self, gradient, batch.images, start)
        loss, clean, (gradients,) = batch.gradient(objective, batch.trainable)
        return Update(gradients, loss, clean.logits, clean.state)


def _check_attack(defense: AdversarialTraining | TRADES) -> None:
    checks.one_of("norm", defense.norm, norms.DUALS)
    checks.epsilon(defense.epsilon)
    checks.whole_number("steps", defense.steps, minimum=1)
    if defense.step_size is not None:
        checks.epsilon(defense.step_size, "step_size")
    if defense.bounds is not None and not defense.bounds[0] < defense.bounds[1]:
        raise ValueError(f"bounds must be (low, high), got bounds={defense.bounds}.")


def _attack(
    defense: AdversarialTraining | TRADES,
    gradient: Callable[[Tensor], Tensor],
    images: Tensor,
    start: Tensor,
    strength: Tensor | float = 1.0,
) -> Tensor:
    epsilon = checks.epsilon(defense.epsilon)
    step_size = epsilon * min(1.0, 2.5 / defense.steps)
    if defense.step_size is not None:
        step_size = checks.epsilon(defense.step_size, "step_size")
    bounds: Any = defense.bounds
    if bounds is not None:  # noisy images lie beyond them: they may stay there, and go no further
        bounds = ops.minimum(images, bounds[0]), ops.maximum(images, bounds[1])
    x_adv = norms.projected_ascent(
        gradient,
        images,
        norm=defense.norm,
        epsilon=strength * epsilon,
        steps=defense.steps,
        step_size=strength * step_size,
        start=start,
        bounds=bounds,
    )
    return ops.stop_gradient(x_adv)


def _kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(other)), shape `(batch,)`."""
    log_p, log_q = ops.log_softmax(logits), ops.log_softmax(other)
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
