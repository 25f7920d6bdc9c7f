"""Detects attacked images by the size of the classifier's derivative there."""

import dataclasses
from typing import Any

import keras
import numpy as np

from tvkeras import checks, norms
from tvkeras.attacks import EvasiveCarliniWagner
from tvkeras.inference import STATISTICS, CompiledClassifier, Logits, gradient_norm


@keras.saving.register_keras_serializable("tvkeras")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientNormDetector:
    """Rejects an image whose gradient norm reaches a threshold.

    The gradient is that of the loss at the *predicted* label ("loss",
    ||grad_x l(x, k)||_*), or the largest row of the Jacobian of the probabilities
    ("model", max_k ||grad_x p_k(x)||_*; for norm="l2" it is ||grad f||_{2,inf}).
    `get_config` gives all that it is, for JSON; `from_config` makes it of that.

    Attributes:
        norm: Threat norm, whose dual measures the gradients.
        statistic: "loss" or "model".
        threshold: The smallest size that is rejected.
        false_positive_rate: Share of clean images that the threshold was fitted to
            reject; None where it was given.

    Raises:
        ValueError: For an illegal argument.

    Example:
        detector = GradientNormDetector.fit(classifier, held_out_images)
        detector.detects(classifier, images)

    Reference: Finlay et al. (2019), arXiv:1808.09540.
    """

    norm: str
    statistic: str
    threshold: float
    false_positive_rate: float | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, norms.DUALS)
        checks.one_of("statistic", self.statistic, STATISTICS)
        checks.number("threshold", self.threshold, minimum=0.0, exclusive=True)
        if self.false_positive_rate is not None:
            checks.number("false_positive_rate", self.false_positive_rate, minimum=0.0, maximum=1.0)

    def get_config(self) -> dict[str, Any]:
        """The attributes, which JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GradientNormDetector":
        """The detector of such attributes."""
        return cls(**config)

    @classmethod
    def fit(
        cls,
        classifier: keras.Model | CompiledClassifier,
        clean_images: np.ndarray,
        false_positive_rate: float = 0.05,
        *,
        norm: str = "l2",
        statistic: str = "loss",
        batch_size: int = 250,
    ) -> "GradientNormDetector":
        """The detector that rejects a given share of clean images.

        The threshold is the j-th largest of the n clean scores,
        j = floor(false_positive_rate (n + 1)): another clean image reaches it with
        probability j / (n + 1), over the draw of all, where scores do not tie.

        Args:
            classifier: Maps images to logits.
            clean_images: Images that neither trained the classifier nor will test it.
            false_positive_rate: Share of clean images to reject, in (0, 1).
            norm: Threat norm, whose dual measures the gradients.
            statistic: "loss" or "model".
            batch_size: Images in a batch, at most.

        Raises:
            ValueError: For an illegal argument, too few images for that rate, or gradients
                that vanish on so many that no threshold exists.
        """
        rate = checks.number("false_positive_rate", false_positive_rate, minimum=0.0, maximum=1.0)
        model = CompiledClassifier.of(classifier)
        clean_images = model.images(clean_images, "clean_images")
        rank = int(rate * (len(clean_images) + 1))
        if not 1 <= rank <= len(clean_images):
            raise ValueError(
                "false_positive_rate (n + 1) must lie between 1 and n for n clean images, got "
                f"false_positive_rate={rate} and n={len(clean_images)}. Use more images."
            )
        scores = gradient_norms(model, clean_images, norm, statistic, batch_size)
        threshold = float(np.sort(scores)[-rank])
        if threshold == 0:
            raise ValueError(
                f"the {statistic!r} gradient is zero on {(scores == 0).mean():.0%} of the clean "
                "images, so that no threshold rejects few of them: the classifier cannot be "
                "guarded this way. Try another statistic; on a card, Detection(statistics=())."
            )
        return cls(norm=norm, statistic=statistic, threshold=threshold, false_positive_rate=rate)

    def scores(
        self,
        classifier: keras.Model | CompiledClassifier,
        images: np.ndarray,
        batch_size: int = 250,
    ) -> np.ndarray:
        """The size of each image's gradient, shape `(count,)`: see `gradient_norms`."""
        return gradient_norms(classifier, images, self.norm, self.statistic, batch_size)

    def detects(
        self,
        classifier: keras.Model | CompiledClassifier,
        images: np.ndarray,
        batch_size: int = 250,
    ) -> np.ndarray:
        """Which images are rejected: booleans, shape `(count,)`. A lost gradient is."""
        return ~(self.scores(classifier, images, batch_size) < self.threshold)

    def adaptive_attack(self, **settings: Any) -> EvasiveCarliniWagner:
        """The attack that looks for misclassified images which this detector misses.

        Args:
            **settings: Those of `CarliniWagner`.
        """
        return EvasiveCarliniWagner(
            threshold=self.threshold,
            statistic=self.statistic,
            detector_norm=self.norm,
            **settings,
        )


def gradient_norms(
    classifier: keras.Model | CompiledClassifier,
    images: np.ndarray,
    norm: str,
    statistic: str,
    batch_size: int = 250,
) -> np.ndarray:
    """Size of the classifier's derivative at each image, in batches of one shape.

    What is compiled for it stays with the classifier: later calls compile nothing.

    Args:
        classifier: Maps images to logits.
        images: Floats in the classifier's bounds, by default [0, 1], or uint8; shape
            `(count, height, width, channels)`.
        norm: Threat norm, whose dual measures the gradients.
        statistic: "loss" or "model".
        batch_size: Images in a batch, at most.

    Returns:
        float32, shape `(count,)`.

    Raises:
        ValueError: For an illegal argument, images that are none of the classifier's, or a
            classifier of other than logits.
    """
    checks.one_of("norm", norm, norms.DUALS)
    checks.one_of("statistic", statistic, STATISTICS)

    def sizes(logits: Logits, images: Any) -> tuple[Any]:
        return (gradient_norm(logits, images, norm, statistic)[0],)

    model = CompiledClassifier.kept(classifier)
    key = ("gradient_norms", norm, statistic)
    return model.over(key, sizes, images, batch_size=batch_size)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ROC:
    """What a threshold costs and gains, for every threshold.

    Attributes:
        false_positive_rate: Share of clean images rejected, rising from 0 to 1.
        true_positive_rate: Share of attacked images rejected.
        threshold: The smallest score rejected, falling from inf.
    """

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    threshold: np.ndarray

    def true_positive_rate_at(self, false_positive_rate: float) -> float:
        """Share of attacked images rejected by the best threshold within that rate."""
        allowed = self.false_positive_rate <= false_positive_rate
        return float(self.true_positive_rate[allowed].max())


def roc(clean_scores: np.ndarray, attacked_scores: np.ndarray) -> ROC:
    """The receiver operating characteristic of scores that should be larger under attack.

    Args:
        clean_scores: Scores of clean images, shape `(count,)`.
        attacked_scores: Scores of attacked images; leave out attacks that failed.
    """
    falling = np.unique(np.concatenate([clean_scores, attacked_scores]))[::-1]
    threshold = np.concatenate([[np.inf], falling])

    def rejected(scores: np.ndarray) -> np.ndarray:
        return (len(scores) - np.searchsorted(np.sort(scores), threshold)) / len(scores)

    return ROC(
        false_positive_rate=rejected(clean_scores),
        true_positive_rate=rejected(attacked_scores),
        threshold=threshold,
    )
