"""What is certified of a classifier under noise, beside what attacks leave standing."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np

from tvkeras import checks, inputs
from tvkeras.bounds import Smoothed, SmoothedBound
from tvkeras.evaluation.card import Rate
from tvkeras.evaluation.reports import rate
from tvkeras.evaluation.suite import Bench

POINTS = 200  # of a curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certification:
    """How a card certifies the classifier under noise (`tvkeras.bounds.Smoothed`).

    Attributes:
        sigma: Standard deviation of the noise, in units of [0, 1]; the classifier should be
            trained under such.
        images: How many test images, evenly spaced over all.
        samples: Noisy copies of each that bound its probability.
        alpha: Probability, for each image, that its radius is wrong.

    Raises:
        ValueError: For an illegal argument.
    """

    sigma: float
    images: int = 500
    samples: int = 10_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        """Checks what `Smoothed` does not know."""
        checks.whole_number("images", self.images, minimum=1)

    def certify(self, bench: Bench) -> tuple[SmoothedBound, np.ndarray]:
        """The bound of these images, and their labels."""
        rows = np.arange(0, len(bench.labels), max(1, len(bench.labels) // self.images))
        rows = rows[: self.images]
        folder = bench.how["resume_dir"]
        bound = Smoothed(bench.model, self.sigma, seed=bench.how["seed"]).certify(
            bench.images[rows],
            samples=self.samples,
            alpha=self.alpha,
            progress=bench.how["progress"],
            resume_dir=folder and pathlib.Path(folder) / "certified",
        )
        return bound, bench.labels[rows]


def certified_accuracy(
    bound: SmoothedBound, labels: np.ndarray, radii: Sequence[float | str]
) -> dict[str, Rate]:
    """Share of the images that are classified rightly, with a radius of at least r.

    Args:
        bound: Of the images, by `tvkeras.bounds.Smoothed.certify`.
        labels: Their true classes, shape `(count,)`.
        radii: In units of [0, 1]: numbers or text such as "8/255". At 0: the share that is
            classified rightly, without abstention.

    Returns:
        By radius as text, with the 95 % interval that so few images allow; that each of
        them has its radius with probability `bound.confidence` alone is not in it.

    Raises:
        ValueError: For other labels or radii.
    """
    right = bound.classes == inputs.labels(labels, len(bound.classes), bound.votes.shape[1])
    return {
        str(radius): rate(right & (bound.radius >= checks.epsilon(radius, "radii")))
        for radius in radii
    }


def accuracy_curves(
    bound: SmoothedBound,
    labels: np.ndarray,
    distances: Mapping[str, np.ndarray],
    path: pathlib.Path,
) -> None:
    """Draws accuracy against l2 radius: what is certified, and what attacks leave standing.

    The certificate is the smoothed classifier's. Attacks on the classifier inside it are an
    upper limit for that one alone; on what the smoothed one is worth they say nothing.

    Args:
        bound: Of some images, by `tvkeras.bounds.Smoothed.certify`.
        labels: Their true classes, shape `(count,)`.
        distances: Smallest l2 perturbations that attacks found, shape `(count,)`, of these
            or other images, by the name to show; 0 where misclassified, inf where none.
        path: The PNG to write.

    Raises:
        ValueError: For other labels.
    """
    found = np.concatenate([bound.radius, *(d[np.isfinite(d)] for d in distances.values())])
    edge = 1.1 * np.quantile(found, 0.99) or 1.0
    radii = np.linspace(0, edge, POINTS)
    rates = list(certified_accuracy(bound, labels, radii.tolist()).values())
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    sure = f"certified at {100 * bound.confidence:g} %"
    name = f"{sure}, under noise of {bound.sigma:g} ({len(bound.radius)} images)"
    axes.plot(radii, [100 * r.value for r in rates], label=name)
    axes.fill_between(radii, [100 * r.low for r in rates], [100 * r.high for r in rates], alpha=0.2)
    for name, values in distances.items():
        standing = [100 * np.mean(values > radius) for radius in radii]
        axes.plot(radii, standing, linestyle="--", label=f"{name} ({len(values)} images)")
    axes.set(xlim=(0, edge), ylim=(0, 100), xlabel="perturbation size (l2)")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
