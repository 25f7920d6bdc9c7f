"""Square attack: random search over squares, by forward passes alone."""

import dataclasses
import math
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tvkeras import norms
from tvkeras.attacks.base import Attack
from tvkeras.attacks.parts import Standing, by_example, example_margins, misclassified, select
from tvkeras.inference import Logits, Randomness, Tensor

_FRACTION = 0.8  # of the image, which the first squares cover
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack, at a fixed epsilon: no gradients, so no gradient can mislead it.

    It keeps the point of smallest margin (logit of the label less the largest other).
    For linf it starts from vertical stripes of ±epsilon and proposes to set a random
    square of each channel to ±epsilon; for l2 it starts from a grid of small humps and
    proposes to move the squared perturbation of one square into another. The squares
    cover 80 % of the image at first and half of that after 10, 50, 200, 500, 1000,
    2000, 4000, 6000 and 8000 proposals, whatever `queries` is. An example stops at its
    first success.

    Attributes:
        norm: Norm of the perturbation: "l2" or "linf".
        queries: Proposals for each example, at most; the image and the start make two
            more model calls.

    Reference: Andriushchenko et al. (2020), arXiv:1912.00049.
    """

    queries: int = 5000

    fixed_epsilon: ClassVar[bool] = True
    legal_norms: ClassVar[tuple[str, ...]] = ("l2", "linf")

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """Proposes squares until every example has failed or `queries` are made."""
        start, propose = (
            (_humps, _propose_hump) if self.norm == "l2" else (_stripes, _propose_square)
        )

        def unfinished(step: Tensor, x: Tensor, margin: Tensor, state: Standing) -> Tensor:
            return ops.logical_and(step < self.queries, ops.any(state.standing))

        def search(step: Tensor, x: Tensor, margin: Tensor, state: Standing) -> tuple[Any, ...]:
            with random.at(step + 1) as seed:
                proposal = propose(images, x, epsilon, step, seed)
            outputs = logits(proposal)
            better = example_margins(outputs, labels) < margin
            x = select(better, proposal, x)
            margin = ops.where(better, example_margins(outputs, labels), margin)
            return step + 1, x, margin, state.after(proposal, misclassified(outputs, labels))

        with random.at(0) as seed:
            x = start(images, epsilon, seed)
        outputs = logits(x)
        state = Standing.before(logits(images), images, labels)
        state = state.after(x, misclassified(outputs, labels))
        begun = (ops.zeros((), "int32"), x, example_margins(outputs, labels), state)
        _, x, _, state = ops.while_loop(unfinished, search, begun)
        return select(state.standing, x, state.x_adv), state.queries


def _stripes(images: Tensor, epsilon: Tensor, seed: keras.random.SeedGenerator) -> Tensor:
    """Vertical stripes of +-epsilon, drawn for each column and channel."""
    count, _, width, channels = ops.shape(images)
    stripes = _signs((count, 1, width, channels), images, seed)
    return ops.clip(images + epsilon * stripes, 0.0, 1.0)


def _propose_square(
    images: Tensor, x: Tensor, epsilon: Tensor, step: Tensor, seed: keras.random.SeedGenerator
) -> Tensor:
    """Sets each channel of a random square to +-epsilon."""
    window = _window(images, _at(step, _sides(images, smallest=1)), seed)[0]
    count, channels = ops.shape(images)[0], images.shape[3]
    change = 2 * epsilon * _signs((count, 1, 1, channels), images, seed)
    perturbation = ops.clip(x + window * change - images, -epsilon, epsilon)
    return ops.clip(images + perturbation, 0.0, 1.0)


def _humps(images: Tensor, epsilon: Tensor, seed: keras.random.SeedGenerator) -> Tensor:
    """A grid of about five by five pairs of humps, each with its own sign."""
    count, (height, width, channels) = ops.shape(images)[0], images.shape[1:]
    side = max(height // 5, 1)
    margin = max((height - 5 * side) // 2, 0)
    (rows, row), (columns, column) = (
        np.divmod(np.arange(length) - margin, side) for length in (height, width)
    )
    inside = ((rows >= 0)[:, None] & (columns >= 0))[:, :, None]
    rows, columns = np.maximum(rows, 0), np.maximum(columns, 0)
    hump, turned = (
        ops.convert_to_tensor(inside * tile[row[:, None], column, None], dtype=images.dtype)
        for tile in (_hump(side), _hump(side).T)
    )
    grid = (count, int(rows[-1]) + 1, int(columns[-1]) + 1)
    signs = _signs((*grid, channels), images, seed)
    turn = _signs((*grid, 1), images, seed)
    signs, turn = (
        ops.take(ops.take(part, rows, axis=1), columns, axis=2) for part in (signs, turn)
    )
    delta = signs * ops.where(turn > 0, turned, hump)
    return _scaled(images, delta, epsilon)


def _propose_hump(
    images: Tensor, x: Tensor, epsilon: Tensor, step: Tensor, seed: keras.random.SeedGenerator
) -> Tensor:
    """Empties a random square and adds humps to another, with the budget of both."""
    sides = _sides(images, smallest=3)
    side = _at(step, sides)
    count, channels = ops.shape(images)[0], images.shape[3]
    target, row, column = _window(images, side, seed)
    source = _window(images, side, seed)[0]
    turn = ops.reshape(_signs((count, 1), images, seed), (-1, 1, 1)) > 0
    index = ops.where(turn, column * max(sides) + row, row * max(sides) + column)
    humps = ops.reshape(_at(step, _padded_humps(sides)), (-1,))
    hump = target * ops.take(humps, index)[..., None]
    hump = hump * _signs((count, 1, 1, channels), images, seed)

    delta = x - images
    unused = ops.maximum(epsilon**2 - ops.sum(ops.square(delta), axis=(1, 2, 3)), 0.0)
    budget = _channel_lengths(delta * ops.maximum(target, source))
    budget = ops.sqrt(by_example(unused) / channels + ops.square(budget))
    added = hump + target * delta / (1e-12 + _channel_lengths(target * delta))
    added = added * budget / (1e-12 + _channel_lengths(added))
    return _scaled(images, ops.where(target > 0, added, delta * (1 - source)), epsilon)


def _scaled(images: Tensor, delta: Tensor, epsilon: Tensor) -> Tensor:
    """The image plus `delta` at l2 length epsilon, clipped to [0, 1]."""
    return ops.clip(images + epsilon * norms.steepest_direction(delta, "l2"), 0.0, 1.0)


def _channel_lengths(delta: Tensor) -> Tensor:
    """l2 length of each example's channels, shape `(batch, 1, 1, channels)`."""
    return ops.sqrt(ops.sum(ops.square(delta), axis=(1, 2), keepdims=True))


def _signs(shape: Any, like: Tensor, seed: keras.random.SeedGenerator) -> Tensor:
    """Independent draws of -1 and 1."""
    draw = keras.random.uniform(shape, -1.0, 1.0, dtype=like.dtype, seed=seed)
    return ops.where(draw < 0, -1.0, 1.0)


def _sides(images: Tensor, smallest: int) -> list[int]:
    """Side of the squares at each stage; odd where `smallest` is 3, as humps want it."""
    height, width = images.shape[1:3]
    sides = []
    for halvings in range(len(_HALVED_AFTER) + 1):
        side = max(round(math.sqrt(_FRACTION / 2**halvings * height * width)), smallest)
        sides.append(min(side + (smallest == 3 and side % 2 == 0), height, width))
    return sides


def _at(step: Tensor, by_stage: Any) -> Tensor:
    """The row of a table for the stage that `step` belongs to."""
    stage = ops.sum(ops.cast(step > ops.convert_to_tensor(_HALVED_AFTER), "int32"))
    return ops.take(ops.convert_to_tensor(by_stage), stage, axis=0)


def _window(
    images: Tensor, side: Tensor, seed: keras.random.SeedGenerator
) -> tuple[Tensor, Tensor, Tensor]:
    """A random square of each image.

    Its place is drawn as in the public code, below height - side: a square smaller
    than the image leaves the last row and column out.

    Returns:
        The mask of shape `(batch, height, width, 1)`, and each pixel's row and column
        within the square, clipped to it, `(batch, height, 1)` and `(batch, 1, width)`.
    """
    parts = []
    for length in images.shape[1:3]:
        draw = keras.random.uniform((ops.shape(images)[0], 1), dtype=images.dtype, seed=seed)
        first = ops.floor(draw * ops.cast(length - side, images.dtype))
        place = ops.arange(length) - ops.cast(first, "int32")
        inside = ops.logical_and(place >= 0, place < side)
        parts.append((ops.cast(inside, images.dtype), ops.clip(place, 0, side - 1)))
    (rows, row), (columns, column) = parts
    mask = rows[:, :, None, None] * columns[:, None, :, None]
    return mask, row[:, :, None], column[:, None, :]


def _padded_humps(sides: list[int]) -> np.ndarray:
    """`_hump` of each side, padded to the largest."""
    table = np.zeros((len(sides), max(sides), max(sides)), "float32")
    for padded, side in zip(table, sides, strict=True):
        padded[:side, :side] = _hump(side)
    return table


def _hump(side: int) -> np.ndarray:
    """A positive hump above a negative one, a square of l2 length 1."""
    upper, lower = _rings(side // 2, side), _rings(side - side // 2, side)
    hump = np.concatenate([upper, -lower])
    return hump / np.linalg.norm(hump)


def _rings(height: int, width: int) -> np.ndarray:
    """A hump of l2 length 1 that falls off with the distance from the middle."""
    tails = np.cumsum(1.0 / np.arange(max(height, width) // 2 + 1, 0, -1) ** 2)[::-1]
    rows, columns = (abs(np.arange(length) - length // 2) for length in (height, width))
    rings = tails[np.maximum(rows[:, None], columns)]
    return rings / (np.linalg.norm(rings) or 1.0)
