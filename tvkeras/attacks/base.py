"""The attack protocol: classifier, images and labels in, an `AttackResult` out."""

import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tvkeras import checkpoint, checks, norms
from tvkeras.inference import CompiledClassifier, Logits, Randomness, Tensor, equal_batches
from tvkeras.inputs import UNIT, as_float

ORDERS = {"l1": 1, "l2": 2, "linf": np.inf}  # as NumPy calls the norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackResult:
    """What an attack found, example by example.

    Attributes:
        x_adv: float32, in the classifier's bounds, shape `(count, height, width,
            channels)`; the image itself where the attack failed or the image was
            misclassified to begin with.
        success: bool `(count,)`: whether the classifier, asked again, misclassifies
            `x_adv`, which lies in its bounds and, for a fixed epsilon, within it.
        distance: float32 `(count,)`: ||x_adv - image|| in the threat norm, in units of
            [0, 1]; inf where the attack failed.
        queries: int64 `(count,)`: model calls made for the example, a forward and its
            backward pass counted as one; 0 where the image was misclassified.
    """

    x_adv: np.ndarray
    success: np.ndarray
    distance: np.ndarray
    queries: np.ndarray

    @property
    def robust_accuracy(self) -> float:
        """Share of the images that stand: classified rightly, and not broken."""
        return 1 - float(self.success.mean())

    @property
    def median_distance(self) -> float:
        """Median of `distance`; inf where fewer than half of the images are broken."""
        return float(np.median(self.distance))

    def __str__(self) -> str:
        return (
            f"broken: {self.success.sum()} of {len(self.success)} images\n"
            f"robust accuracy: {self.robust_accuracy:.4g}\n"
            f"median distance: {self.median_distance:.4g}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of all attacks: an immutable description that is called on a classifier.

    Attributes:
        norm: Norm of the perturbation: "l2", "linf" or "l1".
        fixed_epsilon: Whether the attack looks inside a ball of given radius; otherwise
            it looks for the smallest perturbation.
    """

    norm: str = "l2"

    fixed_epsilon: ClassVar[bool]

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, norms.DUALS)

    def __call__(
        self,
        classifier: keras.Model | CompiledClassifier,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        epsilon: float | str | None = None,
        batch_size: int = 250,
        seed: int = 0,
        progress: bool = False,
        resume_dir: str | os.PathLike[str] | None = None,
    ) -> AttackResult:
        """Attacks images in batches of one shape, and asks the classifier again.

        Args:
            classifier: The classifier, or one made ready for several attacks.
            images: Floats in the classifier's bounds, by default [0, 1], or uint8; shape
                `(count, height, width, channels)`.
            labels: True classes, shape `(count,)`.
            epsilon: Radius in units of [0, 1], a number or "8/255", for an attack that
                takes one.
            batch_size: Images in a batch, at most.
            seed: Of the attack's random numbers.
            progress: Whether to show a progress bar.
            resume_dir: Folder that keeps each batch's result; an interrupted call goes
                on from there.

        Raises:
            ValueError: For an illegal argument, images or labels that are none of the
                classifier's, a classifier of other than logits, or a `resume_dir` of
                another attack.
        """
        radius = self._radius(epsilon)
        model = CompiledClassifier.of(classifier)
        images = model.images(images)
        labels = model.labels(labels, images)
        batches = equal_batches(len(labels), batch_size)
        size = len(batches[0])
        folder = None if resume_dir is None else pathlib.Path(resume_dir)
        identity = folder and self._identity(model, images, labels, (epsilon, size, seed))
        bar = keras.utils.Progbar(len(batches), unit_name="batch") if progress else None
        parts = []
        for number, rows in enumerate(batches):
            batch_seed = int(np.random.default_rng((seed, number)).integers(2**31))

            def attack(rows: np.ndarray = rows, seed: int = batch_seed) -> dict[str, np.ndarray]:
                batch = as_float(images[rows], model.bounds)
                return self._batch(model, batch, labels[rows], radius, seed)

            if folder is None:
                part = attack()
            else:
                part = _kept(folder / f"batch-{number:05d}", identity, attack)
            parts.append(part)
            if bar:
                bar.update(number + 1)
        arrays = {
            name: np.concatenate([p[name] for p in parts])[: len(labels)] for name in parts[0]
        }
        return AttackResult(**{**arrays, "x_adv": model.bounds.native(arrays["x_adv"])})

    def search(
        self,
        model: CompiledClassifier,
        images: np.ndarray,
        labels: np.ndarray,
        epsilon: float | None,
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Attacks one batch; `perturb`, compiled, unless a subclass does otherwise.

        Returns:
            x_adv, and the queries made for each example.
        """

        def perturb(logits: Logits, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            images, labels, epsilon, seed = tensors
            return self.perturb(logits, images, labels, epsilon, model.randomness(seed))

        radius = np.float32(epsilon or 0.0)
        return model.compiled(self, perturb)(images, labels, radius, np.int32(seed))

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """Attacks one batch in `keras.ops`.

        Args:
            logits: Maps images to logits `(batch, num_classes)`.
            images: Shape `(batch, height, width, channels)`, in [0, 1].
            labels: Shape `(batch,)`.
            epsilon: Radius, a scalar; 0 for an attack that takes none.
            random: Source of random numbers.

        Returns:
            x_adv, shape of `images`, and queries, integers of shape `(batch,)`.
        """
        raise TypeError(f"{type(self).__name__} is no attack: use one of its subclasses.")

    def fools(
        self, model: CompiledClassifier, images: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Which images are a success: misclassified, and what else a subclass demands.

        Args:
            model: The attacked classifier.
            images: One batch in [0, 1].
            labels: True classes, shape `(batch,)`.

        Returns:
            Booleans, shape `(batch,)`.
        """
        return model.logits(images).argmax(axis=1) != labels

    def _radius(self, epsilon: float | str | None) -> float | None:
        """`epsilon` as a number, given where the attack takes one and only there."""
        if (epsilon is not None) != self.fixed_epsilon:
            verb = "needs an" if self.fixed_epsilon else "looks for the smallest one: omit"
            raise ValueError(f"{type(self).__name__} {verb} epsilon, got epsilon={epsilon!r}.")
        return None if epsilon is None else checks.epsilon(epsilon)

    def _batch(
        self,
        model: CompiledClassifier,
        images: np.ndarray,
        labels: np.ndarray,
        epsilon: float | None,
        seed: int,
    ) -> dict[str, np.ndarray]:
        """One batch's `AttackResult`: nothing counts that the classifier does not confirm."""
        wrong = self.fools(model, images, labels)
        x_adv, queries = self.search(model, images, labels, epsilon, seed)
        distance = distances(x_adv, images, self.norm)
        found = self.fools(model, x_adv, labels)
        found &= (x_adv >= 0).all(axis=(1, 2, 3)) & (x_adv <= 1).all(axis=(1, 2, 3))
        if epsilon is not None:
            found &= distance <= largest_distance(epsilon, self.norm, images[0].size)
        keep = found & ~wrong
        return {
            "x_adv": np.where(keep[:, None, None, None], x_adv, images),
            "success": found | wrong,
            "distance": np.where(wrong, 0, np.where(found, distance, np.inf)).astype(np.float32),
            "queries": np.where(wrong, 0, queries).astype(np.int64),
        }

    def _identity(
        self, model: CompiledClassifier, images: np.ndarray, labels: np.ndarray, settings: Any
    ) -> str:
        bounds = () if model.bounds == UNIT else (model.bounds,)
        digest = hashlib.sha256(repr((self, settings, images.shape, *bounds)).encode())
        for content in (np.ascontiguousarray(images).data, labels.data, model.fingerprint()):
            digest.update(content)
        return digest.hexdigest()


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

    The classifier that confirms a success is not the twin that the attack searched with,
    and is compiled apart: it may round a smaller margin the other way.
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


def distances(x_adv: np.ndarray, images: np.ndarray, norm: str) -> np.ndarray:
    """||x_adv - image|| of each example in float64, which rounds nothing: shape `(count,)`."""
    pairs = zip(x_adv, images, strict=True)  # one by one: float64 copies of all would be large
    differences = (np.subtract(one, other, dtype=np.float64).ravel() for one, other in pairs)
    return np.array([np.linalg.norm(difference, ORDERS[norm]) for difference in differences])


def largest_distance(epsilon: float, norm: str, size: int) -> float:
    """How far x_adv may lie from an image if it is the float32 of a point within `epsilon`.

    The radius and the projection err by 1e-4 of the radius at most. Adding the
    perturbation to the image rounds each entry by 2^-25 or less; r = 2^-24 is allowed.
    These roundings go up as often as down: from linf they take r, from the sum of l1 the
    root of their number times r, twice over; to the square of l2 they add their own.

    Args:
        epsilon: Radius of the ball.
        norm: Norm of the ball.
        size: Number of pixel values of an image.
    """
    radius, r = epsilon * (1 + 1e-4), 2.0**-24
    if norm == "l2":
        return math.hypot(radius, r * math.sqrt(size)) + r
    return radius + 2 * r * (math.sqrt(size) if norm == "l1" else 1)


def _kept(
    path: pathlib.Path, identity: Any, attack: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The result in the file at `path`, computed and written if there is none."""
    if not path.exists():
        checkpoint.save(path, attack(), {"identity": identity})
    arrays, meta = checkpoint.load(path)
    if meta["identity"] != identity:
        raise ValueError(
            f"resume_dir {path.parent} holds another attack's results (other settings, images "
            "or weights). Use another folder, or remove that one."
        )
    return arrays
