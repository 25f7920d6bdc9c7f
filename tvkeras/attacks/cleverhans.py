"""CleverHans 4.0.0 behind the attack protocol, on the TensorFlow backend.

Each attack calls CleverHans's own functions inside one that is compiled once per shape of
batch, whatever the radius. CleverHans itself is never changed: `_mended` makes copies of
functions that find others under some names. The faults stand at the attack they concern.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tvkeras import backends, checks, norms
from tvkeras.attacks.base import ORDERS, Attack, Batch
from tvkeras.attacks.carlini_wagner import CarliniWagner, adam
from tvkeras.attacks.parts import Nearest, misclassified, tempered
from tvkeras.inference import Logits, Randomness, Tensor

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "CleverHans attacks TensorFlow models: set KERAS_BACKEND=tensorflow, got "
        f"{keras.backend.backend()!r}. The other attacks of tvkeras.attacks run on every backend."
    )

import tensorflow as tf
from cleverhans.tf2.attacks import carlini_wagner_l2, spsa
from cleverhans.tf2.attacks.basic_iterative_method import basic_iterative_method
from cleverhans.tf2.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.tf2.attacks.momentum_iterative_method import momentum_iterative_method
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent


def _mended(function: Any, **others: Any) -> Any:
    """A copy of a function that finds `others` under those names of its module."""
    names = {**function.__globals__, **others}
    return types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )


@tf.custom_gradient
def _rescaled(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`x` itself; the gradient of each example is divided by its largest entry."""

    def backward(g: Tensor) -> Tensor:
        largest = tf.reduce_max(tf.abs(g), axis=(1, 2, 3), keepdims=True)
        return tf.math.divide_no_nan(g, largest)

    return tf.identity(x), backward


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansFGSM(Attack):
    """The fast gradient method, at a fixed epsilon: one step of that length.

    CleverHans is given x = 0, the model delta -> logits(images + epsilon delta) and the
    pixels' bounds in units of epsilon; here and in the attacks below, for these reasons:

    - `projected_gradient_descent.py` asserts `eps_iter <= eps`, which no tensor survives
      in a graph: a radius would be compiled anew each time. Here both are constants.
    - `optimize_linear` (`utils.py`) floors the *squared* l2 norm of a gradient at 1e-12,
      and the momentum method floors the mean of its entries: the step of a gradient
      shorter than 1e-6 is too short, and the attack silently stays where it is. Here
      gradients arrive rescaled (`_rescaled`).
    - The cross-entropy of float32 logits forgets the true class at margins over 16, and
      has no gradient at all over 103. Here no margin exceeds 10 (`tempered`).
    - A one-sided clip stops this method and is silently none in the momentum method.
      Here both bounds are always given.
    - `basic_iterative_method.py` sets `sanity_checks=True`, which under clipping calls
      `np.all` on tensors of different shapes and raises. Here the protocol checks.

    Attributes:
        norm: Norm of the perturbation: "l2", "linf" or "l1".

    Reference: Goodfellow et al. (2015), arXiv:1412.6572.
    """

    fixed_epsilon: ClassVar[bool] = True
    function: ClassVar[Callable[..., Tensor]] = staticmethod(fast_gradient_method)

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """CleverHans's function, its loop a graph's."""
        unit = tf.maximum(epsilon, 1e-30)  # epsilon = 0 leaves every image as it is
        with random.at(0) as seed:
            start = norms.random_in_ball(images, self.norm, 1.0, seed)

        def model(delta: Tensor) -> Tensor:
            return tempered(logits(images + epsilon * _rescaled(delta)), labels)

        function = _mended(self.function, random_lp_vector=lambda *_, **__: start)
        delta = tf.autograph.to_graph(function)(
            model,
            tf.zeros_like(images),
            eps=1.0,
            norm=ORDERS[self.norm],
            clip_min=-images / unit,
            clip_max=(1 - images) / unit,
            y=labels,
            sanity_checks=False,
            **self.settings(),
        )
        x_adv = tf.clip_by_value(images + epsilon * delta, 0.0, 1.0)
        return x_adv, tf.fill(tf.shape(labels), getattr(self, "steps", 1))

    def settings(self) -> dict[str, Any]:
        """Further arguments of CleverHans's function."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansBIM(CleverHansFGSM):
    """The basic iterative method, I-FGSM: projected steps that start from the image.

    Attributes:
        norm: "l2" or "linf".
        steps: Gradient steps.
        relative_step: Length of a step over epsilon; by default 2.5 / steps, at most 1.

    Reference: Kurakin et al. (2017), arXiv:1607.02533.
    """

    steps: int = 20
    relative_step: float | None = None

    legal_norms: ClassVar[tuple[str, ...]] = ("l2", "linf")
    function: ClassVar[Callable[..., Tensor]] = staticmethod(basic_iterative_method)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        if self.relative_step is not None:
            checks.number("relative_step", self.relative_step, maximum=1.0)

    def settings(self) -> dict[str, Any]:
        """Length and number of steps."""
        step = self.relative_step or min(1.0, 2.5 / self.steps)
        return {"eps_iter": step, "nb_iter": tf.constant(self.steps)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansPGD(CleverHansBIM):
    """Projected gradient descent from a random start; attributes as of `CleverHansBIM`.

    Upstream starts from the image, or from `random_lp_vector` (`utils.py`), whose numbers
    depend on all that were drawn before. Here the start is a function of the seed.

    Reference: Madry et al. (2018), arXiv:1706.06083.
    """

    function: ClassVar[Callable[..., Tensor]] = staticmethod(projected_gradient_descent)

    def settings(self) -> dict[str, Any]:
        """Length and number of steps, and the random start."""
        return {**super().settings(), "rand_init": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansMIM(CleverHansBIM):
    """The momentum iterative method; attributes as of `CleverHansBIM`.

    Reference: Dong et al. (2018), arXiv:1710.06081.
    """

    function: ClassVar[Callable[..., Tensor]] = staticmethod(momentum_iterative_method)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansCW(CarliniWagner):
    """The l2 attack of Carlini and Wagner: smallest perturbation by Adam in tanh space.

    The objective and its gradient are CleverHans's, without its early stop on the whole
    batch's loss. The search around them is that of `CarliniWagner`, for `_attack`
    (`carlini_wagner_l2.py`)

    - calls `optimizer.variables()`, which raises under Keras 3, to set all of them to
      zero, the learning rate too: nothing moves any more, without a word;
    - takes true labels, `y`, for targets;
    - has a constant of the images' shape that meets bounds of shape (batch,);
    - adds the confidence to *all* logits, which no argmax notices (here the label's
      logit has it to begin with);
    - asks whether *any* round succeeded, so that after a success the constant only falls.

    Attributes:
        norm: "l2".
        steps: Adam's steps for each weight.
        step_size: Adam's learning rate, in tanh space.
        search_steps: Weights tried for each example.
        initial_weight: The first weight of the classification loss.
        confidence: By how much another logit must exceed the true one.

    Reference: Carlini & Wagner (2017), arXiv:1608.04644.
    """

    step_size: float = 5e-3
    search_steps: int = 5
    initial_weight: float = 1e-2
    confidence: float = 0.0

    def descend(
        self, logits: Logits, images: Tensor, labels: Tensor, weight: Tensor, nearest: Nearest
    ) -> tuple[Nearest, Tensor, Tensor]:
        """Adam from the image: the nearest success so far, who succeeded here, and queries."""
        origin, zeros = tf.atanh((2 * images - 1) * 0.999999), tf.zeros_like(images)
        label = tf.one_hot(labels, logits(images).shape[1])
        pixels = {"clip_min": 0.0, "clip_max": 1.0}

        def loss(change: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            x_adv = carlini_wagner_l2.clip_tanh(origin + change, **pixels)
            outputs = logits(x_adv) + self.confidence * label
            total, _ = carlini_wagner_l2.loss_fn(
                origin, x_adv, label, outputs, confidence=0.0, const=weight, **pixels
            )
            return total, (x_adv, outputs)

        def step(number: Tensor, state: tuple[Any, ...]) -> tuple[Any, ...]:
            moments, nearest, found = state
            (_, (x_adv, outputs)), (g,) = backends.value_and_gradient(loss, (moments[0],))
            success = misclassified(outputs, labels)
            nearest = nearest.after(x_adv, norms.length(x_adv - images, "l2"), success)
            return adam(number, g, moments, self.step_size), nearest, found | success

        start = ((zeros, zeros, zeros), nearest, labels < 0)
        _, nearest, found = ops.fori_loop(0, self.steps, step, start)
        return nearest, found, tf.fill(tf.shape(labels), tf.cast(self.steps, labels.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHansSPSA(Attack):
    """Gradient-free descent of the margin, from differences along random signs.

    `spsa.py` constructs `Adam(lr=)`, which Keras 3 refuses, takes a batch of one, runs
    eagerly, and draws numbers that no seed determines. Here it runs compiled, over the
    images of a batch one by one, with seeded numbers, and with an optimizer that makes
    none of the variables of Keras's: upstream's update does not use them. An image is
    done as soon as it is misclassified.

    Attributes:
        norm: "linf".
        steps: Steps of Adam, at most.
        samples: Model calls for one estimate of the gradient; even.

    Reference: Uesato et al. (2018), arXiv:1802.05666.
    """

    norm: str = "linf"
    steps: int = 100
    samples: int = 128

    fixed_epsilon: ClassVar[bool] = True
    legal_norms: ClassVar[tuple[str, ...]] = ("linf",)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        if self.samples % 2:
            raise ValueError(f"samples must be even, got samples={self.samples}.")

    def search(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Attacks one image after another inside one compiled function."""
        model = batch.model
        draws = tf.Variable(0)  # lives as long as the function compiled first

        def attack(logits: Logits, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            images, labels, epsilon, seed = tensors
            upstream = _seeded_spsa(draws, model.randomness(seed))

            def one(row: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                image, label, number = row
                first = number * (self.steps + 1)
                draws.assign(first)
                x_adv = upstream(
                    logits,
                    image[None],
                    label[None],
                    epsilon,
                    self.steps,
                    clip_min=0.0,
                    clip_max=1.0,
                    early_stop_loss_threshold=0.0,
                    spsa_samples=self.samples,
                )
                with tf.control_dependencies([x_adv]):
                    steps = draws.read_value() - first - 1  # the first draw is the start
                return x_adv[0], steps * (self.samples + 1)

            rows = (images, labels, tf.range(tf.shape(images)[0]))
            return tf.map_fn(
                one, rows, parallel_iterations=1, fn_output_signature=(tf.float32, tf.int32)
            )

        return model.compiled(self, attack)(*batch.arrays)


def _seeded_spsa(draws: tf.Variable, random: Randomness) -> Callable[..., Tensor]:
    """`spsa`, which draws its numbers from `random` and counts the draws."""

    def uniform(shape: Any, minval: Tensor, maxval: Tensor, dtype: str = "float32") -> Tensor:
        with random.at(draws.assign_add(1)) as seed:
            return keras.random.uniform(shape, minval, maxval, dtype=dtype, seed=seed)

    random_numbers = types.SimpleNamespace(uniform=uniform)
    tensorflow = types.SimpleNamespace(**{**vars(tf), "random": random_numbers})

    class Optimizer:
        beta_1, beta_2, epsilon = 0.9, 0.999, 1e-7

        init_state = spsa.SPSAAdam.init_state
        minimize = spsa.SPSAAdam.minimize
        _compute_gradients = spsa.SPSAAdam._compute_gradients
        _apply_gradients = spsa.SPSAAdam._apply_gradients
        _get_delta = _mended(spsa.SPSAAdam._get_delta, tf=tensorflow)

        def __init__(self, lr: float, delta: float, num_samples: int, num_iters: int) -> None:
            self.lr = lr
            self._delta = delta
            self._num_samples = num_samples // 2  # each with its mirror image
            self._num_iters = num_iters

    optimization = _mended(spsa.projected_optimization, tf=tensorflow)
    return _mended(spsa.spsa, SPSAAdam=Optimizer, projected_optimization=optimization)
