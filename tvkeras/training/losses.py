"""The loss of integer labels, smoothed."""

from typing import Any

import keras
from keras import ops

from tvkeras import checks

Tensor = Any


@keras.saving.register_keras_serializable("tvkeras")
class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy of logits at integer labels that are right to `1 - smoothing`.

    (1 - s) l(x, y) + s mean_k l(x, k): Keras smooths one-hot labels alone.

    Args:
        smoothing: s, the share that is spread over all classes.
        name: As in Keras.
        **kwargs: As in Keras.

    Raises:
        ValueError: If `smoothing` is not in [0, 1].

    Reference: Szegedy et al. (2016), arXiv:1512.00567.
    """

    def __init__(
        self, smoothing: float = 0.0, name: str = "smoothed_crossentropy", **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.smoothing = checks.number("smoothing", smoothing, minimum=0.0, maximum=1.0)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Losses of shape `(batch,)`."""
        one_hot = ops.one_hot(ops.reshape(y_true, (-1,)), y_pred.shape[-1], dtype=y_pred.dtype)
        return keras.losses.categorical_crossentropy(
            one_hot, y_pred, from_logits=True, label_smoothing=self.smoothing
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments, for Keras's serialisation."""
        return {**super().get_config(), "smoothing": self.smoothing}
