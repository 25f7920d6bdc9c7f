"""Lower bounds on the distance to the decision boundary, each typed by what it is worth.

`estimated_bound` rests on gradients that were seen, `smoothed_bound` holds with a
stated probability, `certified_bound` is proved.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np
import scipy.stats
from keras import layers, ops

from tvkeras import checks, norms
from tvkeras.attacks import AttackedClassifier
from tvkeras.attacks.statistics import loss_statistics
from tvkeras.inputs import as_float

Tensor = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound for each image, and what it takes for it to be true.

    Attributes:
        kind: "estimated" (from a finite sample of gradients: may be wrong anywhere),
            "probabilistic" (right for an image with a stated probability) or
            "certified" (proved).
        norm: The norm that `radius` is measured in.
        radius: float64 `(count,)`, pixel units: no image nearer than this is
            classified otherwise; 0 where nothing is claimed.
        classes: int64 `(count,)`: the class that the claim is about, the
            classifier's own; -1 where the smoothed classifier abstains.
        assumptions: What the claim takes for granted.
    """

    kind: Literal["estimated", "probabilistic", "certified"]
    norm: str
    radius: np.ndarray
    classes: np.ndarray
    assumptions: str


def estimated_bound(
    classifier: keras.Model | AttackedClassifier,
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
    model = AttackedClassifier.of(classifier)
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


def smoothed_bound(
    classifier: keras.Model | AttackedClassifier,
    images: np.ndarray,
    *,
    sigma: float,
    selection_samples: int = 100,
    samples: int = 10_000,
    alpha: float = 0.001,
    batch_size: int = 500,
    seed: int = 0,
) -> Bound:
    """Randomised smoothing: sigma Phi^-1(p), with p a lower bound of a probability.

    The smoothed classifier answers the class that the classifier gives most often to
    x + sigma z, z normal. `selection_samples` draws (the paper's n0) choose the class;
    `samples` new ones (n) count how often it occurs, and p is the one-sided
    Clopper-Pearson bound of its probability at level 1 - alpha. Where p <= 1/2 it
    abstains. The bound is about the *smoothed* classifier; noise is not clipped.

    Args:
        classifier: Maps images to logits.
        images: Floats in the classifier's bounds, by default [0, 1], or uint8; shape
            `(count, height, width, channels)`.
        sigma: Standard deviation of the noise, in pixel units.
        selection_samples: Draws that choose the class.
        samples: Draws that bound its probability.
        alpha: Probability, for each image, that its radius is wrong.
        batch_size: Noisy images in a batch.
        seed: Of the noise.

    Returns:
        A probabilistic bound in l2; radius 0 and class -1 where it abstains.

    Reference: Cohen et al. (2019), arXiv:1902.02918.
    """
    checks.number("sigma", sigma, minimum=0.0, exclusive=True)
    checks.number("alpha", alpha, minimum=0.0, maximum=1.0, exclusive=True)
    sizes = {"selection_samples": selection_samples, "samples": samples, "batch_size": batch_size}
    for name, value in sizes.items():
        checks.whole_number(name, value, minimum=1)
    model = AttackedClassifier.of(classifier)
    images = as_float(model.images(images), model.bounds)
    model.logits(images[:1])  # refuses other than logits

    def draw(logits: Any, image: Tensor, rows: Tensor, sigma: Tensor, *key: Tensor) -> Tensor:
        number, step = key
        with model.randomness(number).at(step) as generator:
            noise = keras.random.normal((batch_size, *image.shape), dtype="float32", seed=generator)
        outputs = logits(image + sigma * noise)
        hits = ops.one_hot(ops.argmax(outputs, axis=1), outputs.shape[-1], dtype="int32")
        return ops.sum(ops.where((ops.arange(batch_size) < rows)[:, None], hits, 0), axis=0)

    drawn = model.compiled(("smoothing", batch_size), draw)

    def counts(index: int, total: int, first_step: int) -> np.ndarray:
        number = np.random.default_rng((seed, index)).integers(2**31, dtype=np.int32)
        rest = range(total, 0, -batch_size)
        parts = [
            drawn(images[index], np.int32(rows), np.float32(sigma), number, np.int32(step))
            for step, rows in enumerate(rest, first_step)
        ]
        return np.sum(parts, axis=0)

    radius, classes = np.zeros(len(images)), np.full(len(images), -1)
    for index in range(len(images)):
        candidate = int(counts(index, selection_samples, 0).argmax())
        hits = counts(index, samples, -(-selection_samples // batch_size))[candidate]
        likely = scipy.stats.beta.ppf(alpha, hits, samples - hits + 1) if hits else 0.0
        if likely > 0.5:
            radius[index] = sigma * scipy.stats.norm.ppf(likely)
            classes[index] = candidate
    return Bound(
        kind="probabilistic",
        norm="l2",
        radius=radius,
        classes=classes,
        assumptions=f"each image's radius is right with probability {1 - alpha:g}, for the "
        f"classifier smoothed by noise of standard deviation {sigma:g}, not for its base",
    )


def certified_bound(
    classifier: keras.Model | AttackedClassifier, images: np.ndarray, batch_size: int = 250
) -> Bound:
    """The margin / (sqrt(2) L), with L the classifier's `lipschitz_constant`.

    The margin is the largest logit less the second. A difference of two logits changes
    by at most sqrt(2) L ||x' - x||_2, for e_i - e_j has length sqrt(2).

    Args:
        classifier: Maps images to logits.
        images: Floats in the classifier's bounds, by default [0, 1], or uint8; shape
            `(count, height, width, channels)`.
        batch_size: Images in a batch.

    Returns:
        A certified bound in l2.

    Raises:
        ValueError: For a layer without a known constant.

    Reference: Tsuzuku et al. (2018), arXiv:1802.04034.
    """
    model = AttackedClassifier.of(classifier)
    images = model.images(images)
    span = model.bounds.high - model.bounds.low
    constant = span * lipschitz_constant(model.classifier)  # radii are in units of [0, 1]
    (outputs,) = model.over(
        "all logits", lambda logits, images: (logits(images),), images, batch_size=batch_size
    )
    logits = outputs.astype(np.float64)
    second, first = np.sort(logits, axis=1)[:, -2:].T
    return Bound(
        kind="certified",
        norm="l2",
        radius=(first - second) / (math.sqrt(2) * constant),
        classes=logits.argmax(axis=1),
        assumptions="exact arithmetic: rounding of the float32 logits is not covered",
    )


def lipschitz_constant(model: keras.Model) -> float:
    """A proved bound of ||f(x) - f(x')||_2 / ||x - x'||_2 for a model in inference mode.

    Walks the graph from the input: a layer multiplies its input's constant by its own,
    a sum adds its inputs' constants, an average averages them, and a concatenation
    takes the root of their sum of squares.

    Args:
        model: Functional or Sequential, of one input and one output.

    Raises:
        ValueError: For another model, or a layer without a known constant.
    """
    graph = model._functional if isinstance(model, keras.Sequential) else model
    if not hasattr(graph, "_nodes_by_depth") or len(graph.inputs) * len(graph.outputs) != 1:
        raise ValueError(
            "lipschitz_constant needs a built functional or sequential model of one input and "
            f"one output, got {model!r}."
        )
    constants: dict[int, float] = {}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            inputs = [constants[id(tensor)] for tensor in node.input_tensors]
            constant = 1.0 if node.is_input else _propagated(node.operation, node, inputs)
            constants |= {id(tensor): constant for tensor in node.output_tensors}
    return constants[id(graph.outputs[0])]


def convolution_norm(kernel: np.ndarray, groups: int = 1) -> float:
    """A proved upper bound of a 2D convolution's l2 norm, for any image size.

    The convolution of images with zeros around them is one on the whole lattice Z^2,
    with its input restricted to the image and its output to some positions (padding,
    stride); dilation merely spreads the lattice. Its norm is therefore at most that on
    the lattice, the largest singular value of K(w) = sum_k W_k exp(-i k w) over all
    frequencies w (Parseval).

    Only a grid of N frequencies an axis can be looked at. For unit vectors u and v,
    p(w) = u* K(w) v is a trigonometric polynomial with `size` terms along an axis.
    q = |p|^2 - M^2/2, with M = max |p|, is real, of degree size - 1, and bounded by
    M^2/2, which it attains, say at w0. By M. Riesz, q(w0 + t) >= M^2/2 cos((size - 1) t)
    for |t| <= pi / (size - 1), that is, |p(w0 + t)| >= M cos((size - 1) t / 2). A point
    of the grid lies within t = pi/N of w0. Applied to one axis, then to the other,

        ||conv|| <= max over the grid of sigma(K) / prod cos((size - 1) pi / (2 N)).

    N = 10 (size - 1) makes that factor 1.025 for two axes, and 1 for 1x1 kernels.

    Args:
        kernel: Shape `(height, width, channels_in / groups, channels_out)`.
        groups: Of channels; the norm is the largest of the groups' norms.

    Reference: Sedghi et al. (2019), arXiv:1805.10408, for the spectrum; Riesz (1914),
    Jahresber. DMV 23, for the lemma; Delattre et al. (2024), arXiv:2402.00240, for
    zero padding.
    """
    degrees = [size - 1 for size in kernel.shape[:2]]
    grid = [max(10 * degree, 1) for degree in degrees]
    factor = math.prod(
        math.cos(degree * math.pi / (2 * count))
        for degree, count in zip(degrees, grid, strict=True)
    )
    spectrum = np.fft.rfft2(np.asarray(kernel, np.float64), s=grid, axes=(0, 1))
    parts = np.split(spectrum, groups, axis=-1)
    return max(_spectral_norm(part) for part in parts) / factor


def _spectral_norm(matrices: np.ndarray) -> float:
    """Largest singular value of all, rounded up by far more than float64's error.

    It is the root of the Gram matrix's largest eigenvalue, faster than by an SVD.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.swapaxes(-1, -2)
    gram = matrices @ matrices.conj().swapaxes(-1, -2)
    return math.sqrt(max(np.linalg.eigvalsh(gram).max(), 0.0)) * (1 + 1e-9)


def _propagated(layer: Any, node: Any, inputs: list[float]) -> float:
    """The constant of a layer's output, from those of its inputs."""
    if type(layer) in _MERGES:
        return _MERGES[type(layer)](inputs)
    if isinstance(layer, keras.Model):
        return inputs[0] * lipschitz_constant(layer)
    if type(layer) not in _LAYERS:
        known = sorted(kind.__name__ for kind in (*_LAYERS, *_MERGES))
        raise _unknown(layer, f"type {type(layer).__name__}; known are {known}")
    return inputs[0] * _LAYERS[type(layer)](layer, node.input_tensors[0].shape)


def _unknown(layer: Any, what: str) -> ValueError:
    return ValueError(f"lipschitz_constant cannot bound layer {layer.name!r}: {what}.")


def _activation(layer: Any) -> float:
    constants = {
        keras.activations.linear: 1.0,
        keras.activations.relu: 1.0,
        keras.activations.softplus: 1.0,
        keras.activations.gelu: 1.12891,  # slope Phi(x) + x phi(x), largest at x = sqrt(2)
        keras.activations.silu: 1.09984,  # largest slope at x = 2.39936
    }
    if layer.activation not in constants:
        known = [function.__name__ for function in constants]
        raise _unknown(layer, f"activation {layer.activation}; known are {known}")
    return constants[layer.activation]


def _convolution(layer: Any, shape: Any) -> float:
    kernel = ops.convert_to_numpy(layer.kernel)
    return convolution_norm(kernel, layer.groups) * _activation(layer)


def _dense(layer: Any, shape: Any) -> float:
    kernel = ops.convert_to_numpy(layer.kernel).astype(np.float64)
    return _spectral_norm(kernel) * _activation(layer)


def _batch_normalization(layer: Any, shape: Any) -> float:
    """The largest |gamma| / sqrt(variance + epsilon)."""
    variance = ops.convert_to_numpy(layer.moving_variance).astype(np.float64)
    gamma = ops.convert_to_numpy(layer.gamma) if layer.scale else 1.0
    return float(np.max(np.abs(gamma) / np.sqrt(variance + layer.epsilon)))


def _normalization(layer: Any, shape: Any) -> float:
    if layer.invert:
        raise _unknown(layer, "invert=True")
    variance = ops.convert_to_numpy(layer.variance).astype(np.float64)
    return 1 / max(math.sqrt(variance.min()), keras.backend.epsilon())


def _windows(layer: Any) -> int:
    """In how many pooling windows a pixel can be."""
    pairs = zip(layer.pool_size, layer.strides, strict=True)
    return math.prod(-(-size // stride) for size, stride in pairs)


def _max_pooling(layer: Any, shape: Any) -> float:
    """|max a - max b| <= ||a - b|| in each window; a pixel counts in `_windows`."""
    return math.sqrt(_windows(layer))


def _average_pooling(layer: Any, shape: Any) -> float:
    """sqrt(||A||_1 ||A||_inf): rows sum to 1, columns to `_windows` / size at most."""
    if layer.padding != "valid":
        raise _unknown(layer, f"padding={layer.padding!r}; known is 'valid'")
    return math.sqrt(_windows(layer) / math.prod(layer.pool_size))


def _global_average(layer: Any, shape: Any) -> float:
    """1 / sqrt(pixels); a side of unknown length counts as 1."""
    sides = shape[1:3] if layer.data_format == "channels_last" else shape[2:]
    return 1 / math.sqrt(math.prod(side or 1 for side in sides))


def _relu(layer: Any, shape: Any) -> float:
    if layer.threshold:
        raise _unknown(layer, f"threshold={layer.threshold}, where it jumps; known is 0")
    return max(1.0, layer.negative_slope)


def _identity(layer: Any, shape: Any) -> float:
    return 1.0


_MERGES: dict[type, Callable[[list[float]], float]] = {
    layers.Add: math.fsum,
    layers.Average: lambda constants: math.fsum(constants) / len(constants),
    layers.Concatenate: lambda constants: math.hypot(*constants),
}

_LAYERS: dict[type, Callable[[Any, Any], float]] = {
    layers.Activation: lambda layer, shape: _activation(layer),
    layers.AveragePooling2D: _average_pooling,
    layers.BatchNormalization: _batch_normalization,
    layers.Conv2D: _convolution,
    layers.Dense: _dense,
    layers.Dropout: _identity,
    layers.Flatten: _identity,
    layers.GlobalAveragePooling2D: _global_average,
    layers.MaxPooling2D: _max_pooling,
    layers.Normalization: _normalization,
    layers.ReLU: _relu,
    layers.Rescaling: lambda layer, shape: float(np.max(np.abs(layer.scale))),
    layers.ZeroPadding2D: _identity,
}
