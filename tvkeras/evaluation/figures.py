"""Figures of measurements."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from tvkeras import checks
from tvkeras.detection import ROC
from tvkeras.evaluation.card import Rate


def error_curves(reports: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws error against perturbation size, a line for each classifier.

    Args:
        reports: Results of `evaluation.measure`, by the name to show.
        path: The PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, report in reports.items():
        radii = [0.0, *(checks.epsilon(radius) for radius in report["pgd_error"])]
        errors = [report["attacked_images_clean_error"], *report["pgd_error"].values()]
        axes.plot(radii, [100 * error for error in errors], marker="o", label=name)
        norm = report["norm"]
    axes.set(xlabel=f"perturbation size ({norm})", ylabel="error under 20-step PGD, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def distance_curves(distances: Mapping[str, Mapping[str, np.ndarray]], path: pathlib.Path) -> None:
    """Draws, for each norm, the share of examples broken within each distance.

    Args:
        distances: Smallest perturbations, shape `(count,)`, by norm, then by the
            classifier to show.
        path: The PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(4.8 * len(distances), 3.6), layout="constrained")
    panels = figure.subplots(1, len(distances), squeeze=False, sharey=True)[0]
    for axes, (norm, lines) in zip(panels, distances.items(), strict=True):
        found = np.concatenate([d[np.isfinite(d) & (d > 0)] for d in lines.values()])
        edge = 1.1 * np.quantile(found, 0.98) if len(found) else 1.0
        for name, values in lines.items():
            shares = 100 * np.arange(len(values) + 1) / len(values)
            steps = np.concatenate([[0.0], np.sort(values)])
            axes.step(np.minimum(steps, 10 * edge), shares, where="post", label=name)
        axes.set(xlim=(0, edge), ylim=(0, 100), xlabel=f"perturbation size ({norm})")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    panels[0].set_ylabel("error, worst case over attacks, %")
    figure.savefig(path, dpi=150)


def score_histograms(
    scores: Mapping[str, np.ndarray], threshold: float, path: pathlib.Path
) -> None:
    """Draws the distribution of gradient norms, a row for clean and each attack.

    Args:
        scores: Gradient norms, shape `(count,)`, by the name to show.
        threshold: Of the detector: what lies to its right is rejected.
        path: The PNG to write.
    """
    height = 0.9 + 0.45 * len(scores)
    figure = matplotlib.figure.Figure(figsize=(6.4, height), layout="constrained")
    rows = figure.subplots(len(scores), 1, squeeze=False, sharex=True)[:, 0]
    positive = np.concatenate([*scores.values(), [threshold]])
    positive = positive[positive > 0]
    high = 1.2 * positive.max()
    edges = np.geomspace(max(positive.min(), high * 1e-4), high, 60)
    for number, (axes, (name, values)) in enumerate(zip(rows, scores.items(), strict=True)):
        shown = np.maximum(values, edges[0])  # the first bin holds what is smaller, zeros too
        axes.hist(shown, edges.tolist(), color="C0" if number == 0 else "C1")
        axes.axvline(threshold, color="black", linestyle=":")
        axes.set(xscale="log", xlim=(edges[0], edges[-1]), yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.spines[["top", "left", "right"]].set_visible(False)
    rows[-1].set_xlabel("gradient norm; dotted: threshold")
    figure.savefig(path, dpi=150)


def roc_curves(curves: Mapping[str, ROC], path: pathlib.Path) -> None:
    """Draws what the detector notices of each attack against what it rejects of clean images."""
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        rates = 100 * curve.false_positive_rate, 100 * curve.true_positive_rate
        axes.plot(*rates, drawstyle="steps-post", label=name)
    axes.set(xlim=(0, 30), ylim=(0, 101), xlabel="clean images rejected, %")
    axes.set_ylabel("adversarial images rejected, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)


def over_regularisation(
    labels: list[str], errors: Mapping[str, list[Rate]], path: pathlib.Path
) -> None:
    """Draws errors with their intervals run by run, in the order of the runs' weights.

    Args:
        labels: Of the runs: their weights.
        errors: One for each run, by the name to show.
        path: The PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for number, (name, rates) in enumerate(errors.items()):
        values = 100 * np.array([rate.value for rate in rates])
        ends = 100 * np.array([[rate.low, rate.high] for rate in rates]).T
        places = np.arange(len(rates)) + 0.03 * (number - len(errors) / 2)  # intervals side by side
        axes.errorbar(places, values, abs(ends - values), marker="o", capsize=2, label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylim=(0, 100), xlabel="weight of total variation / Lipschitz term", ylabel="error, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)


def adversarial_images(
    images: np.ndarray, x_adv: np.ndarray, titles: list[str], path: pathlib.Path
) -> None:
    """Shows images, adversarial images, and their difference magnified to full range.

    Args:
        images: float in [0, 1], shape `(count, height, width, channels)`.
        x_adv: Shape of `images`.
        titles: Above each pair.
        path: The PNG to write.
    """
    count = len(images)
    figure = matplotlib.figure.Figure(figsize=(1.4 * count, 4.4), layout="constrained")
    panels = figure.subplots(3, count, squeeze=False)
    for column, (image, adversarial, title) in enumerate(zip(images, x_adv, titles, strict=True)):
        perturbation = adversarial - image
        scale = 0.5 / max(float(np.abs(perturbation).max()), 1e-12)
        shown = (image, adversarial, 0.5 + scale * perturbation)
        for row, picture in enumerate(shown):
            panels[row, column].imshow(picture.squeeze(), vmin=0, vmax=1, cmap="gray")
            panels[row, column].set(xticks=[], yticks=[])
        panels[0, column].set_title(title, fontsize=8)
        panels[2, column].set_xlabel(f"x {scale:.3g}", fontsize=8)
    for row, name in enumerate(("clean", "adversarial", "difference")):
        panels[row, 0].set_ylabel(name)
    figure.savefig(path, dpi=150)
