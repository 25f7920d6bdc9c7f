"""Lower bounds on the distance to the decision boundary, each typed by what it is worth.

`estimated_bound` rests on gradients that were seen; `Smoothed` votes under noise, and what it
certifies holds with a stated probability.
"""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import timeit
from typing import Any, Literal

import keras
import numpy as np
import scipy.stats
from keras import ops

from tvkeras import checkpoint, checks, norms
from tvkeras.inference import CompiledClassifier, Logits, equal_batches, loss_statistics
from tvkeras.inputs import as_float
from tvkeras.progress import Progress

Tensor = Any

ABSTAIN = -1  # in place of a class
_MOST_SAMPLES = 2_000_000  # `inference.Randomness` numbers no more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound for each image, and what it takes for it to be true.

    Attributes:
        kind: "estimated" (from a finite sample of gradients: may be wrong anywhere) or
            "probabilistic" (right for an image with a stated probability).
        norm: The norm that `radius` is measured in.
        radius: float64 `(count,)`, in units of [0, 1]: no image nearer than this is
            classified otherwise; 0 where nothing is claimed.
        classes: int64 `(count,)`: the class that the claim is about, the
            classifier's own; -1 where the smoothed classifier abstains.
        assumptions: What the claim takes for granted.
    """

    kind: Literal["estimated", "probabilistic"]
    norm: str
    radius: np.ndarray
    classes: np.ndarray
    assumptions: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothedBound(Bound):
    """What `Smoothed.certify` found, and the votes that it found it by.

    Attributes:
        sigma: Standard deviation of the noise, in units of [0, 1].
        confidence: Probability, for each image, that class and radius are right: 1 - alpha.
        seed: Of the noise.
        selection_votes: int64 `(count, num_classes)`: how many noisy copies were given
            each class, of those that chose one.
        votes: int64 `(count, num_classes)`: the same, of those that the radius rests on.
    """

    kind: Literal["probabilistic"] = "probabilistic"
    norm: str = "l2"
    sigma: float
    confidence: float
    seed: int
    selection_votes: np.ndarray
    votes: np.ndarray

    @property
    def abstained(self) -> np.ndarray:
        """Where nothing is claimed: booleans, shape `(count,)`."""
        return self.classes == ABSTAIN


def estimated_bound(
    classifier: keras.Model | CompiledClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: str = "l2",
    batch_size: int = 250,
) -> Bound:
    """(log 2 - loss) / L, with L the largest gradient norm among the images.

    The cross-entropy is l(x) = -log p_y(x). Where another class is at least as likely
    as y, p_y <= 1/2, hence l >= log 2. If ||grad l||_* <= L all the way from x to such
    an x', then log 2 - l(x) <= l(x') - l(x) <= L ||x' - x||, so that no x' nearer than
    (log 2 - l(x)) / L is misclassified. The maximum over some images is not the
    maximum along the way, as a rule it is less: the radius is an estimate, from
    above, of what the formula would prove.

    Args:
        classifier: Maps images to logits.
        images: Floats in the classifier's bounds, by default [0, 1], or uint8; shape
            `(count, height, width, channels)`.
        labels: True classes, shape `(count,)`.
        norm: Norm of the perturbation: "l2", "linf" or "l1".
        batch_size: Images in a batch.

    Returns:
        An estimated bound; its radius is 0 where the loss is log 2 or more.

    Reference: Finlay, Oberman & Abbasi (2019), arXiv:1808.09540.
    """
    checks.one_of("norm", norm, norms.DUALS)
    model = CompiledClassifier.of(classifier)
    images = model.images(images)
    losses, classes, sizes = loss_statistics(model, images, labels, norm, batch_size)
    gap = np.maximum(np.log(2) - losses.astype(np.float64), 0)
    slope = float(sizes.max())
    return Bound(
        kind="estimated",
        norm=norm,
        radius=gap / slope if slope else np.where(gap > 0, np.inf, 0.0),
        classes=classes.astype(np.int64),
        assumptions=f"no gradient of the loss is longer than {slope:.6g}, the longest that was "
        f"seen on {len(images)} images, in the norm dual to {norm}",
    )


class Smoothed:
    """The classifier that answers what another one answers most often under noise.

    g(x) = argmax_k P(f(x + sigma z) = k), z standard normal, f the class that `model`
    gives; noisy pixels are not clipped. Probabilities are counted on noisy copies of an
    image, so that an answer holds with probability 1 - alpha, image by image, or is none.
    (seed, i, s) decides the noise of image i's copy s, whatever the batch, on one backend.

    Args:
        model: Maps images to logits; trained under such noise (`data.Augmentation.noise`).
        sigma: Standard deviation of the noise, in units of [0, 1] whatever its bounds.
        seed: Of the noise; who knows it can aim at these very copies.
        batch_size: Noisy copies in a batch, at most.

    Raises:
        ValueError: For an illegal argument, or a model that is no classifier.

    Example:
    ```python
    smoothed = tvkeras.bounds.Smoothed(classifier, sigma=0.25)
    bound = smoothed.certify(images, progress=True, resume_dir="certified")
    proved = (bound.classes == labels) & (bound.radius >= 0.5)
    ```

    Reference: Cohen, Rosenfeld & Kolter (2019), arXiv:1902.02918.
    """

    def __init__(
        self,
        model: keras.Model | CompiledClassifier,
        sigma: float,
        *,
        seed: int = 0,
        batch_size: int = 500,
    ) -> None:
        self.sigma = checks.number("sigma", sigma, minimum=0.0, maximum=10.0, exclusive=True)
        self.seed = checks.whole_number("seed", seed)
        self.batch_size = checks.whole_number("batch_size", batch_size, minimum=1)
        self.model = CompiledClassifier.of(model)

    def predict(
        self, images: np.ndarray, *, samples: int = 1000, alpha: float = 0.001
    ) -> np.ndarray:
        """The smoothed classifier's answers, or `ABSTAIN`.

        The first class wins if a two-sided binomial test tells it from the second one.

        Args:
            images: As for `certify`.
            samples: Noisy copies of each image.
            alpha: Probability, for each image, of an answer that is not g's.

        Returns:
            int64 `(count,)`: classes, -1 where it abstains.

        Raises:
            ValueError: For an illegal argument, or images that are none of the model's.
        """
        _check_samples(samples, alpha, 2)
        votes = self._votes(self.model.images(images), (samples,))[:, 0]
        second, first = np.sort(votes, axis=1)[:, -2:].T
        p_value = 2 * scipy.stats.binom.sf(first - 1, first + second, 0.5)
        return np.where(p_value > alpha, ABSTAIN, votes.argmax(axis=1))

    def certify(
        self,
        images: np.ndarray,
        *,
        samples: int = 10_000,
        selection_samples: int = 100,
        alpha: float = 0.001,
        progress: bool = False,
        resume_dir: str | os.PathLike[str] | None = None,
    ) -> SmoothedBound:
        """Answers with the l2 radius in which each is proved to stay the same.

        The first copies choose a class, the others count how often it occurs. With p the
        one-sided Clopper-Pearson bound of its probability at level 1 - alpha, the radius
        is sigma Phi^-1(p); where p < 1/2 it abstains. No radius can exceed
        sigma Phi^-1(alpha^(1 / samples)).

        Args:
            images: Floats in the model's bounds, by default [0, 1], or uint8; shape
                `(count, height, width, channels)`.
            samples: Copies of each image that bound the probability (the paper's n).
            selection_samples: Copies that choose the class (n0).
            alpha: Probability, for each image, that its class or radius is wrong.
            progress: Whether to say first how long it takes, and then how far it is.
            resume_dir: Folder that keeps each image's votes; an interrupted call goes on
                from there, with another `alpha` or batch size too.

        Raises:
            ValueError: For an illegal argument, images that are none of the model's, or a
                `resume_dir` of other votes.
        """
        _check_samples(samples, alpha, 1, selection_samples)
        images = self.model.images(images)
        splits = (selection_samples, samples)
        selection, votes = np.moveaxis(self._votes(images, splits, progress, resume_dir), 1, 0)
        classes = selection.argmax(axis=1)
        hits = np.maximum(votes[np.arange(len(votes)), classes], 1)  # it abstains at 1 as at 0
        probability = scipy.stats.beta.ppf(alpha, hits, samples - hits + 1)
        abstained = probability < 0.5
        return SmoothedBound(
            radius=np.where(abstained, 0.0, self.sigma * scipy.stats.norm.ppf(probability)),
            classes=np.where(abstained, ABSTAIN, classes),
            assumptions=f"each class and radius is right with probability {1 - alpha:g}, for the "
            f"classifier under noise of {self.sigma:g}, not without; float32 counts as exact",
            sigma=self.sigma,
            confidence=1 - alpha,
            seed=self.seed,
            selection_votes=selection,
            votes=votes,
        )

    def cost(self, images: np.ndarray, samples: int = 10_100) -> float:
        """Seconds that so many copies of each image take here, by the time of one batch."""
        images = self.model.images(images)
        batches = equal_batches(samples, self.batch_size)
        batch = functools.partial(self._answers, images, 0, batches[0])
        batch()  # compiles
        return timeit.timeit(batch, number=1) * len(batches) * len(images)

    def _votes(
        self,
        images: np.ndarray,
        splits: tuple[int, ...],
        progress: bool = False,
        folder: Any = None,
    ) -> np.ndarray:
        """How often each class won among each split's copies: `(count, splits, num_classes)`."""
        self.model.logits(as_float(images[:1], self.model.bounds))  # refuses other than logits
        folder = None if folder is None else pathlib.Path(folder)
        identity = "" if folder is None else self._identity(images, splits)
        done = len([*folder.glob("image-*")]) if folder else 0
        if progress:
            left = len(images) - done
            minutes = self.cost(images[:1], sum(splits)) * left / 60
            print(f"{left} images, {sum(splits):,} noisy copies each: about {minutes:.1f} min")
        said = Progress("certified", len(images), "images", done=done, shown=progress)
        votes = []
        for index in range(len(images)):
            count = functools.partial(self._count, images, index, splits)
            path = folder and folder / f"image-{index:05d}"
            found = count() if path is None else checkpoint.kept(path, identity, count)
            votes.append(found["votes"])
            said.update(index + 1)
        return np.stack(votes)

    def _count(
        self, images: np.ndarray, index: int, splits: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """One image's votes, shape `(splits, num_classes)`."""
        classes = self.model.num_classes(images)
        batches = equal_batches(sum(splits), self.batch_size)
        answers = np.concatenate([self._answers(images, index, rows) for rows in batches])
        parts = np.split(answers[: sum(splits)], np.cumsum(splits)[:-1])
        return {"votes": np.stack([np.bincount(part, minlength=classes) for part in parts])}

    def _answers(self, images: np.ndarray, index: int, copies: np.ndarray) -> np.ndarray:
        """The model's class of each noisy copy, shape of `copies`, their numbers."""
        image = as_float(images[index], self.model.bounds)
        number = np.random.default_rng((self.seed, index)).integers(2**31, dtype=np.int32)

        def answers(logits: Logits, *tensors: Tensor) -> Tensor:
            image, sigma, number, copies = tensors

            def noise(copy: Tensor) -> Tensor:
                with self.model.randomness(number).at(copy) as generator:
                    return keras.random.normal(image.shape, dtype="float32", seed=generator)

            return ops.argmax(logits(image + sigma * ops.map(noise, copies)), axis=1)

        call = self.model.compiled(("smoothed", image.shape), answers, own=True)
        return call(image, np.float32(self.sigma), number, copies.astype(np.int32))

    def _identity(self, images: np.ndarray, splits: tuple[int, ...]) -> str:
        model, backend = self.model, keras.backend.backend()
        settings = (self.sigma, self.seed, splits, images.shape, model.bounds, backend)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(np.ascontiguousarray(images).data)
        digest.update(model.fingerprint())
        return digest.hexdigest()


def _check_samples(samples: int, alpha: float, tails: int, selection_samples: int = 1) -> None:
    """Checks that so many votes can be drawn and, were they all the same, would be believed."""
    checks.number("alpha", alpha, minimum=0.0, maximum=0.5, exclusive=True)
    checks.whole_number("selection_samples", selection_samples, minimum=1)
    fewest = math.ceil(math.log2(tails / alpha))
    if not fewest <= checks.whole_number("samples", samples) <= _MOST_SAMPLES - selection_samples:
        raise ValueError(
            f"samples must be {fewest} to {_MOST_SAMPLES} for alpha={alpha:g}, those that select "
            f"included, got samples={samples}. With fewer it would abstain on every image."
        )
