"""The attack protocol: classifier, images and labels in, an `AttackResult` out."""

import dataclasses
import hashlib
import math
import os
import pathlib
from typing import Any, ClassVar, NamedTuple

import keras
import numpy as np

from tvkeras import checkpoint, checks, norms
from tvkeras.inference import CompiledClassifier, Logits, Randomness, Tensor, equal_batches
from tvkeras.inputs import UNIT, as_float
from tvkeras.progress import Progress

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


class Batch(NamedTuple):
    """What is attacked at once.

    Attributes:
        model: The classifier.
        images: float32 in [0, 1], shape `(batch, height, width, channels)`.
        labels: True classes, shape `(batch,)`.
        epsilon: Radius; None for an attack that takes none.
        seed: Of the attack's random numbers.
    """

    model: CompiledClassifier
    images: np.ndarray
    labels: np.ndarray
    epsilon: float | None = None
    seed: int = 0

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.float32, np.int32]:
        """All but the classifier, for a compiled function; no epsilon is 0."""
        return self.images, self.labels, np.float32(self.epsilon or 0.0), np.int32(self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of all attacks: an immutable description that is called on a classifier.

    Whole numbers among the arguments must be at least 1, others positive (or not negative,
    where 0 is the default): else a ValueError names the argument.

    Attributes:
        norm: Norm of the perturbation: "l2", "linf" or "l1".
        fixed_epsilon: Whether the attack looks inside a ball of given radius; otherwise
            it looks for the smallest perturbation.
        legal_norms: Those that the attack can take.
    """

    norm: str = "l2"

    fixed_epsilon: ClassVar[bool]
    legal_norms: ClassVar[tuple[str, ...]] = tuple(norms.DUALS)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, self.legal_norms)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                checks.whole_number(field.name, value, minimum=1)
            elif field.type is float or (field.type == float | None and value is not None):
                checks.number(field.name, value, minimum=0.0, exclusive=field.default != 0)

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
            progress: Whether to say how many batches are done, and how long the rest takes.
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
        settings = (epsilon, size, seed)
        identity = self._identity(model, images, labels, settings) if folder else ""
        title = f"{type(self).__name__} {self.norm} {'' if epsilon is None else epsilon}".rstrip()
        kept = len([*folder.glob("batch-*")]) if folder else 0
        said = Progress(title, len(batches), "batches", done=kept, shown=progress)
        parts = []
        for number, rows in enumerate(batches):
            batch_seed = int(np.random.default_rng((seed, number)).integers(2**31))

            def attack(rows: np.ndarray = rows, seed: int = batch_seed) -> dict[str, np.ndarray]:
                pixels = as_float(images[rows], model.bounds)
                return self._confirmed(Batch(model, pixels, labels[rows], radius, seed))

            if folder is None:
                part = attack()
            else:
                part = checkpoint.kept(folder / f"batch-{number:05d}", identity, attack)
            parts.append(part)
            said.update(number + 1)
        arrays = {
            name: np.concatenate([p[name] for p in parts])[: len(labels)] for name in parts[0]
        }
        return AttackResult(**{**arrays, "x_adv": model.bounds.native(arrays["x_adv"])})

    def search(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Attacks one batch; `perturb`, compiled, unless a subclass does otherwise.

        Returns:
            x_adv, and the queries made for each example.
        """
        model = batch.model  # what is compiled must not keep the batch

        def perturb(logits: Logits, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            images, labels, epsilon, seed = tensors
            return self.perturb(logits, images, labels, epsilon, model.randomness(seed))

        return model.compiled(self, perturb)(*batch.arrays)

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

    def _confirmed(self, batch: Batch) -> dict[str, np.ndarray]:
        """One batch's `AttackResult`: nothing counts that the classifier does not confirm."""
        model, images, labels, epsilon, _ = batch
        wrong = self.fools(model, images, labels)
        x_adv, queries = self.search(batch)
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
