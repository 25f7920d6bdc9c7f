"""What attacks are made of: margins, successes, and what is kept of a search."""

from typing import NamedTuple

import numpy as np
from keras import ops

from tvkeras.inference import Tensor


def class_logits(logits: Tensor, classes: Tensor) -> Tensor:
    """The logit of one class of each example, shape `(batch,)`."""
    chosen = ops.one_hot(classes, logits.shape[1], dtype="bool")
    return ops.sum(ops.where(chosen, logits, 0.0), axis=1)


def example_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label less the largest of the others, shape `(batch,)`."""
    others = ops.where(ops.one_hot(labels, logits.shape[1], dtype="bool"), -np.inf, logits)
    return class_logits(logits, labels) - ops.max(others, axis=1)


def tempered(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits over a temperature of each example that leaves it a margin of at most 10.

    z / T with T = max(m / 10, 1), m the example's margin; no gradient flows through T.
    For attacks that climb the cross-entropy: in float32 its gradient forgets the label's
    logit at margins over 16, and is 0 over 103. Where m <= 10, T = 1: loss and gradient
    stay what they are, to the last bit, and no prediction ever changes.

    Args:
        logits: Shape `(batch, num_classes)`.
        labels: Shape `(batch,)`.
    """
    temperature = ops.maximum(example_margins(logits, labels) / 10.0, 1.0)
    return logits / ops.stop_gradient(temperature)[:, None]


def clearance(logits: Tensor) -> Tensor:
    """The margin that rounding cannot bridge, shape `(batch,)`: 1e-5 of the largest logit.

    The classifier that confirms a success is not the fused clone that the attack searched
    with, and is compiled apart: it may round a smaller margin the other way.
    """
    return 1e-5 * ops.max(ops.absolute(logits), axis=-1)


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit is not the label's, shape `(batch,)`."""
    return ops.cast(ops.argmax(logits, axis=1), labels.dtype) != labels


def clearly_misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether another logit is larger than the label's by the `clearance`, shape `(batch,)`."""
    return example_margins(logits, labels) < -clearance(logits)


def by_example(values: Tensor) -> Tensor:
    """Values of shape `(batch,)` as `(batch, 1, 1, 1)`, to go with images."""
    return ops.reshape(values, (-1, 1, 1, 1))


def select(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The images of `one` where `mask`, shape `(batch,)`, is true, else those of `other`."""
    return ops.where(by_example(mask), one, other)


class Standing(NamedTuple):
    """Which examples stand, what broke the others, and the queries made for each."""

    standing: Tensor
    x_adv: Tensor
    queries: Tensor

    @classmethod
    def before(cls, logits: Tensor, images: Tensor, labels: Tensor) -> "Standing":
        """The same when nothing but the images' own logits is known."""
        right = ops.logical_not(misclassified(logits, labels))
        return cls(right, images, ops.ones_like(labels, dtype="int32"))

    def after(self, x: Tensor, broken: Tensor, calls: int = 1) -> "Standing":
        """The same once `x` was tried, which broke some, for so many model calls."""
        return Standing(
            standing=ops.logical_and(self.standing, ops.logical_not(broken)),
            x_adv=select(ops.logical_and(self.standing, broken), x, self.x_adv),
            queries=self.queries + calls * ops.cast(self.standing, "int32"),
        )


class Nearest(NamedTuple):
    """The nearest success so far of each example, and its distance."""

    x_adv: Tensor
    distance: Tensor

    def after(self, x_adv: Tensor, distance: Tensor, success: Tensor) -> "Nearest":
        """The same once `x_adv` was tried; all others of shape `(batch,)`."""
        nearer = ops.logical_and(success, distance <= self.distance)
        x_adv = select(nearer, x_adv, self.x_adv)
        return Nearest(x_adv, ops.where(nearer, distance, self.distance))
