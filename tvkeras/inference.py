"""The compiled classifier: what a Keras model in inference mode says of images.

First the classifier, which compiles functions of its logits and runs them over images in
batches of one shape; then such functions: losses, input gradients and their sizes. Attacks,
detection, bounds, audit and export ask a classifier through nothing else.
"""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from tvkeras import backends, checks, contract, inputs, norms
from tvkeras.inputs import UNIT, as_float

Tensor = Any
Logits = Callable[[Tensor], Tensor]

STATISTICS = ("loss", "model")

_DRAWS_PER_STEP = 1024
_KEPT = "_tvkeras_compiled"


class CompiledClassifier:
    """A classifier in inference mode and the functions compiled for it.

    Make one where the same classifier is asked again and again, by several attacks or
    by one at several radii: each function is then compiled once for each shape of
    batch. Weights that change later are followed.

    A classifier with its rescaling inside has bounds=(0, 255): whoever asks it is given
    images in those bounds, and returns such. Radii, steps and distances are in units of
    [0, 1] all the same, for what is compiled (`compiled`, `logits`) sees images in
    [0, 1] alone; they are mapped in there.

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
        self._clone = backends.fast_twin(self.classifier)  # fused kernels, the same function
        self._generator = keras.random.SeedGenerator(0)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._num_classes: dict[tuple[int, ...], int] = {}
        self._checked = False

    def compiled(
        self, key: Any, function: Callable[..., Any], *, own: bool = False
    ) -> Callable[..., Any]:
        """`function` compiled, from arrays to arrays; the same one for the same `key`.

        Args:
            key: What the function depends on, hashable.
            function: Called as `function(logits, *tensors)` where `logits` maps images
                in [0, 1] to logits in inference mode; takes and returns structures of
                tensors.
            own: Whether `logits` calls the classifier itself, for what must hold of it,
                and not its fused clone, which a search asks for speed.
        """
        key = (key, own)
        if key not in self._compiled:
            model = self.classifier if own else self._clone

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
            tensors = keras.tree.map_structure(ops.convert_to_tensor, arrays)
            results = compiled(weights, state, *tensors)
            return keras.tree.map_structure(ops.convert_to_numpy, results)

        return call

    @classmethod
    def of(cls, classifier: "keras.Model | CompiledClassifier") -> "CompiledClassifier":
        """`classifier` itself if it is made ready already, else made ready."""
        return classifier if isinstance(classifier, cls) else cls(classifier)

    @classmethod
    def kept(cls, classifier: "keras.Model | CompiledClassifier") -> "CompiledClassifier":
        """As `of`, but made ready once, and anew when variables are frozen, thawed or replaced.

        What a layer keeps outside variables, such as its activation, must stay. It lies among
        the classifier's attributes and lives as long as the classifier does: a table of weak
        references would hold both for ever, since each of the two holds the other.
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
    def unit(self) -> "CompiledClassifier":
        """The same one for images in [0, 1], whatever its bounds; it shares what is compiled."""
        view = copy.copy(self)
        view.bounds = UNIT
        return view

    def images(self, images: Any, argument: str = "images") -> np.ndarray:
        """`images` as an array that this classifier can be given: see `tvkeras.inputs.images`."""
        shape = contract.image_shape(self.classifier)
        return inputs.images(images, bounds=self.bounds, shape=shape, argument=argument)

    def labels(self, labels: Any, images: np.ndarray) -> np.ndarray:
        """`labels` as int64 `(count,)`, classes of these images: see `tvkeras.inputs.labels`."""
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
        """Random numbers that are a function of `seed`, a scalar integer tensor."""
        return Randomness(self._generator, seed)

    def fingerprint(self) -> bytes:
        """A digest of the weights."""
        digest = hashlib.sha256()
        for weights in self.classifier.get_weights():
            digest.update(np.ascontiguousarray(weights).data)
        return digest.digest()


class Randomness:
    """Random numbers inside a compiled function: a pure function of (seed, step).

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


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, shape `(batch,)`."""
    losses = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return ops.cast(losses, logits.dtype)


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


def gradient_norm(
    logits: Logits, images: Tensor, norm: str, statistic: str
) -> tuple[Tensor, Tensor, int]:
    """Size of the derivative at each image; it can be differentiated itself.

    "loss": ||grad_x l(x, k)||_*, the cross-entropy at the predicted class k; one
    model call. "model": max_k ||grad_x p_k(x)||_*, the largest row of the Jacobian
    of the probabilities; one call for each class, and one to differentiate. For
    norm="l2" this is ||grad f||_{2,inf}.

    Args:
        logits: Maps images to logits.
        images: Shape `(batch, height, width, channels)`.
        norm: Threat norm, whose dual measures the gradients.
        statistic: "loss" or "model".

    Returns:
        Sizes `(batch,)`, logits `(batch, num_classes)`, and model calls per image.

    Reference: Finlay et al. (2019), arXiv:1808.09540.
    """
    checks.one_of("statistic", statistic, STATISTICS)

    def sized(images: Tensor, output: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        _, outputs, gradient = input_gradient(logits, images, output)
        return norms.dual_length(gradient, norm), outputs

    if statistic == "loss":

        def at_prediction(outputs: Tensor) -> Tensor:
            return example_losses(outputs, ops.stop_gradient(ops.argmax(outputs, axis=-1)))

        return *sized(images, at_prediction), 1

    fixed = ops.stop_gradient(images)

    def larger(row: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rows, largest = state
        row = ops.cast(row, rows.dtype)
        sizes, _ = sized(fixed, lambda outputs: _probability(outputs, ops.full_like(rows, row)))
        return ops.where(sizes > largest, row, rows), ops.maximum(sizes, largest)

    first = ops.zeros_like(images[:, 0, 0, 0], dtype="int32")
    largest, outputs = sized(fixed, lambda outputs: _probability(outputs, first))
    classes = outputs.shape[-1]
    rows, _ = ops.fori_loop(1, classes, larger, (first, largest))
    sizes, outputs = sized(images, lambda outputs: _probability(outputs, rows))
    return sizes, outputs, classes + 1


def loss_statistics(
    model: CompiledClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    norm: str,
    batch_size: int = 250,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss at the true label, predicted class and ||grad loss||_*, shape `(count,)` each.

    Args:
        model: The classifier.
        images: Its images: see `CompiledClassifier.over`.
        labels: True classes, shape `(count,)`.
        norm: Threat norm, whose dual measures the gradients.
        batch_size: Images in a batch, at most.

    Raises:
        ValueError: For images or labels that are none of the classifier's.
    """
    checks.one_of("norm", norm, norms.DUALS)
    images = model.images(images)
    labels = model.labels(labels, images)

    def statistics(logits: Logits, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        losses, outputs, gradient = input_gradient(
            logits, images, lambda outputs: example_losses(outputs, labels)
        )
        return losses, ops.argmax(outputs, axis=1), norms.dual_length(gradient, norm)

    key = ("loss_statistics", norm)
    found = model.over(key, statistics, images, labels, batch_size=batch_size)
    return found[0], found[1], found[2]


def measured(
    model: CompiledClassifier, images: np.ndarray, norm: str, statistic: str
) -> np.ndarray:
    """`gradient_norm` of the classifier itself at one batch of images in [0, 1]: `(batch,)`."""

    def sizes(logits: Logits, images: Tensor) -> Tensor:
        return gradient_norm(logits, images, norm, statistic)[0]

    return model.compiled(("gradient_norm", norm, statistic), sizes, own=True)(images)


def equal_batches(count: int, batch_size: int) -> list[np.ndarray]:
    """Row numbers of nearly equal batches of one shape; the last row fills the last one."""
    checks.whole_number("batch_size", batch_size, minimum=1)
    size = -(-count // -(-count // batch_size))
    return [
        np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)
    ]


def _probability(logits: Tensor, classes: Tensor) -> Tensor:
    """Probability of one class for each example, shape `(batch,)`."""
    return ops.take_along_axis(ops.softmax(logits), classes[:, None], axis=-1)[:, 0]
