"""Total-variation and Lipschitz regularisation of the loss.

mean_i l_i + tv_weight * mean_i ||grad l_i||_* + lipschitz_weight * max_i ||grad l_i||_*
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import keras
from keras import ops

from tvkeras import backends, checks, norms
from tvkeras.defenses.base import Defense, Outputs, TrainingBatch, Undefended, Update, batch_mean

Tensor = Any
_End: TypeAlias = tuple[Tensor, Sequence[Tensor]]  # of the quotients: value and gradients

# The smallest usable fd_step. An l1 displacement sits in one pixel, whose rounding weighs most.
# `python -m benchmarks.precision` prints the errors behind it.
MIN_FD_STEP = {
    "float32": {"l1": 1e-4, "l2": 1e-4, "linf": 1e-4},
    "float16": {"l1": 0.2, "l2": 0.05, "linf": 0.05},
    "bfloat16": {"l1": 1.0, "l2": 0.1, "linf": 0.1},
}


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TVLipschitz(Defense):
    """Total-variation and Lipschitz regularisation of the loss.

    mean_i l_i + tv_weight * mean_i ||g_i||_* + lipschitz_weight * max_i ||g_i||_*

    where g_i is the gradient of example i's loss with respect to its image and
    each norm is a difference quotient along the steepest direction d_i. With sample
    weights w_i, the losses in all three terms are w_i l_i, and the logged sizes theirs:
    a weight of 2 doubles an example's part of the means, and its size in the maximum. With the
    step t at which t d_i has l2 length `fd_step`, the forward scheme takes two
    forward-backward passes, because

        grad J = (1 - tv_weight / t) grad mean l(x) + tv_weight / t grad mean l(x + t d)

    and the Lipschitz term needs one more row, the image of largest norm, in the
    second pass. A classifier that draws random numbers takes a third pass for the
    Lipschitz term (an appended row would change the dropout masks); "central" always
    takes three.

    Under BatchNorm the appended row takes part in the second pass's statistics, so
    that the two ends of the mean's quotient differ by O(1 / batch size), divided by
    the step: prefer fd_step >= 0.1 when both terms are on, where that is a few
    percent at batches of 64 and more.

    Attributes:
        norm: Norm of the threat model: "l2", "linf" or "l1".
        tv_weight: Weight of the mean, the paper's epsilon; a number or "8/255".
        lipschitz_weight: Weight of the maximum, the paper's lambda.
        fd_step: Finite-difference step: l2 length of the displacement (for linf at
            most that, where an image's gradient has zero entries).
        scheme: "forward" or "central".
        method: "finite_difference", or "double_backprop" for the exact gradient.
        penalty_fraction: Share of each batch, drawn at random, that is penalised.
            The mean keeps its expectation, the maximum is that of the share. The
            cost is 1 + 2 penalty_fraction passes.
        penalty_every: Penalises one step in so many, with weights so many times as large,
            which keeps the expectation; the others are plain.

    Raises:
        ValueError: For an illegal argument.

    Reference: Finlay, Oberman & Abbasi (2019), arXiv:1808.09540; Finlay & Oberman
    (2019), arXiv:1905.11468; Karras et al. (2020), arXiv:1912.04958, for
    `penalty_every`.
    """

    norm: str = "l2"
    tv_weight: float | str = 0.1
    lipschitz_weight: float = 0.0
    fd_step: float = 1e-2
    scheme: str = "forward"
    method: str = "finite_difference"
    penalty_fraction: float = 1.0
    penalty_every: int = 1

    penalties: ClassVar[tuple[str, ...]] = ("total_variation", "lipschitz")

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, norms.DUALS)
        checks.epsilon(self.tv_weight, "tv_weight")
        checks.number("lipschitz_weight", self.lipschitz_weight, minimum=0.0)
        checks.number("fd_step", self.fd_step, minimum=0.0, exclusive=True)
        checks.one_of("scheme", self.scheme, ("forward", "central"))
        checks.one_of("method", self.method, ("finite_difference", "double_backprop"))
        checks.number(
            "penalty_fraction", self.penalty_fraction, minimum=0.0, maximum=1.0, exclusive=True
        )
        checks.whole_number("penalty_every", self.penalty_every, minimum=1)
        if self.penalty_every > 1 and self.penalty_fraction < 1.0:
            raise ValueError(
                "penalty_every must be 1 with a penalty_fraction, got "
                f"penalty_every={self.penalty_every}, penalty_fraction={self.penalty_fraction}. "
                "Save by one of them."
            )
        if self.penalty_fraction < 1.0 and self.method == "double_backprop":
            raise ValueError(
                "penalty_fraction must be 1 with method='double_backprop', the exact reference, "
                f"got penalty_fraction={self.penalty_fraction}."
            )

    @property
    def passes(self) -> float:
        """Forward-backward passes over a batch in one step, without dropout."""
        passes = 3.0 if self.scheme == "central" else 2.0
        if self.penalty_fraction < 1.0:
            passes = 1.0 + passes * self.penalty_fraction
        return (passes + self.penalty_every - 1) / self.penalty_every

    def check_precision(self, compute_dtype: str) -> None:
        """Raises ValueError if rounding swamps the difference quotient.

        The quotient divides a difference of losses by the step, so that a low
        precision needs a longer one.
        """
        smallest = MIN_FD_STEP.get(compute_dtype, {}).get(self.norm, 0.0)
        if self.method == "finite_difference" and self.fd_step < smallest:
            raise ValueError(
                f"fd_step must be >= {smallest} when the classifier computes in {compute_dtype} "
                f"(rounding is divided by the step), got fd_step={self.fd_step}. "
                f"Use fd_step={smallest}, or compute in float32."
            )

    def update(self, batch: TrainingBatch) -> Update:
        """Gradient of the objective; the moving statistics are those of the clean pass."""
        if self.penalty_every > 1:
            return self._every_so_often(batch)
        if self.method == "double_backprop":
            return self._double_backprop(batch)
        if self.penalty_fraction < 1.0:
            return self._of_a_share(batch)
        clean, g = _clean_pass(batch)
        return self._penalised(clean, batch, clean, g)

    def _penalised(self, plain: Update, batch: TrainingBatch, clean: Update, g: Tensor) -> Update:
        """`plain`, plus both terms of a batch: what its losses gain from x to x + t d, over t."""
        sizes = norms.dual_length(g, self.norm)
        steepest, lipschitz, share = batch.maximum(sizes)
        if batch.sample_weight is not None:
            share = share * ops.take(batch.sample_weight, steepest)
        # The t at which t d has l2 length fd_step, for a d without zero entries.
        entries = math.prod(batch.images.shape[1:]) if self.norm == "linf" else 1
        t = self.fd_step / math.sqrt(entries)
        t_d = t * norms.steepest_direction(g, self.norm)
        end = functools.partial(self._end, batch, steepest, share)

        span, append = t, False
        if self.scheme == "central":
            span = 2 * t
            base = end(span, batch.images - t_d, clean.gradients)
        elif self.lipschitz_weight and batch.stochastic:
            base = end(span, batch.images, clean.gradients)  # both terms on the same masks
        else:
            # Two passes: the clean one is the base, but for that of x_k, which is appended.
            append = bool(self.lipschitz_weight)
            ratio = batch.strength * checks.epsilon(self.tv_weight) / t
            base = ratio * clean.loss, [ratio * gradient for gradient in clean.gradients]

        # Taken off first: one set of gradients, not two, then lives through the last pass.
        rest = [p - b for p, b in zip(plain.gradients, base[1], strict=True)]
        ahead = end(span, batch.images + t_d, rest, append=append)
        return plain._replace(
            gradients=[r + a for r, a in zip(rest, ahead[1], strict=True)],
            loss=plain.loss - base[0] + ahead[0],
            penalties={"total_variation": batch_mean(sizes), "lipschitz": lipschitz},
        )

    def _end(
        self,
        batch: TrainingBatch,
        steepest: Tensor,
        share: Tensor | float,
        span: float,
        images: Tensor,
        previous: Sequence[Tensor],
        append: bool = False,
    ) -> _End:
        """(tv_weight mean l + lipschitz_weight l_k) / span at `images`, and its gradient.

        It waits for the gradients of the `previous` pass, whose activations are then gone:
        run at the same time, two passes would need memory for both. With `append`, x_k
        itself is one row more, whose loss is taken from l_k.
        """
        images = backends.after(images, previous)

        def weighted(trainable: Sequence[Tensor]) -> tuple[Tensor, None]:
            outputs = batch.outputs(trainable, images, steepest if append else None)
            value = batch.strength * checks.epsilon(self.tv_weight) * outputs.loss
            if self.lipschitz_weight:
                peak = ops.take(outputs.example_loss, steepest)
                if append:
                    peak = peak - outputs.example_loss[-1]
                value = value + batch.strength * self.lipschitz_weight * share * peak
            return value / span, None

        value, _, (gradients,) = batch.gradient(weighted, batch.trainable)
        return value, gradients

    # ---- Variants ----------------------------------------------------------------------
    def _of_a_share(self, batch: TrainingBatch) -> Update:
        """The plain update of the batch, plus the terms of a random share of it."""
        plain = Undefended().update(batch)
        batch = batch.subset(self.penalty_fraction)
        batch = dataclasses.replace(batch, images=backends.after(batch.images, plain.gradients))
        return self._penalised(plain, batch, *_clean_pass(batch))

    def _every_so_often(self, batch: TrainingBatch) -> Update:
        """Every so many steps the penalised update, else the plain one, which measures none."""
        always = dataclasses.replace(self, penalty_every=1)
        batch = dataclasses.replace(batch, strength=batch.strength * self.penalty_every)

        def plain() -> Update:
            update = Undefended().update(batch)
            unknown = ops.full((), math.nan, batch.images.dtype)
            return update._replace(penalties=dict.fromkeys(self.penalties, unknown))

        due = ops.equal(batch.step % self.penalty_every, 0)
        return ops.cond(due, lambda: always.update(batch), plain)

    def _double_backprop(self, batch: TrainingBatch) -> Update:
        def objective(trainable: Sequence[Tensor]) -> tuple[Tensor, Any]:
            def loss(images: Tensor) -> tuple[Tensor, Outputs]:
                outputs = batch.outputs(trainable, images)
                return outputs.loss, outputs

            _, outputs, (image_gradient,) = batch.gradient(loss, batch.images)
            sizes = norms.dual_length(batch.input_gradient(image_gradient), self.norm)
            steepest, lipschitz, share = batch.maximum(sizes)
            penalties = {"total_variation": batch_mean(sizes), "lipschitz": lipschitz}
            mean = batch.strength * checks.epsilon(self.tv_weight) * penalties["total_variation"]
            peak = batch.strength * self.lipschitz_weight * share * ops.take(sizes, steepest)
            return outputs.loss + mean + peak, (outputs, penalties)

        loss, (outputs, penalties), (gradients,) = batch.gradient(objective, batch.trainable)
        return Update(gradients, loss, outputs.logits, outputs.state, penalties)


def _clean_pass(batch: TrainingBatch) -> tuple[Update, Tensor]:
    """One backward pass: the mean loss's update, and each loss's gradient for its image."""

    def objective(trainable: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Outputs]:
        outputs = batch.outputs(trainable, images)
        return outputs.loss, outputs

    loss, outputs, (gradients, image_gradient) = batch.gradient(
        objective, batch.trainable, batch.images
    )
    return Update(gradients, loss, outputs.logits, outputs.state), batch.input_gradient(
        image_gradient
    )
