"""Figures of measurements."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib.figure

from tvkeras import checks


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
