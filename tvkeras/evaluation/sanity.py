"""Checks of a classifier before an attack, and of what PGD then reports."""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from tvkeras.attacks.apgd import CLASSES
from tvkeras.attacks.parts import class_logits
from tvkeras.evaluation.card import Check
from tvkeras.evaluation.case import ORDERS, Case, check, few
from tvkeras.inference import Logits, example_losses, input_gradient

Tensor = Any

FD_STEP = 1e-2  # l2 length
DIRECTIONS = 4

# Tolerances. Shares are of all images.
ROUNDING = 1e-3  # relative; float32 sums over an image err by less
UNSTABLE = 1e-5  # relative difference of two passes: accelerators may reorder sums
ZERO_GRADIENTS = 0.05  # PGD's robust accuracy may be too high by as much
DIFFERENCES = 0.1, 0.5  # ReLUs that switch within FD_STEP cost percents, a wrong gradient all
POINT = 0.01  # the usual demand on an attack that has converged
UNCONVERGED = 0.05  # more than the single images at the boundary that a longer ascent finds
LOST_BY_ROUNDING = 0.1  # of the successes; never a failure: the attack is not at fault


# ---- The model, before any attack --------------------------------------------------------


@check(0, 0, "Divide 0-255 images by 255.")
def images_in_bounds(case: Case) -> float:
    """Share of pixels outside [0, 1], or not finite."""
    return _outside(case.images)


@check(
    0.5, 1 + ROUNDING, "An epsilon that spans all images is no threat model: write 8/255, not 8."
)
def epsilon_in_pixel_units(case: Case) -> float:
    """The largest epsilon over the length of an image of ones, the farthest of all."""
    length = np.linalg.norm(np.ones(case.images[0].size), ORDERS[case.attack.norm])
    return case.epsilons[-1] / float(length)


@check(
    0, UNSTABLE, "Two passes must agree: remove randomness from inference, or attack its average."
)
def repeatable(case: Case) -> float:
    """Largest difference of the logits of two passes, over the largest logit."""
    first, again = case.logits, case.predict(case.images)
    with np.errstate(invalid="ignore"):  # no number from infinite logits, which fails
        return abs(again - first).max() / max(abs(first).max(), 1e-30)


@check(0, 0, "A layer is in training mode during inference: pass its training argument on.")
def state_unchanged(case: Case) -> float:
    """How many non-trainable variables a pass changes."""
    variables = case.model.classifier.non_trainable_variables
    before = [ops.convert_to_numpy(variable.value) for variable in variables]
    case.predict(case.images)
    after = [ops.convert_to_numpy(variable.value) for variable in variables]
    return sum(not np.array_equal(old, new) for old, new in zip(before, after, strict=True))


@check(0, 0, "Find the layer that overflows.")
def finite_logits(case: Case) -> float:
    """Share of logits that are not finite."""
    return 1 - np.isfinite(case.logits).mean()


@check(0, 0.5, "Drop the final softmax: attacks on logits apply it, and twice flattens the loss.")
def not_probabilities(case: Case) -> float:
    """Share of rows that are non-negative and sum to 1."""
    sums = abs(case.logits.sum(axis=1) - 1) <= ROUNDING
    return ((case.logits >= 0).all(axis=1) & sums).mean()


def enough_classes(case: Case) -> Check:
    """Number of logits: 2 for any loss, 3 for DLR, 4 for targeted DLR."""
    count = case.logits.shape[1]
    status = "pass" if count >= CLASSES["targeted_dlr"] else "warn"
    if count < CLASSES["ce"] or not (case.labels >= 0).all() or case.labels.max() >= count:
        status = "fail"
    advice = "Labels must number the logits; DLR losses, with their checks, need 3 or 4 of them."
    return Check("enough_classes", status, float(count), advice)


@check(0, few(ZERO_GRADIENTS), "Gradients cannot move these images: attack the margin.")
def zero_gradients(case: Case) -> float:
    """Share of images where the cross-entropy's gradient is exactly zero."""

    def moving(logits: Logits, images: Tensor, labels: Tensor) -> tuple[Tensor]:
        gradient = input_gradient(logits, images, lambda o: example_losses(o, labels))[2]
        return (ops.any(ops.not_equal(gradient, 0), axis=(1, 2, 3)),)

    (moved,) = case.by_batch("zero_gradients", moving, case.images, case.labels)
    return (~moved).mean()


@check(*DIFFERENCES, "The gradient is not the function's: look for rounding or a custom gradient.")
def gradient_is_the_slope(case: Case) -> float:
    """Relative error of the margin's gradient against central differences.

    ||<g_i, v> - (m_i(x + h v) - m_i(x - h v)) / 2 h|| over the larger side's length, in
    the l2 norm over images i and random unit directions v; 0 if both sides vanish. The
    margin m is that of the label and the class nearest to it, held fixed; its gradient,
    unlike the cross-entropy's, does not fade as an example is classified well.
    """
    rivals = np.where(np.arange(case.logits.shape[1]) == case.labels[:, None], -np.inf, 0)
    rivals = (case.logits + rivals).argmax(axis=1)

    def slopes(
        logits: Logits, images: Tensor, labels: Tensor, rivals: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        def margin(outputs: Tensor) -> Tensor:
            return class_logits(outputs, labels) - class_logits(outputs, rivals)

        gradient = input_gradient(logits, images, margin)[2]
        rise = margin(logits(images + FD_STEP * v)) - margin(logits(images - FD_STEP * v))
        return ops.sum(gradient * v, axis=(1, 2, 3)), rise / (2 * FD_STEP)

    inside = np.clip(case.images, FD_STEP, 1 - FD_STEP)  # so that x +- h v lies in [0, 1]
    random = np.random.default_rng(case.seed)
    pairs = []
    for _ in range(DIRECTIONS):
        v = random.standard_normal(inside.shape, "float32")
        v /= np.sqrt(np.square(v).sum(axis=(1, 2, 3), keepdims=True))
        pairs.append(case.by_batch("slopes", slopes, inside, case.labels, rivals, v))
    analytic, quotient = np.concatenate(pairs, axis=1)
    error, *sides = (float(np.linalg.norm(v)) for v in (analytic - quotient, analytic, quotient))
    return error / max(*sides, 1e-30)


# ---- PGD and what it reports -------------------------------------------------------------


@check(0, 0, "At epsilon 0 the robust accuracy must be the clean one: the attack is at fault.")
def clean_at_epsilon_zero(case: Case) -> float:
    """Share of images where PGD at epsilon = 0 says other than the classifier alone."""
    return (case.fooled(case.attack, 0.0) != case.wrong_before).mean()


@check(1 + ROUNDING, 1 + ROUNDING, "A perturbation leaves the ball: the projection is at fault.")
def within_epsilon(case: Case) -> float:
    """Largest measured norm of a perturbation over its epsilon."""
    order = ORDERS[case.attack.norm]
    sizes = [
        np.linalg.norm((result.x_adv - case.images).reshape(len(case.images), -1), order, axis=1)
        / epsilon
        for epsilon, result in case.results.items()
    ]
    return np.max(sizes)


@check(0, 0, "Adversarial images must be clipped.")
def attacked_in_bounds(case: Case) -> float:
    """Share of adversarial pixels outside [0, 1], at the worst epsilon."""
    return max(_outside(result.x_adv) for result in case.results.values())


@check(0, few(POINT), "Count only what the classifier itself misclassifies.")
def confirmed(case: Case) -> float:
    """Share of results that the classifier, asked again, contradicts, at the worst epsilon."""
    return max((case.wrong(r.x_adv) != r.success).mean() for r in case.results.values())


def reaches_the_edge(case: Case) -> Check:
    """Steps times step size over epsilon."""
    reach = case.attack.steps * (case.attack.relative_step or min(1, 2.5 / case.attack.steps))
    status = "pass" if reach >= 1 - ROUNDING else "fail"
    advice = "Below 1 the attack cannot leave the inside of its ball: take more or longer steps."
    return Check("reaches_the_edge", status, float(reach), advice)


@check(few(POINT), few(UNCONVERGED), "The attack has not converged: take more steps.")
def steps_suffice(case: Case) -> float:
    """Change of robust accuracy when PGD takes twice the steps, at the decisive epsilon."""
    longer = dataclasses.replace(case.attack, steps=2 * case.attack.steps)
    fooled = case.fooled(longer, case.decisive).mean()
    return abs(fooled - case.results[case.decisive].success.mean())


@check(LOST_BY_ROUNDING, 1, "Save adversarial images as floats: 8 bits undo these perturbations.")
def survives_rounding(case: Case) -> float:
    """Share of successes that 8-bit images lose, at the worst epsilon."""
    lost = []
    for result in case.results.values():
        fooled = result.success & ~case.wrong_before
        stand = ~case.wrong((np.rint(result.x_adv * 255) / 255).astype("float32"))
        lost.append((fooled & stand).sum() / max(fooled.sum(), 1))
    return max(lost)


def _outside(images: np.ndarray) -> float:
    return 1 - float(((images >= 0) & (images <= 1)).mean())
