"""FAB: walks along a linearised decision boundary, always drawn back to the image."""

import dataclasses
from typing import Any, ClassVar

from keras import ops

from tvkeras import norms
from tvkeras.attacks.base import Attack
from tvkeras.attacks.parts import Standing, by_example, class_logits, misclassified, select
from tvkeras.inference import Logits, Randomness, Tensor, input_gradient

_OVERSHOOT = 1.05
_LARGEST_PULL = 0.1
_BACKWARD = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastAdaptiveBoundary(Attack):
    """Targeted FAB (FAB-T), at a fixed epsilon.

    FAB looks for the smallest perturbation; here it stops an example as soon as one is
    no larger than epsilon. A step linearises the boundary between label and target,
    projects the iterate and the image onto it inside [0, 1], overshoots a little,
    and mixes the two points; from a misclassified point it goes back towards the image
    by a tenth of the way. No random numbers.

    Attributes:
        norm: Norm of the perturbation: "l2" or "linf".
        steps: Steps for each target; each takes a gradient and a forward pass.
        targets: Classes whose boundaries are walked along, in the order of the
            image's logits; at most all the others.

    Reference: Croce & Hein (2020), arXiv:1907.02044; the targeted form and the use at
    a fixed epsilon: arXiv:2003.01690.
    """

    steps: int = 100
    targets: int = 9

    fixed_epsilon: ClassVar[bool] = True
    legal_norms: ClassVar[tuple[str, ...]] = ("l2", "linf")

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """One target after another, until every example has failed or all are done."""
        clean = logits(images)
        targets = min(self.targets, clean.shape[1] - 1)
        order = ops.top_k(clean, targets + 1)[1]

        def unfinished(step: Tensor, x: Tensor, state: Standing) -> Tensor:
            return ops.logical_and(step < targets * self.steps, ops.any(state.standing))

        def iterate(step: Tensor, x: Tensor, state: Standing) -> tuple[Any, ...]:
            x = ops.where(step % self.steps == 0, images, x)
            target = ops.take(order, step // self.steps + 1, axis=1)
            x = self._step(logits, x, images, labels, target)
            missed = misclassified(logits(x), labels)
            found = ops.logical_and(missed, norms.length(x - images, self.norm) <= epsilon)
            state = state.after(x, found, calls=2)
            return step + 1, select(missed, images + _BACKWARD * (x - images), x), state

        start = (ops.zeros((), "int32"), images, Standing.before(clean, images, labels))
        state = ops.while_loop(unfinished, iterate, start)[2]
        return state.x_adv, state.queries

    def _step(
        self, logits: Logits, x: Tensor, images: Tensor, labels: Tensor, target: Tensor
    ) -> Tensor:
        """From x to a mixture of its and the image's projection, beyond the boundary."""

        def difference(outputs: Tensor) -> Tensor:
            return class_logits(outputs, target) - class_logits(outputs, labels)

        value, _, normal = input_gradient(logits, x, difference)
        value_at_image = value + ops.sum(normal * (images - x), axis=(1, 2, 3))
        from_x = to_hyperplane(x, normal, value, self.norm)
        from_image = to_hyperplane(images, normal, value_at_image, self.norm)
        far, near = (ops.maximum(norms.length(d, self.norm), 1e-8) for d in (from_x, from_image))
        pull = by_example(ops.minimum(far / (far + near), _LARGEST_PULL))
        mixed = (1 - pull) * (x + _OVERSHOOT * from_x) + pull * (images + _OVERSHOOT * from_image)
        return ops.clip(mixed, 0.0, 1.0)


def to_hyperplane(x: Tensor, normal: Tensor, value: Tensor, norm: str) -> Tensor:
    """Smallest d that takes x to a hyperplane and stays inside [0, 1].

    Minimises ||d||_norm subject to value + <normal, d> = 0 and 0 <= x + d <= 1. Each
    coordinate moves by min(t u_i, room_i) with u = |normal| for l2, 1 for linf (0 where
    normal_i = 0); what that moves the value is piecewise linear in t, so t is exact.

    Args:
        x: Shape `(batch, height, width, channels)`, in [0, 1].
        normal: Shape of `x`.
        value: Shape `(batch,)`: the linear function at `x`.
        norm: "l2" or "linf".

    Returns:
        d, shape of `x`: as far as the bounds allow where the hyperplane is out of
        reach; 0 where `normal` is 0.

    Reference: Croce & Hein (2020), arXiv:1907.02044.
    """
    size = norms.length(normal, "linf")
    safe = ops.where(size > 0, size, 1.0)
    flat = ops.reshape(normal / by_example(safe), (-1, x.shape[1] * x.shape[2] * x.shape[3]))
    way = -ops.sign(flat) * ops.where(value < 0, -1.0, 1.0)[:, None]
    points = ops.reshape(x, ops.shape(flat))
    room = ops.where(way > 0, 1 - points, points)
    steepness = ops.abs(flat)
    rate = steepness if norm == "l2" else ops.abs(ops.sign(flat))
    weight = steepness * rate
    limit = ops.where(rate > 0, room / ops.where(rate > 0, rate, 1.0), 0.0)

    order = ops.argsort(limit, axis=1)
    limit, weight = (ops.take_along_axis(part, order, axis=1) for part in (limit, weight))
    slope = ops.flip(ops.cumsum(ops.flip(weight, axis=1), axis=1), axis=1)  # of coordinates left
    spent = ops.cumsum(weight * limit, axis=1) - weight * limit  # by those at their bound
    needed = (ops.abs(value) / safe)[:, None]
    bound = ops.sum(ops.cast(spent + slope * limit < needed, "int32"), axis=1, keepdims=True)
    last = ops.minimum(bound, order.shape[1] - 1)
    slope, spent = (ops.take_along_axis(part, last, axis=1) for part in (slope, spent))
    t = (needed - spent) / ops.where(slope > 0, slope, 1.0)
    reachable = bound < order.shape[1]
    d = way * ops.where(reachable, ops.minimum(t * rate, room), ops.where(rate > 0, room, 0.0))
    return ops.reshape(d, ops.shape(x))
