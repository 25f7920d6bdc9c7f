"""Foolbox 3.3.4 behind the attack protocol, on the TensorFlow backend.

Foolbox is optional: `pip install "tvkeras[foolbox]"`. It runs eagerly; the model that
it calls, and that model's gradient, are compiled. Here are its walks along the decision
boundary; what it has of other kinds, tvkeras has compiled.
"""

import dataclasses
import hashlib
import math
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tvkeras import inputs
from tvkeras.attacks.base import Attack, Batch
from tvkeras.inference import CompiledClassifier, Logits, Tensor, input_gradient

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "Foolbox attacks TensorFlow models here: set KERAS_BACKEND=tensorflow, got "
        f"{keras.backend.backend()!r}. The other attacks of tvkeras.attacks run on every backend."
    )

import tensorflow as tf

try:
    import eagerpy
    import foolbox
except ImportError as error:
    raise ImportError(
        "The Foolbox attacks need Foolbox, which is optional: pip install 'tvkeras[foolbox]'."
    ) from error

# Walks along the boundary end within rounding of it, where an image's class depends on the
# batch that it is in: a result is moved away from the image by this share of its distance.
_BEYOND = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FoolboxAttack(Attack):
    """A minimum-norm attack of Foolbox, which starts from an image of another class.

    Images that are misclassified to begin with are not attacked. Foolbox's own search
    for a start raises for the whole batch where it fails for one image. Here an image
    starts from the nearest one, in l2, of a pool that the classifier puts into another
    class than the image's true one; where there is none, the attack fails for that image
    alone.

    Labels are int64 tensors: int32 ones and NumPy arrays make Foolbox crash. Foolbox
    draws from TensorFlow's global generator, which is therefore seeded before each batch.
    What it returns counts only if the classifier confirms it, as with every attack.

    Queries are the images that the wrapped model is asked about for an example, in
    calls for the examples of its batch: Foolbox goes on with those that are done. A
    gradient counts as one; classifying the pool is not counted.

    Attributes:
        pool: Images to start from, float32 in [0, 1] or uint8, shape
            `(count, height, width, channels)`; by default those of the same batch.
        pool_digest: Computed: tells pools apart.
    """

    fixed_epsilon: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    legal_norms: ClassVar[tuple[str, ...]] = ("l2",)

    steps: int
    pool: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    pool_digest: str | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        if self.pool is not None:
            pool = inputs.as_float(inputs.images(self.pool, argument="pool"))
            digest = hashlib.sha256(np.ascontiguousarray(pool).data).hexdigest()
            object.__setattr__(self, "pool", pool)
            object.__setattr__(self, "pool_digest", digest)

    def search(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Attacks the images that are classified rightly, together or one by one."""
        model, images, labels, _, seed = batch
        tf.random.set_seed(seed)
        rows, starts = self.prepared(model, images, labels)
        x_adv, queries = images.copy(), np.zeros(len(images), np.int64)
        for part in rows[:, None] if self.one_by_one else [rows]:
            if len(part):
                counted = _Counted(model, len(part))
                attack = self.attack(images[part].shape)
                found = attack.run(
                    foolbox.TensorFlowModel(counted, bounds=(0, 1), device="/CPU:0"),
                    tf.constant(images[part]),
                    _Misclassified(tf.constant(labels[part], tf.int64)),
                    starting_points=tf.constant(starts[part]),
                )
                beyond = images[part] + (1 + _BEYOND) * (np.asarray(found) - images[part])
                x_adv[part] = np.clip(beyond, 0, 1)
                queries[part] = counted.calls
        return x_adv, queries

    def prepared(
        self, model: CompiledClassifier, images: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows to attack, those that are right and have a start, and all rows' starts."""
        pool = images if self.pool is None else self.pool
        inputs.images(pool, shape=images.shape[1:], argument="pool")
        parts = range(0, len(pool), len(images))
        classes = np.concatenate(
            [model.logits(pool[start : start + len(images)]).argmax(axis=1) for start in parts]
        )
        flat, pool_flat = images.reshape(len(images), -1), pool.reshape(len(pool), -1)
        squares = np.square(pool_flat).sum(axis=1) - 2 * flat @ pool_flat.T
        squares[labels[:, None] == classes[None]] = np.inf
        nearest = squares.argmin(axis=1)
        right = model.logits(images).argmax(axis=1) == labels
        possible = np.isfinite(np.take_along_axis(squares, nearest[:, None], axis=1)[:, 0])
        return np.flatnonzero(right & possible), pool[nearest]

    def attack(self, shape: tuple[int, ...]) -> Any:
        """Foolbox's own attack, for a batch of images of this shape."""
        raise TypeError(f"{type(self).__name__} is no attack: use one of its subclasses.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoolboxBoundary(_FoolboxAttack):
    """A random walk along the decision boundary towards the image.

    Attributes:
        norm: "l2".
        pool: Images to start from; by default those of the same batch.
        pool_digest: Computed: tells pools apart.
        steps: Steps, at most; each costs a call, and every tenth two.

    Reference: Brendel et al. (2018), arXiv:1712.04248.
    """

    steps: int = 25_000

    def attack(self, shape: tuple[int, ...]) -> Any:
        """Foolbox's own attack, with its defaults."""
        return foolbox.attacks.BoundaryAttack(
            steps=self.steps, tensorboard=False, update_stats_every_k=10
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoolboxHopSkipJump(_FoolboxAttack):
    """Steps along the boundary's normal, estimated from decisions.

    `approximate_gradients` (`hop_skip_jump.py`) divides an example's estimate by the
    norm of the *whole batch's*, so that each step is too short, the more so the larger
    the batch. Here examples are attacked one by one, and an estimate asks about its
    samples in one call.

    Attributes:
        norm: "l2" or "linf".
        pool: Images to start from; by default those of the same batch.
        pool_digest: Computed: tells pools apart.
        steps: Steps along the boundary.
        initial_samples: Calls for the first estimate of the normal; more in later ones.

    Reference: Chen et al. (2020), arXiv:1904.02144.
    """

    steps: int = 64
    initial_samples: int = 100

    one_by_one: ClassVar[bool] = True
    legal_norms: ClassVar[tuple[str, ...]] = ("l2", "linf")

    def attack(self, shape: tuple[int, ...]) -> Any:
        """Foolbox's own attack."""
        return _HopSkipJump(
            steps=self.steps,
            initial_gradient_eval_steps=self.initial_samples,
            tensorboard=False,
            constraint=self.norm,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoolboxBrendelBethge(_FoolboxAttack):
    """Along the boundary, by its normal, to the point that is nearest to the image.

    Each step solves a problem in a trust region, compiled by numba when the first of a
    norm is made: half a minute. `run` (`brendel_bethge.py`) takes a radius in units of
    the number of pixels of the *whole batch* (`rate_normalization`), so that an
    example's result depends on how many others there are. Here the first radius is an l2
    length of 1, whatever the batch.

    Like every walk along a boundary it ends at a local minimum, which the start
    chooses: a larger `pool` gives shorter distances.

    Attributes:
        norm: "l1", "l2" or "linf".
        pool: Images to start from; by default those of the same batch.
        pool_digest: Computed: tells pools apart.
        steps: Steps; each costs a gradient. The radius is halved twenty times.

    Reference: Brendel et al. (2019), arXiv:1907.01003.
    """

    steps: int = 1000

    legal_norms: ClassVar[tuple[str, ...]] = ("l1", "l2", "linf")

    def attack(self, shape: tuple[int, ...]) -> Any:
        """Foolbox's own attack."""
        kinds = {
            "l1": foolbox.attacks.L1BrendelBethgeAttack,
            "l2": foolbox.attacks.L2BrendelBethgeAttack,
            "linf": foolbox.attacks.LinfinityBrendelBethgeAttack,
        }
        radius = 1.0 / math.prod(shape)
        return kinds[self.norm](steps=self.steps, lr=radius, tensorboard=False)


class _HopSkipJump(foolbox.attacks.HopSkipJumpAttack):
    """Of one example."""

    def approximate_gradients(
        self, is_adversarial: Any, x_advs: Any, steps: int, delta: Any
    ) -> Any:
        """The boundary's unit normal at `x_advs`, from the classes of `steps` images near it.

        As upstream's, which asks about one of them after the other.
        """
        shape = (steps, *x_advs.shape[1:])
        if self.constraint == "l2":
            draws = tf.random.normal(shape)
        else:
            draws = tf.random.uniform(shape, -1.0, 1.0)
        lengths = tf.norm(tf.reshape(draws, (steps, -1)), axis=1)
        moves = draws * tf.reshape(delta.raw / lengths, (steps, *[1] * (len(shape) - 1)))
        near = tf.clip_by_value(x_advs.raw + moves, 0, 1)
        signs = tf.where(is_adversarial(eagerpy.astensor(near)).raw, 1.0, -1.0)
        mean = tf.reduce_mean(signs)
        weights = signs if abs(mean) == 1 else signs - mean
        normal = tf.tensordot(weights, near - x_advs.raw, 1)
        return eagerpy.astensor(normal[None] / (tf.norm(normal) + 1e-12))


class _Misclassified(foolbox.criteria.Misclassification):
    """As upstream's; of several images and one label, too."""

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        found, restore = eagerpy.astensor_(outputs)
        return restore(found.argmax(axis=-1) != self.labels)


class _Counted:
    """A classifier as Foolbox calls it for some examples, its gradient compiled, counted."""

    def __init__(self, model: CompiledClassifier, examples: int) -> None:
        self._model = model
        self._examples = examples
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += len(images) // self._examples
        outputs = tf.constant(self._model.logits(images))

        @tf.custom_gradient
        def differentiable(images: Tensor) -> tuple[Tensor, Any]:
            def backward(weights: Tensor) -> Tensor:
                return tf.constant(self._model.compiled("pullback", _pullback)(images, weights))

            return tf.identity(outputs), backward

        return differentiable(images)


def _pullback(logits: Logits, images: Tensor, weights: Tensor) -> Tensor:
    """Gradient of each example's logits, weighted."""
    return input_gradient(logits, images, lambda outputs: ops.sum(outputs * weights, axis=1))[2]
