"""Projected gradient ascent on the cross-entropy; FGSM is one step of it."""

from typing import Any

import keras
import numpy as np
from keras import ops

from tvkeras import backends, checks, norms

Tensor = Any


class ProjectedGradient:
    """PGD on a classifier in inference mode, compiled once for all radii.

    It starts at the image itself and steps along the steepest direction of the
    threat norm by 2.5 epsilon / steps, so that it can reach the ball's edge and
    come back. (For l1 the steepest direction is one pixel, which may be at its bound
    already: there it is a weak attack.)

    Args:
        classifier: Maps images in [0, 1] to logits.
        norm: Norm of the perturbation: "l2", "linf" or "l1".
        steps: Gradient steps; one is FGSM (and its l2 and l1 relatives), whose
            step is epsilon.

    Raises:
        ValueError: For an illegal argument.

    Reference: Madry et al. (2018), arXiv:1706.06083.
    """

    def __init__(self, classifier: keras.Model, *, norm: str, steps: int = 20) -> None:
        self.norm = checks.one_of("norm", norm, norms.DUALS)
        self.steps = checks.whole_number("steps", steps, minimum=1)
        self._classifier = classifier
        self._call = backends.fast_twin(classifier).stateless_call
        self._attack = backends.compiled(self._ascend)

    def __call__(self, images: np.ndarray, labels: np.ndarray, epsilon: float | str) -> np.ndarray:
        """Adversarial images.

        Args:
            images: float32 in [0, 1], shape `(batch, height, width, channels)`.
            labels: True classes, shape `(batch,)`.
            epsilon: Radius in pixel units; a number or "8/255".

        Returns:
            x_adv, shape of `images`, in [0, 1] and within `epsilon`.
        """
        trainable = [variable.value for variable in self._classifier.trainable_variables]
        state = [variable.value for variable in self._classifier.non_trainable_variables]
        radius = np.float32(checks.epsilon(epsilon))
        arguments = (trainable, state, ops.convert_to_tensor(images), ops.convert_to_tensor(labels))
        return ops.convert_to_numpy(self._attack(*arguments, ops.convert_to_tensor(radius)))

    def _ascend(
        self, trainable: Any, state: Any, images: Tensor, labels: Tensor, epsilon: Tensor
    ) -> Tensor:
        def gradient(x: Tensor) -> Tensor:
            return input_gradient(self._call, trainable, state, x, labels)[2]

        return norms.projected_ascent(
            gradient,
            images,
            norm=self.norm,
            epsilon=epsilon,
            steps=self.steps,
            step_size=epsilon * min(1.0, 2.5 / self.steps),
            start=ops.zeros_like(images),
        )


def input_gradient(
    call: Any, trainable: Any, state: Any, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and its gradient for each image, in inference mode.

    Args:
        call: A classifier's `stateless_call`.
        trainable: Values of its trainable variables.
        state: Values of its other variables.
        images: Shape `(batch, height, width, channels)`.
        labels: Shape `(batch,)`.

    Returns:
        Losses `(batch,)`, logits `(batch, num_classes)`, and the gradient, shape of
        `images`.
    """

    def loss(images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits = ops.cast(call(trainable, state, images, training=False)[0], images.dtype)
        losses = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        return ops.sum(losses), (losses, logits)

    (_, (losses, logits)), (gradient,) = backends.value_and_gradient(loss, (images,))
    return losses, logits, gradient
