"""The attack protocol: classifier, images and labels in, an `AttackResult` out."""

import contextlib
import copy
import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tvkeras import backends, checkpoint, checks, contract, inputs, norms
from tvkeras.inputs import UNIT, as_float

Tensor = Any
Logits = Callable[[Tensor], Tensor]

ORDERS = {"l1": 1, "l2": 2, "linf": np.inf}  # as NumPy calls the norms

_DRAWS_PER_STEP = 1024
_KEPT = "_tvkeras_attacked"


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


class AttackedClassifier:
    """A classifier in inference mode and the functions compiled for it.

    Make one where several attacks, or one at several radii, meet the same classifier:
    each attack is then compiled once for each shape of batch. Weights that change
    later are followed.

    A classifier with its rescaling inside has bounds=(0, 255): attacks, detection,
    bounds and audit are then given images in those bounds, and return such. Radii,
    steps and distances are in units of [0, 1] all the same, for what is compiled
    (`compiled`, `logits`) sees images in [0, 1] alone; they are mapped in there.

    Args:
        classifier: Maps images to logits.
        bounds: Of its images; by default [0, 1], or those of a `RobustClassifier`.

    Raises:
        ValueError: If the classifier is unbuilt, takes integers, is made for images in
            other bounds, or ends in a softmax.
    """

    def __init__(self, classifier: keras.Model, bounds: tuple[float, float] | None = None) -> None:
        self.classifier, self.own_bounds = contract.unwrapped(classifier, bounds)
        self.bounds = self.own_bounds  # of the images given, other than in `unit`
        self._twin = backends.fast_twin(self.classifier)
        self._generator = keras.random.SeedGenerator(0)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._num_classes: dict[tuple[int, ...], int] = {}
        self._checked = False

    def compiled(
        self, key: Any, function: Callable[..., Any], *, own: bool = False
    ) -> Callable[..., Any]:
        """`function` compiled, for calls with arrays; the same one for the same `key`.

        Args:
            key: What the function depends on, hashable, such as an attack.
            function: Called as `function(logits, *tensors)` where `logits` maps images
                in [0, 1] to logits in inference mode; returns a structure of tensors.
            own: Whether `logits` calls the classifier itself, for what must hold of it,
                and not its faster twin, for a search.

        Returns:
            Maps arrays to a structure of arrays.
        """
        key = (key, own)
        if key not in self._compiled:
            model = self.classifier if own else self._twin

            def pure(trainable: Any, state: Any, *tensors: Tensor) -> Any:
                def logits(images: Tensor) -> Tensor:
                    native = self.own_bounds.native(images)
                    outputs = model.stateless_call(trainable, state, native, training=False)[0]
                    return ops.cast(outputs, images.dtype)

                return function(logits, *tensors)

            self._compiled[key] = backends.compiled(pure)
        compiled = self._compiled[key]

        def call(*arrays: Any) -> Any:
            weights = [variable.value for variable in self.classifier.trainable_variables]
            state = [variable.value for variable in self.classifier.non_trainable_variables]
            results = compiled(weights, state, *map(ops.convert_to_tensor, arrays))
            return keras.tree.map_structure(ops.convert_to_numpy, results)

        return call

    @classmethod
    def of(cls, classifier: "keras.Model | AttackedClassifier") -> "AttackedClassifier":
        """`classifier` itself if it is made ready already, else made ready."""
        return classifier if isinstance(classifier, cls) else cls(classifier)

    @classmethod
    def kept(cls, classifier: "keras.Model | AttackedClassifier") -> "AttackedClassifier":
        """As `of`, but made ready once, for what asks the same of a classifier again and again.

        It lies among the classifier's attributes and lives as long as the classifier does:
        a table of weak references would hold both for ever, since each of the two holds the
        other. It is made anew when variables are frozen, thawed or replaced; what a layer
        keeps outside variables, such as its activation, must stay.
        """
        if isinstance(classifier, cls):
            return classifier
        contract.unwrapped(classifier)  # refuses what has no variables
        model: Any = classifier
        variables = (model.trainable_variables, model.non_trainable_variables)
        state = [[id(variable) for variable in part] for part in variables]
        found = vars(model).get(_KEPT)  # not by setattr, which Keras tracks
        if found is None or found[0] != state:
            found = vars(model)[_KEPT] = (state, cls(model))
        return found[1]

    @property
    def unit(self) -> "AttackedClassifier":
        """The same one for images in [0, 1], whatever its bounds; it shares what is compiled."""
        view = copy.copy(self)
        view.bounds = UNIT
        return view

    def images(self, images: Any, argument: str = "images") -> np.ndarray:
        """`images` as an array, uint8 or floats, if this classifier can be given them.

        Raises:
            ValueError: As `tvkeras.inputs.images`.
        """
        shape = contract.image_shape(self.classifier)
        return inputs.images(images, bounds=self.bounds, shape=shape, argument=argument)

    def labels(self, labels: Any, images: np.ndarray) -> np.ndarray:
        """`labels` as int64 `(count,)`, if they are classes of these images.

        Raises:
            ValueError: As `tvkeras.inputs.labels`.
        """
        return inputs.labels(labels, len(images), self.num_classes(images))

    def num_classes(self, images: np.ndarray) -> int:
        """Number of logits of such images, two or more."""
        shape = images.shape[1:]
        if shape not in self._num_classes:
            self._num_classes[shape] = contract.num_classes(self.classifier, shape)
        return self._num_classes[shape]

    def over(
        self,
        key: Any,
        function: Callable[..., tuple[Tensor, ...]],
        images: np.ndarray,
        *arrays: np.ndarray,
        batch_size: int,
    ) -> tuple[np.ndarray, ...]:
        """A compiled function of all images, in batches of one shape.

        Args:
            key: As for `compiled`.
            function: As for `compiled`; returns a tuple of tensors, a row an image.
            images: Floats in the bounds, or uint8; shape
                `(count, height, width, channels)`.
            *arrays: Further arguments, a row an image.
            batch_size: Images in a batch, at most.

        Raises:
            ValueError: For images or logits that pass no gate.
        """
        images = self.images(images)
        batches = equal_batches(len(images), batch_size)
        if not self._checked:
            self.logits(as_float(images[batches[0]], self.bounds))
        call = self.compiled(key, function)
        parts = [
            call(as_float(images[rows], self.bounds), *(array[rows] for array in arrays))
            for rows in batches
        ]
        return tuple(np.concatenate(part)[: len(images)] for part in zip(*parts, strict=True))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """The classifier's own logits `(batch, num_classes)` of one batch in [0, 1].

        Raises:
            ValueError: If the first ones asked for are not finite, or probabilities.
        """
        call = self.compiled("logits", lambda logits, images: logits(images), own=True)
        outputs = call(images)
        if not self._checked:
            contract.check_logits(outputs)
            # Of a few images the logits may look so by chance: others are asked too.
            others = np.random.default_rng(0).random(images.shape, "float32")
            if contract.are_probabilities(outputs) and contract.are_probabilities(call(others)):
                raise contract.probabilities_error()
            self._checked = True
        return outputs

    def randomness(self, seed: Tensor) -> "Randomness":
        """The random numbers of an attack with `seed`, a scalar tensor."""
        return Randomness(self._generator, seed)

    def fingerprint(self) -> bytes:
        """A digest of the weights."""
        digest = hashlib.sha256()
        for weights in self.classifier.get_weights():
            digest.update(np.ascontiguousarray(weights).data)
        return digest.digest()


class Randomness:
    """Random numbers inside a compiled attack: a pure function of (seed, step).

    Args:
        generator: A seed generator to lend; its own state is never changed.
        seed: Scalar integer tensor.
    """

    def __init__(self, generator: keras.random.SeedGenerator, seed: Tensor) -> None:
        self._generator = generator
        self._seed = seed

    @contextlib.contextmanager
    def at(self, step: Any) -> Iterator[keras.random.SeedGenerator]:
        """The seed generator for `keras.random` at one step, also inside a loop."""
        dtype = self._generator.state.dtype
        pair = [self._seed, ops.cast(step, "int32") * _DRAWS_PER_STEP]
        state = ops.cast(ops.stack([ops.cast(part, "int32") for part in pair]), dtype)
        with keras.StatelessScope([(self._generator.state, state)]):
            yield self._generator


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
        classifier: keras.Model | AttackedClassifier,
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
        model = AttackedClassifier.of(classifier)
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
        model: AttackedClassifier,
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
        self, model: AttackedClassifier, images: np.ndarray, labels: np.ndarray
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
        model: AttackedClassifier,
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
        self, model: AttackedClassifier, images: np.ndarray, labels: np.ndarray, settings: Any
    ) -> str:
        bounds = () if model.bounds == UNIT else (model.bounds,)
        digest = hashlib.sha256(repr((self, settings, images.shape, *bounds)).encode())
        for content in (np.ascontiguousarray(images).data, labels.data, model.fingerprint()):
            digest.update(content)
        return digest.hexdigest()


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, shape `(batch,)`."""
    losses = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return ops.cast(losses, logits.dtype)


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


def input_gradient(
    logits: Logits, images: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of each example and their gradient with respect to its image.

    Args:
        logits: Maps images to logits.
        images: Shape `(batch, height, width, channels)`.
        loss: Maps logits to losses of shape `(batch,)`.

    Returns:
        Losses `(batch,)`, logits `(batch, num_classes)`, and the gradient, shape of
        `images`.
    """

    def total(images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs = logits(images)
        losses = loss(outputs)
        return ops.sum(losses), (losses, outputs)

    (_, (losses, outputs)), (gradient,) = backends.value_and_gradient(total, (images,))
    return losses, outputs, gradient


def equal_batches(count: int, batch_size: int) -> list[np.ndarray]:
    """Row numbers of nearly equal batches of one shape; the last row fills the last one."""
    checks.whole_number("batch_size", batch_size, minimum=1)
    size = -(-count // -(-count // batch_size))
    return [
        np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)
    ]


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
