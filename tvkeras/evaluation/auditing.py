"""Audit: can the robust accuracy that PGD measures be believed?"""

from collections.abc import Sequence

import keras
import numpy as np

from tvkeras import checks
from tvkeras.attacks import ProjectedGradient
from tvkeras.attacks.apgd import CLASSES
from tvkeras.evaluation import masking, sanity
from tvkeras.evaluation.card import AuditReport
from tvkeras.evaluation.case import ORDERS, Case
from tvkeras.inference import CompiledClassifier
from tvkeras.inputs import as_float
from tvkeras.progress import Progress

PRECONDITIONS = (
    sanity.images_in_bounds,
    sanity.epsilon_in_pixel_units,
    sanity.finite_logits,
    sanity.enough_classes,
    sanity.not_probabilities,
)
CHECKS = (
    sanity.repeatable,
    sanity.state_unchanged,
    sanity.zero_gradients,
    sanity.gradient_is_the_slope,
    sanity.clean_at_epsilon_zero,
    sanity.within_epsilon,
    sanity.attacked_in_bounds,
    sanity.confirmed,
    sanity.reaches_the_edge,
    sanity.steps_suffice,
    sanity.survives_rounding,
    masking.single_step,
    masking.monotone,
    masking.chance_at_large_epsilon,
    masking.unbounded,
    masking.random_noise,
    masking.rescaled_logits,
    masking.gradient_free,
)


def audit(
    classifier: keras.Model | CompiledClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: str,
    epsilons: Sequence[float | str],
    seed: int = 0,
    steps: int = 20,
    relative_step: float | None = None,
    surrogate: keras.Model | CompiledClassifier | None = None,
    worst_case: np.ndarray | None = None,
    batch_size: int = 250,
    progress: bool = False,
) -> AuditReport:
    """Checks the classifier, PGD's results on it, and looks for signs of gradient masking.

    About 100 images do: decisions are by example, and n images resolve shares of 1 / n.
    The dearer attacks meet the decisive epsilon alone, see `Case.decisive`. Nothing is
    attacked where epsilons or logits are not what attacks need.

    Args:
        classifier: Maps images to logits; in inference mode.
        images: Floats in the classifier's bounds, by default [0, 1], or uint8; shape
            `(count, height, width, channels)`.
        labels: True classes, shape `(count,)`.
        norm: Threat norm, "l2" or "linf".
        epsilons: Radii in pixel units, above 0.
        seed: Of all random numbers.
        steps: Of PGD, the attack whose results are checked; as published, so that logits
            too large for its gradient are found out.
        relative_step: Length of its steps over epsilon, see `ProjectedGradient`.
        surrogate: Another classifier of the same images, such as an undefended twin,
            whose adversarial images are tried on this one.
        worst_case: Smallest perturbation that the attacks of a card found for each image,
            shape `(count,)`, inf where none: `margin_loss` then counts what they all miss.
        batch_size: Images in a batch, at most.
        progress: Whether to say how many checks are done, and how long the rest takes.

    Raises:
        ValueError: For an illegal argument, images or labels that are none of the
            classifier's, or a classifier that ends in a softmax.

    Reference: Athalye et al. (2018), arXiv:1802.00420; Carlini et al. (2019),
    arXiv:1902.06705.
    """
    model = CompiledClassifier.of(classifier)
    radii = sorted({checks.epsilon(epsilon) for epsilon in checks.sequence("epsilons", epsilons)})
    if not radii or radii[0] <= 0:
        raise ValueError(f"epsilons must be radii above 0, at least one, got {epsilons!r}.")
    checks.one_of("norm", norm, ORDERS)
    images = model.images(images)
    distances = np.full(len(images), np.inf) if worst_case is None else np.asarray(worst_case)
    if distances.shape != (len(images),):
        raise ValueError(
            f"worst_case must hold a distance for each of {len(images)} images, got shape "
            f"{distances.shape}."
        )
    case = Case(
        model=model.unit,
        images=as_float(images, model.bounds),
        labels=model.labels(labels, images),
        attack=ProjectedGradient(norm=norm, steps=steps, relative_step=relative_step, temper=False),
        epsilons=tuple(radii),
        worst_case=distances,
        seed=seed,
        batch_size=batch_size,
    )
    found = [check(case) for check in PRECONDITIONS]
    if all(check.status != "fail" for check in found):
        said = Progress(f"audit {norm}", len(CHECKS), "checks", shown=progress)
        for number, check in enumerate(CHECKS):
            found.append(check(case))
            said.update(number + 1)
        if case.logits.shape[1] >= CLASSES["dlr"]:
            found.append(masking.margin_loss(case))
        if surrogate is not None:
            found.append(masking.transfer(case, surrogate))
    failed = any(check.status == "fail" for check in found)
    return AuditReport(
        norm=norm,
        verdict="unreliable" if failed else "reliable",
        images=len(case.labels),
        surrogate=None if surrogate is None else CompiledClassifier.of(surrogate).classifier.name,
        checks=tuple(found),
        beyond="PGD" if worst_case is None else "worst case",
    )
