"""Lower bounds on the distance to the decision boundary, each typed by what it is worth.

`estimated_bound` rests on gradients that were seen, `smoothed_bound` holds with a
stated probability.
"""

import dataclasses
from typing import Any, Literal

import keras
import numpy as np
import scipy.stats
from keras import ops

from tvkeras import checks, norms
from tvkeras.inference import CompiledClassifier, loss_statistics
from tvkeras.inputs import as_float

Tensor = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound for each image, and what it takes for it to be true.

    Attributes:
        kind: "estimated" (from a finite sample of gradients: may be wrong anywhere) or
            "probabilistic" (right for an image with a stated probability).
        norm: The norm that `radius` is measured in.
        radius: float64 `(count,)`, pixel units: no image nearer than this is
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


def smoothed_bound(
    classifier: keras.Model | CompiledClassifier,
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
    model = CompiledClassifier.of(classifier)
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
