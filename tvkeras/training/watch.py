"""Looks at every batch of training and evaluation, inside the compiled step and after it."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from tvkeras import inputs
from tvkeras.inputs import Bounds

Tensor = Any

FIRST_STEPS = 3  # of which one must have a penalty


class Watch(keras.metrics.Metric):
    """Counts the images and labels that the gate would not let pass.

    A metric, so that both backends sum it up over steps and devices; its result is
    empty, so that it is never logged.

    Args:
        bounds: Of images that are floats.
    """

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(name="watch", dtype="float32")
        self._bounds = bounds
        self._images = self.add_variable((), "zeros", name="images")
        self._excess = self.add_variable((), "zeros", name="excess")
        self._labels = self.add_variable((), "zeros", name="labels")

    def update_state(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Looks at a batch; of uint8 images there is nothing to see.

        Args:
            images: Shape `(batch, height, width, channels)`.
            labels: Shape `(batch,)` or `(batch, 1)`, or `(batch, num_classes)` for soft
                labels.
            logits: Shape `(batch, num_classes)`.
        """
        if keras.backend.standardize_dtype(images.dtype) != "uint8":
            excess = ops.abs(images - ops.clip(images, *self._bounds))
            excess = ops.mean(ops.cast(excess, "float32"), axis=tuple(range(1, len(images.shape))))
            self._images.assign_add(_count(ops.equal(excess, 0)))  # NaN is not
            self._excess.assign_add(ops.sum(excess))
        if len(labels.shape) == 1 or labels.shape[-1] == 1:
            classes = ops.cast(ops.reshape(labels, (-1,)), "float32")
            legal = ops.logical_and(classes >= 0, classes < logits.shape[-1])
            legal = ops.logical_and(legal, ops.equal(ops.floor(classes), classes))
        else:
            legal = ops.all(labels >= 0, axis=-1)
        self._labels.assign_add(_count(legal))

    def result(self) -> dict[str, Tensor]:
        """Nothing to log."""
        return {}

    def check(self) -> None:
        """Raises ValueError if there was a bad image or label since the last reset."""
        images, excess, labels = (
            float(ops.convert_to_numpy(variable))
            for variable in (self._images, self._excess, self._labels)
        )
        if images:
            raise ValueError(
                f"images must be finite and lie in {self._bounds}, got {images:.0f} that do not, "
                f"whose pixels lie {excess / images:.3g} beyond on average. "
                f"{inputs.out_of_bounds_hint(self._bounds)}"
            )
        if labels:
            raise ValueError(
                "labels must be whole numbers, from 0 to less than the classifier's outputs (or "
                f"rows of weights, none negative), got {labels:.0f} that are not."
            )


class Guard(keras.callbacks.Callback):
    """Stops a `RobustClassifier` on images, labels or penalties that mean nothing.

    It looks after 1, 2, 4, 8, ... steps, since to look is to wait for them, and when
    the metrics are about to be reset.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0
        self._penalised = False
        self._trains = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Notes that evaluations are validations."""
        self._trains = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Looks at the penalty of the first steps, and at the images now and then."""
        self._steps += 1
        if not self._penalised and self._steps <= FIRST_STEPS:
            self._check_penalty()
        if self._steps & (self._steps - 1) == 0:
            self.model.watch.check()

    def on_test_begin(self, logs: Any = None) -> None:
        """Looks at what was trained on before the metrics are those of a validation."""
        if self._trains:
            self.model.watch.check()

    def on_test_end(self, logs: Any = None) -> None:
        """Looks at what was evaluated."""
        self.model.watch.check()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Looks at what was trained on."""
        self.model.watch.check()

    def _check_penalty(self) -> None:
        mean = self.model.penalty_metrics.get("total_variation")
        if mean is None:
            return
        total, count = (float(ops.convert_to_numpy(v)) for v in (mean.total, mean.count))
        self._penalised = total != 0 or count == 0  # of float16's overflows nothing is counted
        if not self._penalised and self._steps == FIRST_STEPS:
            raise ValueError(
                f"total_variation must be above 0, got 0 in the first {FIRST_STEPS} steps: no "
                "gradient of the loss reaches the images, and the defence defends nothing. Look "
                "for integers, rounding or stop_gradient in the classifier, for logits so large "
                "that the loss is 0, or for sample weights of 0."
            )


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Inside, TensorFlow's error about a label that is no class becomes a ValueError.

    On a CPU its loss stops at one, before `Guard` can.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"label value of (\S+) .* valid range of \[0, (\d+)\)", str(error))
        if found is None:
            raise
        raise ValueError(
            f"labels must be whole numbers from 0 to {int(found[2]) - 1}, the classifier's "
            f"outputs, got {found[1]}."
        ) from None


def _count(legal: Tensor) -> Tensor:
    """How many are not legal."""
    return ops.sum(ops.cast(ops.logical_not(legal), "float32"))
