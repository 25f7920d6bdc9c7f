"""CleverHans 4.0.0 behind the attack protocol, on the TensorFlow backend.

Each attack is one compiled function per shape of batch, whatever the radius; every
argument of CleverHans is passed explicitly. Where CleverHans is at fault, the
docstring says what it does, where, and what is done here instead; CleverHans itself
is never changed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tvkeras import checks, norms
from tvkeras.attacks.base import Attack, tempered
from tvkeras.inference import CompiledClassifier, Logits, Randomness

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "CleverHans attacks TensorFlow models: set KERAS_BACKEND=tensorflow, got "
        f"{keras.backend.backend()!r}. The other attacks of tvkeras.attacks run on every backend."
    )

import tensorflow as tf
from cleverhans.tf2 import utils
from cleverhans.tf2.attacks import carlini_wagner_l2, spsa
from cleverhans.tf2.attacks.basic_iterative_method import basic_iterative_method
from cleverhans.tf2.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.tf2.attacks.momentum_iterative_method import momentum_iterative_method

Tensor = Any

_ORDERS = {"l1": 1, "l2": 2, "linf": np.inf}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InBall(Attack):
    """An attack by gradients at a fixed epsilon; the perturbation in units of epsilon.

    CleverHans is given x = 0, the model delta -> logits(images + epsilon delta) and
    the pixels' bounds in units of epsilon, for these reasons:

    - `projected_gradient_descent.py` asserts `eps_iter <= eps`, which no tensor
      survives in a graph: a radius would have to be a constant, compiled anew each
      time. Here both are constants, eps = 1.
    - `optimize_linear` (`utils.py`) floors the *squared* l2 norm of a gradient at
      1e-12, and the momentum method floors the mean of its entries at 1e-12: the
      step of a gradient shorter than 1e-6 is too short, and the attack silently
      stays where it is. Here gradients arrive rescaled (`_rescaled`).
    - The cross-entropy of float32 logits forgets the true class at margins over 16,
      and has no gradient at all over 103. Here no margin exceeds 10 (`tempered`).
    - A one-sided clip stops the fast gradient method and is silently none in the
      momentum method. Here both bounds are always given.
    """

    fixed_epsilon: ClassVar[bool] = True
    legal_norms: ClassVar[tuple[str, ...]] = ("l2", "linf")

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, self.legal_norms)

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """Attacks one batch."""
        unit = tf.maximum(epsilon, 1e-30)  # epsilon = 0 leaves every image as it is

        def model(delta: Tensor) -> Tensor:
            return tempered(logits(images + epsilon * _rescaled(delta)), labels)

        arguments = {
            "norm": _ORDERS[self.norm],
            "clip_min": -images / unit,
            "clip_max": (1 - images) / unit,
            "y": labels,
            "targeted": False,
            "sanity_checks": False,
        }
        delta, calls = self.unit_perturbation(model, tf.zeros_like(images), arguments, random)
        x_adv = tf.clip_by_value(images + epsilon * delta, 0.0, 1.0)
        return x_adv, tf.fill(tf.shape(labels), calls)

    def unit_perturbation(
        self, model: Logits, zero: Tensor, arguments: dict[str, Any], random: Randomness
    ) -> tuple[Tensor, int]:
        """The perturbation found in the unit ball around `zero`, and the model calls."""
        raise TypeError(f"{type(self).__name__} is no attack: use one of its subclasses.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansFGSM(_InBall):
    """The fast gradient method: one step of length epsilon.

    Reference: Goodfellow et al. (2015), arXiv:1412.6572.
    """

    legal_norms: ClassVar[tuple[str, ...]] = ("l1", "l2", "linf")

    def unit_perturbation(
        self, model: Logits, zero: Tensor, arguments: dict[str, Any], random: Randomness
    ) -> tuple[Tensor, int]:
        """`fast_gradient_method` with the true labels."""
        return fast_gradient_method(model, zero, 1.0, loss_fn=None, **arguments), 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansBIM(_InBall):
    """The basic iterative method, I-FGSM: projected steps that start from the image.

    `basic_iterative_method.py` sets `sanity_checks=True`, which under clipping calls
    `np.all` on tensors of different shapes and raises; here it is off, and the
    protocol checks bounds and radius itself.

    Attributes:
        norm: "l2" or "linf".
        steps: Gradient steps.
        relative_step: Length of a step over epsilon; by default 2.5 / steps, at most 1.

    Reference: Kurakin et al. (2017), arXiv:1607.02533.
    """

    steps: int = 20
    relative_step: float | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        checks.whole_number("steps", self.steps, minimum=1)
        if self.relative_step is not None:
            checks.number(
                "relative_step", self.relative_step, minimum=0.0, maximum=1.0, exclusive=True
            )

    @property
    def _step(self) -> float:
        return self.relative_step or min(1.0, 2.5 / self.steps)

    def unit_perturbation(
        self, model: Logits, zero: Tensor, arguments: dict[str, Any], random: Randomness
    ) -> tuple[Tensor, int]:
        """`basic_iterative_method`, its loop a graph's."""
        attack = tf.autograph.to_graph(basic_iterative_method)
        steps = tf.constant(self.steps)
        return attack(model, zero, 1.0, self._step, steps, **arguments), self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansPGD(CleverHansBIM):
    """Projected gradient descent from a random start.

    `projected_gradient_descent.py` has no random start unless `rand_init` is set, and
    then takes it from `random_lp_vector` (`utils.py`), whose `tf.random` numbers
    depend on all that were drawn before. Here the start is a function of the seed,
    uniform in the ball, and the loop around CleverHans's step and projection is
    written again, because upstream's takes no start.

    Attributes:
        norm: "l2" or "linf".
        steps: Gradient steps.
        relative_step: Length of a step over epsilon; by default 2.5 / steps, at most 1.
        random_start: Whether to start from a random point of the ball; otherwise this
            is `CleverHansBIM`.

    Reference: Madry et al. (2018), arXiv:1706.06083.
    """

    random_start: bool = True

    def unit_perturbation(
        self, model: Logits, zero: Tensor, arguments: dict[str, Any], random: Randomness
    ) -> tuple[Tensor, int]:
        """`fast_gradient_method` and `clip_eta`, again and again."""

        def clip(delta: Tensor) -> Tensor:
            return tf.clip_by_value(delta, arguments["clip_min"], arguments["clip_max"])

        def step(_: Tensor, delta: Tensor) -> Tensor:
            delta = fast_gradient_method(model, delta, self._step, loss_fn=None, **arguments)
            return clip(utils.clip_eta(delta, arguments["norm"], 1.0))

        start = zero
        if self.random_start:
            with random.at(0) as seed:
                start = clip(norms.random_in_ball(zero, self.norm, 1.0, seed))
        return ops.fori_loop(0, self.steps, step, start), self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansMIM(CleverHansBIM):
    """The momentum iterative method.

    Attributes:
        norm: "l2" or "linf".
        steps: Gradient steps.
        relative_step: Length of a step over epsilon; by default 2.5 / steps, at most 1.
        decay: Of the momentum.

    Reference: Dong et al. (2018), arXiv:1710.06081.
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        checks.number("decay", self.decay, minimum=0.0)

    def unit_perturbation(
        self, model: Logits, zero: Tensor, arguments: dict[str, Any], random: Randomness
    ) -> tuple[Tensor, int]:
        """`momentum_iterative_method`, its loop a graph's."""
        attack = tf.autograph.to_graph(momentum_iterative_method)
        steps = tf.constant(self.steps)
        delta = attack(model, zero, 1.0, self._step, steps, decay_factor=self.decay, **arguments)
        return delta, self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansCW(Attack):
    """The l2 attack of Carlini and Wagner: smallest perturbation by Adam in tanh space.

    The objective (`loss_fn`, `clip_tanh` of `carlini_wagner_l2.py`) is CleverHans's.
    The search around it, `CarliniWagnerL2._attack`, is written again, for there

    - `optimizer.variables()` raises under Keras 3, where it is a property;
    - the optimizer is reset by zeroing its variables, of which the learning rate is
      one: nothing moves any more, and the clean images come back without a word;
    - `self.targeted = y is not None`: true labels make the attack a targeted one;
    - the constant has the shape of the images and meets bounds of shape (batch,):
      its broadcast fails, or mixes examples where the sizes happen to agree;
    - the confidence is added to *all* logits, which no argmax notices;
    - the binary search asks whether *any* round succeeded (`best_score`), not the
      last one, so that after a success the constant only falls.

    The early stop on the whole batch's loss is left out: an example's result would
    depend on its neighbours.

    Attributes:
        norm: "l2".
        search_steps: Rounds of the binary search for the constant.
        steps: Adam's steps in a round.
        learning_rate: Adam's, in tanh space.
        initial_const: Weight of the classification loss in the first round.
        confidence: By how much another logit must exceed the true one.

    Reference: Carlini & Wagner (2017), arXiv:1608.04644.
    """

    search_steps: int = 5
    steps: int = 1000
    learning_rate: float = 5e-3
    initial_const: float = 1e-2
    confidence: float = 0.0

    fixed_epsilon: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, ("l2",))
        checks.whole_number("search_steps", self.search_steps, minimum=1)
        checks.whole_number("steps", self.steps, minimum=1)
        checks.number("learning_rate", self.learning_rate, minimum=0.0, exclusive=True)
        checks.number("initial_const", self.initial_const, minimum=0.0, exclusive=True)
        checks.number("confidence", self.confidence, minimum=0.0)

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """A round of Adam for each constant of the binary search; the nearest success."""
        w = tf.atanh((2 * images - 1) * 0.999999)
        zeros = tf.zeros_like(images)
        none = tf.zeros_like(labels, tf.float32)

        def descend(const: Tensor, best: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            def step(index: Tensor, state: Any) -> Any:
                change, first, second, x_adv, squared, found = state
                candidate, size, won, g = self._objective(logits, w, change, labels, const)
                first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
                count = tf.cast(index + 1, tf.float32)
                mean = first / (1 - 0.9**count)
                change -= self.learning_rate * mean / (tf.sqrt(second / (1 - 0.999**count)) + 1e-8)
                better = won & (size < squared)
                x_adv = tf.where(better[:, None, None, None], candidate, x_adv)
                return change, first, second, x_adv, tf.where(better, size, squared), found | won

            start = (zeros, zeros, zeros, *best, none > 0)
            return ops.fori_loop(0, self.steps, step, start)[3:]

        def search(_: Tensor, state: Any) -> Any:
            const, lower, upper, *best = state
            *best, found = descend(const, tuple(best))
            lower, upper = tf.where(found, lower, const), tf.where(found, const, upper)
            const = tf.where(upper < np.inf, (lower + upper) / 2, 10 * const)
            return const, lower, upper, *best

        start = (none + self.initial_const, none, none + np.inf, images, none + np.inf)
        x_adv = ops.fori_loop(0, self.search_steps, search, start)[3]
        return x_adv, tf.fill(tf.shape(labels), self.search_steps * self.steps)

    def _objective(
        self, logits: Logits, w: Tensor, change: Tensor, labels: Tensor, const: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image at w + change, its squared distance, success, and the loss's gradient."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(change)
            x_adv = carlini_wagner_l2.clip_tanh(w + change, clip_min=0.0, clip_max=1.0)
            outputs = logits(x_adv)
            classes = tf.one_hot(labels, outputs.shape[-1])
            loss, squared = carlini_wagner_l2.loss_fn(
                x=w,
                x_new=x_adv,
                y_true=classes,
                y_pred=outputs,
                confidence=self.confidence,
                const=const,
                targeted=False,
                clip_min=0.0,
                clip_max=1.0,
            )
        won = tf.argmax(outputs + self.confidence * classes, axis=1) != labels
        return x_adv, squared, won, tape.gradient(loss, change)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansSPSA(Attack):
    """Gradient-free descent of the margin, from differences along random signs.

    `spsa.py` constructs `Adam(lr=)`, which Keras 3 refuses, takes a batch of one, runs
    eagerly, and draws numbers that no seed determines. Here its loop
    (`projected_optimization`) runs compiled, over the images of a batch one by one,
    with an optimizer of the same estimate and update and seeded numbers (`_SPSAAdam`).
    An image is done as soon as it is misclassified.

    Attributes:
        norm: "linf".
        steps: Steps of Adam, at most.
        samples: Model calls for one estimate of the gradient; even.
        delta: Distance of the samples, in pixel units.
        learning_rate: Adam's, in pixel units.

    Reference: Uesato et al. (2018), arXiv:1802.05666.
    """

    norm: str = "linf"
    steps: int = 100
    samples: int = 128
    delta: float = 0.01
    learning_rate: float = 0.01

    fixed_epsilon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("norm", self.norm, ("linf",))
        checks.whole_number("steps", self.steps, minimum=1)
        checks.number("delta", self.delta, minimum=0.0, exclusive=True)
        checks.number("learning_rate", self.learning_rate, minimum=0.0, exclusive=True)
        if checks.whole_number("samples", self.samples, minimum=2) % 2:
            raise ValueError(f"samples must be even, got samples={self.samples}.")

    def search(
        self,
        model: CompiledClassifier,
        images: np.ndarray,
        labels: np.ndarray,
        epsilon: float | None,
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Attacks one image after another inside one compiled function."""
        calls = tf.Variable(0, dtype=tf.int64)  # lives as long as the function compiled first

        def attack(logits: Logits, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            images, labels, epsilon, seed = tensors

            def one(row: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                calls.assign(0)
                x_adv = self._one(logits, calls, *row, epsilon, model.randomness(seed))
                return x_adv, calls.read_value()

            rows = (images, labels, tf.range(tf.shape(images)[0]))
            return tf.map_fn(
                one, rows, parallel_iterations=1, fn_output_signature=(tf.float32, tf.int64)
            )

        return model.compiled(self, attack)(images, labels, np.float32(epsilon), np.int32(seed))

    def _one(
        self,
        logits: Logits,
        calls: tf.Variable,
        image: Tensor,
        label: Tensor,
        row: Tensor,
        epsilon: Tensor,
        random: Randomness,
    ) -> Tensor:
        """One image's x_adv; its model calls are added to `calls`."""

        def margin(images: Tensor, label: Tensor) -> Tensor:
            calls.assign_add(tf.shape(images, out_type=tf.int64)[0])
            outputs = logits(images)
            return -spsa.margin_logit_loss(outputs, label, nb_classes=outputs.shape[-1])

        optimizer = _SPSAAdam(self, image[None], epsilon, random, row)
        return spsa.projected_optimization(
            margin,
            image[None],
            label[None],
            epsilon,
            self.steps,
            optimizer,
            clip_min=0.0,
            clip_max=1.0,
            early_stop_loss_threshold=0.0,
            is_debug=False,
        )[0]


class _SPSAAdam:
    """What `projected_optimization` needs of `SPSAAdam`, with seeded numbers.

    The estimate and the update are upstream's; they use none of the variables that a
    Keras optimizer makes, and could not make inside a compiled function.
    """

    beta_1, beta_2, epsilon = 0.9, 0.999, 1e-7

    init_state = spsa.SPSAAdam.init_state
    _compute_gradients = spsa.SPSAAdam._compute_gradients
    _apply_gradients = spsa.SPSAAdam._apply_gradients

    def __init__(
        self, attack: CleverHansSPSA, image: Tensor, epsilon: Tensor, random: Randomness, row: Any
    ) -> None:
        self.lr = attack.learning_rate
        self._delta = attack.delta
        self._num_samples = attack.samples // 2  # each with its mirror image
        self._num_iters = 1
        self._random = random
        self._first = row * (attack.steps + 1)
        self._now = self._first
        with random.at(self._first) as seed:
            start = norms.random_in_ball(image, "linf", epsilon, seed)
        self._start = tf.clip_by_value(image + start, 0.0, 1.0) - image

    def minimize(
        self, loss_fn: Callable[..., Tensor], x: list[Tensor], optim_state: dict[str, Any]
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """One step; the first one sets out from the seeded start, not from upstream's."""
        self._now = self._first + 1 + tf.cast(optim_state["t"], tf.int32)
        x = [tf.where(tf.equal(optim_state["t"], 0.0), self._start, x[0])]
        return self._apply_gradients(self._compute_gradients(loss_fn, x), x, optim_state)

    def _get_delta(self, x: Tensor, delta: float) -> Tensor:
        with self._random.at(self._now) as seed:
            shape = (self._num_samples, *x.shape[1:])
            return delta * tf.sign(keras.random.uniform(shape, -1.0, 1.0, seed=seed))


@tf.custom_gradient
def _rescaled(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`x` itself; the gradient of each example is divided by its largest entry."""

    def backward(g: Tensor) -> Tensor:
        largest = tf.reduce_max(tf.abs(g), axis=(1, 2, 3), keepdims=True)
        return tf.math.divide_no_nan(g, largest)

    return tf.identity(x), backward
