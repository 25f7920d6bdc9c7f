"""Figures of measurements."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from tvkeras import checks
from tvkeras.bounds import SmoothedBound
from tvkeras.detection import ROC
from tvkeras.evaluation import suite
from tvkeras.evaluation.card import Card, Rate
from tvkeras.evaluation.certified import accuracy_curves
from tvkeras.evaluation.detecting import Detected
from tvkeras.evaluation.suite import Bench, Outcome
from tvkeras.inputs import as_float

SHOWN_EXAMPLES = 6


def of_card(
    outcomes: Sequence[Outcome],
    bench: Bench,
    detected: Sequence[Detected],
    others: Mapping[str, Mapping[str, np.ndarray]],
    certified: tuple[SmoothedBound, np.ndarray] | None = None,
) -> dict[str, tuple[str, Callable[[pathlib.Path], None]]]:
    """The figures of a card, by file name: the caption, and what draws it into a file.

    Args:
        outcomes: What the attacks found.
        bench: The attacked images.
        detected: What detectors noticed.
        others: Worst-case distances of models to draw beside this one, by name and norm.
        certified: What is proved of it under noise, and these images' labels.
    """
    lines = {
        norm: {
            "this model": suite.worst_case(outcomes, norm),
            **{name: distances[norm] for name, distances in others.items() if norm in distances},
        }
        for norm in sorted({outcome.trial.attack.norm for outcome in outcomes})
    }
    drawn: dict[str, tuple[str, Callable[[pathlib.Path], None]]] = {}

    def add(file: str, caption: str, draw: Callable[..., None], *arguments: Any) -> None:
        drawn[file] = caption, functools.partial(draw, *arguments)

    add(
        "distances.png",
        "Error against perturbation size, worst case over attacks",
        distance_curves,
        lines,
    )
    if certified is not None:
        caption = "Certified accuracy under noise, and accuracy under attack without"
        worst = suite.worst_case(outcomes, "l2")
        attacked = {"attacked, without noise": worst} if len(worst) else {}
        add("certified.png", caption, accuracy_curves, *certified, attacked)
    for found in detected:
        name, threshold = found.report.statistic, found.report.threshold
        caption = f"Gradient norms ({name}), clean and attacked"
        add(f"scores_{name}.png", caption, score_histograms, found.scores, threshold)
        if found.curves:
            add(f"roc_{name}.png", f"ROC of the detector ({name})", roc_curves, found.curves)
    nearest = min(
        (o for o in outcomes if not o.trial.attack.fixed_epsilon),
        key=lambda o: (o.trial.attack.norm != "l2", np.median(o.distance)),
        default=outcomes[-1],
    )
    name, result = nearest.farthest
    moved = np.flatnonzero(result.success & (result.distance > 0))
    if len(moved):
        beside = np.abs(result.distance[moved] - np.median(result.distance[moved]))
        shown = moved[np.argsort(beside, kind="stable")[:SHOWN_EXAMPLES]]
        pair = (as_float(x[shown], bench.model.bounds) for x in (bench.images, result.x_adv))
        titles = [f"{nearest.trial.attack.norm} {result.distance[i]:.2g}" for i in shown]
        add(
            "examples.png",
            f"Adversarial images of median distance, by {name}",
            adversarial_images,
            *pair,
            titles,
        )
    return drawn


def error_curves(cards: Mapping[str, Card], path: pathlib.Path) -> None:
    """Draws error under attack against the radius, a line for each card.

    Args:
        cards: Of one norm, the first of each that is drawn, by the name to show.
        path: The PNG to write.
    """
    with _panels(path, (6.4, 4.0)) as ((axes,),):
        for name, card in cards.items():
            worst = card.worst_case[0]
            radii = [0.0, *(checks.epsilon(radius) for radius in worst.error)]
            errors = [worst.clean_error, *worst.error.values()]
            axes.plot(radii, [100 * error.value for error in errors], marker="o", label=name)
        axes.set(xlabel=f"perturbation size ({worst.norm})", ylabel="error under attack, %")
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
        axes.legend()


def distance_curves(distances: Mapping[str, Mapping[str, np.ndarray]], path: pathlib.Path) -> None:
    """Draws, for each norm, the share of examples broken within each distance.

    Args:
        distances: Smallest perturbations, shape `(count,)`, by norm, then by the
            classifier to show.
        path: The PNG to write.
    """
    count = len(distances)
    with _panels(path, (4.8 * count, 3.6), columns=count, sharey=True) as (panels,):
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


def score_histograms(
    scores: Mapping[str, np.ndarray], threshold: float, path: pathlib.Path
) -> None:
    """Draws the distribution of gradient norms, a row for clean and each attack.

    Args:
        scores: Gradient norms, shape `(count,)`, by the name to show.
        threshold: Of the detector: what lies to its right is rejected.
        path: The PNG to write.
    """
    positive = np.concatenate([*scores.values(), [threshold]])
    positive = positive[positive > 0]
    high = 1.2 * positive.max()
    edges = np.geomspace(max(positive.min(), high * 1e-4), high, 60)
    size = (6.4, 0.9 + 0.45 * len(scores))
    with _panels(path, size, rows=len(scores), sharex=True) as panels:
        for number, ((axes,), (name, values)) in enumerate(
            zip(panels, scores.items(), strict=True)
        ):
            shown = np.maximum(values, edges[0])  # the first bin holds what is smaller, zeros too
            axes.hist(shown, edges.tolist(), color="C0" if number == 0 else "C1")
            axes.axvline(threshold, color="black", linestyle=":")
            axes.set(xscale="log", xlim=(edges[0], edges[-1]), yticks=[])
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            axes.spines[["top", "left", "right"]].set_visible(False)
        panels[-1, 0].set_xlabel("gradient norm; dotted: threshold")


def roc_curves(curves: Mapping[str, ROC], path: pathlib.Path) -> None:
    """Draws what the detector notices of each attack against what it rejects of clean images."""
    with _panels(path, (6.4, 4.0)) as ((axes,),):
        for name, curve in curves.items():
            rates = 100 * curve.false_positive_rate, 100 * curve.true_positive_rate
            axes.plot(*rates, drawstyle="steps-post", label=name)
        axes.set(xlim=(0, 30), ylim=(0, 101), xlabel="clean images rejected, %")
        axes.set_ylabel("adversarial images rejected, %")
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside right upper")


def over_regularisation(
    labels: list[str], errors: Mapping[str, list[Rate]], path: pathlib.Path
) -> None:
    """Draws errors with their intervals run by run, in the order of the runs' weights.

    Args:
        labels: Of the runs: their weights.
        errors: One for each run, by the name to show.
        path: The PNG to write.
    """
    with _panels(path, (7.2, 4.0)) as ((axes,),):
        for number, (name, rates) in enumerate(errors.items()):
            values = 100 * np.array([rate.value for rate in rates])
            ends = 100 * np.array([[rate.low, rate.high] for rate in rates]).T
            places = np.arange(len(rates)) + 0.03 * (number - len(errors) / 2)  # side by side
            axes.errorbar(places, values, abs(ends - values), marker="o", capsize=2, label=name)
        axes.set_xticks(range(len(labels)), labels)
        axes.set(ylim=(0, 100), xlabel="weight of total variation / Lipschitz term")
        axes.set_ylabel("error, %")
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside right upper")


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
    with _panels(path, (1.4 * count, 4.4), rows=3, columns=count) as panels:
        for column, (image, adversarial, title) in enumerate(
            zip(images, x_adv, titles, strict=True)
        ):
            perturbation = adversarial - image
            scale = 0.5 / max(float(np.abs(perturbation).max()), 1e-12)
            shown = (image, adversarial, 0.5 + scale * perturbation)
            for axes, picture in zip(panels[:, column], shown, strict=True):
                axes.imshow(picture.squeeze(), vmin=0, vmax=1, cmap="gray")
                axes.set(xticks=[], yticks=[])
            panels[0, column].set_title(title, fontsize=8)
            panels[2, column].set_xlabel(f"x {scale:.3g}", fontsize=8)
        for axes, name in zip(panels[:, 0], ("clean", "adversarial", "difference"), strict=True):
            axes.set_ylabel(name)


@contextlib.contextmanager
def _panels(
    path: pathlib.Path, size: tuple[float, float], rows: int = 1, columns: int = 1, **shared: Any
) -> Iterator[Any]:
    """Axes, shape `(rows, columns)`, to draw on; what was drawn is written."""
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False, **shared)
    figure.savefig(path, dpi=150)
