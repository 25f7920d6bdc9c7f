"""What the checks of an audit are given."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tvkeras.attacks import Attack, AttackResult, ProjectedGradient
from tvkeras.evaluation.card import Check
from tvkeras.evaluation.suite import broken
from tvkeras.inference import CompiledClassifier

ORDERS = {"l2": 2, "linf": np.inf}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What the checks look at: a classifier, images in [0, 1], PGD and its results.

    `worst_case` is the distance at which any attack of a card broke each image.
    """

    model: CompiledClassifier
    images: np.ndarray
    labels: np.ndarray
    attack: ProjectedGradient
    epsilons: tuple[float, ...]
    worst_case: np.ndarray
    seed: int
    batch_size: int

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The classifier's own logits, by none of the attacks' functions."""
        images = self.model.own_bounds.native(images)
        outputs = self.model.classifier.predict(images, batch_size=self.batch_size, verbose=0)
        return np.asarray(outputs, "float32")

    def wrong(self, images: np.ndarray) -> np.ndarray:
        """Which images the classifier itself misclassifies, shape `(count,)`."""
        return self.predict(images).argmax(axis=1) != self.labels

    def run(
        self, attack: Attack, epsilon: float | None, model: keras.Model | CompiledClassifier
    ) -> AttackResult:
        """Runs an attack on all images."""
        return attack(
            model,
            self.images,
            self.labels,
            epsilon=epsilon,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def fooled(self, attack: Attack, epsilon: float | None) -> np.ndarray:
        """Which images an attack on the classifier fools, shape `(count,)`."""
        return self.run(attack, epsilon, self.model).success

    def by_batch(
        self, key: Any, function: Callable[..., Any], images: np.ndarray, *arrays: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """A compiled `function(logits, *tensors)` of all images: see `CompiledClassifier`."""
        return self.model.over(key, function, images, *arrays, batch_size=self.batch_size)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """Of the images, shape `(count, num_classes)`."""
        return self.predict(self.images)

    @functools.cached_property
    def wrong_before(self) -> np.ndarray:
        """Which images are misclassified without an attack, shape `(count,)`."""
        return self.logits.argmax(axis=1) != self.labels

    @functools.cached_property
    def results(self) -> dict[float, AttackResult]:
        """Those of PGD at each epsilon."""
        return {epsilon: self.run(self.attack, epsilon, self.model) for epsilon in self.epsilons}

    @functools.cached_property
    def decisive(self) -> float:
        """The epsilon where PGD comes nearest to fooling half of the right images.

        There the strengths of two attacks differ most; the largest where several are
        as near, as where PGD fools none.
        """
        half = (1 + self.wrong_before.mean()) / 2
        return min(
            reversed(self.epsilons), key=lambda e: abs(self.results[e].success.mean() - half)
        )

    def only_by_other(self, other: np.ndarray) -> float:
        """Share of images that another attack fools at the decisive epsilon, and PGD not."""
        return float((other & ~self.results[self.decisive].success).mean())

    @property
    def quoted(self) -> np.ndarray:
        """Which images a card's attacks broke at the decisive epsilon, shape `(count,)`."""
        return broken(self.worst_case, self.decisive)


Limit = float | Callable[[Case], float]


def few(share: float) -> Callable[[Case], float]:
    """The limit `share`, or one image of all if that is more."""
    return lambda case: max(share, 1 / len(case.labels))


def check(
    warn: Limit, fail: Limit, advice: str
) -> Callable[[Callable[..., float]], Callable[..., Check]]:
    """Makes a check of a function that measures something on a case.

    It warns above `warn`; it fails above `fail`, and of what is not a number.
    """

    def decorated(measure: Callable[..., float]) -> Callable[..., Check]:
        @functools.wraps(measure)
        def graded(case: Case, *others: Any) -> Check:
            figure = float(measure(case, *others))
            low, high = (at(case) if callable(at) else at for at in (warn, fail))
            status = "pass" if figure <= low else "warn" if figure <= high else "fail"
            finite = figure if math.isfinite(figure) else None
            return Check(measure.__name__, status, finite, advice)

        return graded

    return decorated
