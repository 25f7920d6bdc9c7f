"""Geometry of the threat models: norms, duals, steepest directions, balls.

All functions act per example on tensors of shape `(batch, ...)` and are written
once, in `keras.ops`. `norm` is always the threat model's norm, the one that
measures perturbations; gradients are measured in its dual.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tvkeras import checks

Tensor = Any

DUALS = {"l1": "linf", "l2": "l2", "linf": "l1"}


def dual(norm: str) -> str:
    """Name of the norm dual to `norm`: linf and l1 are each other's, l2 its own."""
    return DUALS[checks.one_of("norm", norm, DUALS)]


def length(x: Tensor, norm: str) -> Tensor:
    """Norm of each example, exact also where squares would under- or overflow.

    Its derivative at x = 0 is 0, so that it can be differentiated anywhere.

    Args:
        x: Shape `(batch, ...)`.
        norm: One of "l1", "l2", "linf".

    Returns:
        Shape `(batch,)`; not finite where `x` is not.
    """
    checks.one_of("norm", norm, DUALS)
    x = _flat(x)
    magnitude = x * ops.stop_gradient(ops.sign(x))  # the derivative of ops.abs at 0 is 1 in JAX
    if norm == "l1":
        return ops.sum(magnitude, axis=1)
    if norm == "linf":
        return ops.max(magnitude, axis=1)
    unit, largest, usable = _scaled(x)
    root = ops.sqrt(ops.where(usable, ops.sum(ops.square(unit), axis=1), 1.0))
    return ops.where(usable, largest * root, ops.sum(magnitude, axis=1))


def dual_length(g: Tensor, norm: str) -> Tensor:
    """||g||_*, the size of gradients under the threat model `norm`: shape `(batch,)`."""
    return length(g, dual(norm))


def steepest_direction(g: Tensor, norm: str) -> Tensor:
    """Unit direction that increases a linear function fastest.

    Returns d, shape of `g`, with ||d||_norm = 1 and <g, d> = ||g||_* per example:
    g / ||g||_2 for l2, sign(g) for linf, the signed largest coordinate for l1.
    Where g = 0 or g is not finite, d = 0: never NaN. No gradient flows through d.

    Reference: Finlay & Oberman (2019), arXiv:1905.11468.
    """
    checks.one_of("norm", norm, DUALS)
    g = ops.stop_gradient(g)
    unit, _, usable = _scaled(_flat(g))
    if norm == "l2":
        square = ops.where(usable, ops.sum(ops.square(unit), axis=1), 1.0)
        d = unit / ops.sqrt(square)[:, None]
    elif norm == "linf":
        d = ops.sign(unit)
    else:
        peak = ops.one_hot(ops.argmax(ops.abs(unit), axis=1), unit.shape[1], dtype=unit.dtype)
        d = ops.sign(unit) * peak
    return _shaped(d, g)


def project(perturbation: Tensor, norm: str, epsilon: Any) -> Tensor:
    """Nearest point (in l2) of the `norm` ball of radius `epsilon`, same shape.

    `epsilon` is a number, or a tensor of shape `(batch,)`: a radius for each example.

    Reference for l1: Duchi et al. (2008), Efficient projections onto the l1-ball.
    """
    checks.one_of("norm", norm, DUALS)
    flat = _flat(perturbation)
    radius = ops.reshape(ops.cast(epsilon, flat.dtype), (-1, 1))
    if norm == "linf":
        inside = ops.clip(flat, -radius, radius)
    elif norm == "l2":
        size = length(perturbation, norm)[:, None]
        inside = flat * ops.minimum(1.0, radius / ops.maximum(size, 1e-30))
    else:
        magnitude = ops.abs(flat)
        descending = -ops.sort(-magnitude, axis=1)
        count = ops.cast(ops.arange(1, flat.shape[1] + 1), flat.dtype)
        threshold = (ops.cumsum(descending, axis=1) - radius) / count
        support = ops.sum(ops.cast(descending > threshold, "int32"), axis=1, keepdims=True)
        cut = ops.take_along_axis(threshold, ops.maximum(support - 1, 0), axis=1)
        kept = ops.maximum(magnitude - cut, 0.0)
        size = ops.sum(kept, axis=1, keepdims=True)  # cumsum errs by 1e-3 on large images
        shrunk = ops.sign(flat) * kept * ops.minimum(1.0, radius / ops.maximum(size, 1e-30))
        inside = ops.where(length(perturbation, norm)[:, None] <= radius, flat, shrunk)
    return _shaped(inside, perturbation)


def random_in_ball(
    like: Tensor, norm: str, epsilon: float, seed: keras.random.SeedGenerator
) -> Tensor:
    """Uniform draw from the `norm` ball of radius `epsilon`, shape and dtype of `like`."""
    checks.one_of("norm", norm, DUALS)
    shape, dtype = ops.shape(like), like.dtype
    if norm == "linf":
        return keras.random.uniform(shape, -epsilon, epsilon, dtype=dtype, seed=seed)
    radius = keras.random.uniform((shape[0],), dtype=dtype, seed=seed)
    if norm == "l2":
        sample = _flat(keras.random.normal(shape, dtype=dtype, seed=seed))
    else:  # Laplace coordinates, whose l1-normalised vector is uniform on the sphere
        uniform = _flat(keras.random.uniform(shape, -1.0, 1.0, dtype=dtype, seed=seed))
        sample = -ops.sign(uniform) * ops.log1p(-ops.abs(uniform) * 0.9999999)
    radius = epsilon * ops.power(radius, 1.0 / sample.shape[1]) / length(sample, norm)
    return _shaped(sample * radius[:, None], like)


def projected_ascent(
    gradient: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    norm: str,
    epsilon: float,
    steps: int,
    step_size: float,
    start: Tensor,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """Maximises a function over the ball around `images` by steepest ascent (PGD).

    Args:
        gradient: Maps images to the per-example gradient of what is maximised.
        images: Centre of the ball, shape `(batch, height, width, channels)`.
        norm: Norm of the ball.
        epsilon: Radius of the ball, in pixel units; a number or a scalar tensor.
        steps: Number of gradient evaluations.
        step_size: Length of a step in `norm`, in pixel units.
        start: Perturbation to start from, inside the ball.
        bounds: Interval of legal pixel values, or None for no clipping.

    Returns:
        x_adv, shape of `images`, with ||x_adv - images||_norm <= epsilon.

    Reference: Madry et al. (2018), arXiv:1706.06083.
    """

    def clip(x: Tensor) -> Tensor:
        return x if bounds is None else ops.clip(x, *bounds)

    def step(_: Tensor, x_adv: Tensor) -> Tensor:
        x_adv = x_adv + step_size * steepest_direction(gradient(x_adv), norm)
        return clip(images + project(x_adv - images, norm, epsilon))

    return ops.fori_loop(0, steps, step, clip(images + start))


def _flat(x: Tensor) -> Tensor:
    return ops.reshape(x, (-1, math.prod(x.shape[1:])))


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    return ops.reshape(flat, (-1, *like.shape[1:]))


def _scaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat `x` over its largest entry (0 where useless), that entry, and the mask."""
    largest = ops.stop_gradient(ops.max(ops.abs(x), axis=1))
    usable = ops.logical_and(ops.all(ops.isfinite(x), axis=1), largest > 0)
    scale = ops.where(usable, largest, 1.0)[:, None]
    return ops.where(usable[:, None], x / scale, 0.0), largest, usable
