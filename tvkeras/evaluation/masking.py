"""Signs of gradient masking: PGD fails although adversarial images are there."""

import dataclasses
import itertools
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops
from scipy import stats

from tvkeras import norms
from tvkeras.attacks import Attack, AutoPGD, FastMinimumNorm, Square
from tvkeras.attacks.parts import misclassified, select
from tvkeras.evaluation.case import ORDERS, Case, Check, graded
from tvkeras.inference import CompiledClassifier, Logits, Randomness

Tensor = Any

SQUARE_QUERIES = 300  # cheap: a masked gradient loses to far fewer

# Tolerances: shares of all images.
MISSED = 0.02  # a sound attack may lose single images, next to the boundary; on digits up to 1.7 %
DISAGREEMENT = 0.1  # on small undefended networks Auto-PGD with DLR found up to 7 % more


def single_step(case: Case) -> Check:
    """Share of images that FGSM fools and PGD does not, at the worst epsilon."""
    fgsm = dataclasses.replace(case.attack, steps=1, relative_step=None)
    figure = max((case.fooled(fgsm, e) & ~r.success).mean() for e, r in case.results.items())
    advice = "One step beats many: the gradient misleads beyond the image's neighbourhood."
    return _missed(case, "single_step", figure, advice)


def monotone(case: Case) -> Check:
    """Share of images that fall at an epsilon and stand at the next larger one, at most."""
    fooled = [result.success for result in case.results.values()]
    figure = max(((a & ~b).mean() for a, b in itertools.pairwise(fooled)), default=0)
    advice = "A larger ball holds the smaller one's successes: PGD loses its way in it."
    return graded("monotone", figure, 0, case.few(MISSED), advice)


def chance_at_large_epsilon(case: Case) -> Check:
    """Robust accuracy where every ball holds the grey image.

    No classifier is right there more often than by naming the most frequent class.
    """
    grey = np.linalg.norm(np.full(case.images[0].size, 0.5), ORDERS[case.attack.norm])
    standing = 1 - case.fooled(case.attack, float(grey)).mean()
    guess = np.unique(case.labels, return_counts=True)[1].max() / len(case.labels)
    advice = "All images may turn grey, and yet classes are told apart: PGD does not get there."
    return graded("chance_at_large_epsilon", standing, 0, guess, advice)


def unbounded(case: Case) -> Check:
    """Share of images that a minimum-norm attack, FMN, cannot fool at any distance."""
    standing = ~case.fooled(FastMinimumNorm(norm=case.attack.norm), None)
    advice = "Without a bound every image can be fooled: the gradient leads nowhere."
    return _missed(case, "unbounded", standing.mean(), advice)


def random_noise(case: Case) -> Check:
    """Share of images that noise fools at the decisive epsilon, and PGD does not."""
    figure = case.only_by_other(case.fooled(_Noise(norm=case.attack.norm), case.decisive))
    advice = "Chance finds what PGD misses: its gradients carry no information there."
    return _missed(case, "random_noise", figure, advice)


def rescaled_logits(case: Case) -> Check:
    """Share of images that PGD fools only once the logits are rescaled.

    They are divided by their median margin (largest logit less the second), which
    changes no prediction but where cross-entropy saturates in float32.
    """
    classifier = case.model.classifier
    margins = np.diff(np.sort(case.logits, axis=1)[:, -2:], axis=1)
    scale = keras.layers.Rescaling(1 / max(float(np.median(margins)), 1e-30), dtype="float32")
    rescaled = keras.Model(classifier.inputs, scale(classifier.outputs[0]))
    model = CompiledClassifier(rescaled, case.model.own_bounds).unit
    result = case.run(case.attack, case.decisive, model)
    advice = "The logits' scale hides the gradient: attack rescaled logits, or the margin."
    return _missed(case, "rescaled_logits", case.only_by_other(result.success), advice)


def gradient_free(case: Case) -> Check:
    """Share of images that Square fools at the decisive epsilon, and PGD does not."""
    square = Square(norm=case.attack.norm, queries=SQUARE_QUERIES)
    figure = case.only_by_other(case.fooled(square, case.decisive))
    advice = "An attack without gradients finds what PGD misses: quote the worst of both."
    return _missed(case, "gradient_free", figure, advice)


def margin_loss(case: Case) -> Check:
    """Share of images that Auto-PGD with DLR fools at the decisive epsilon, and PGD not."""
    dlr = AutoPGD(norm=case.attack.norm, loss="dlr", steps=2 * case.attack.steps)
    figure = case.only_by_other(case.fooled(dlr, case.decisive))
    advice = "A margin finds what cross-entropy misses: quote the worst of both."
    few = case.few(MISSED)
    return graded("margin_loss", figure, few, max(few, DISAGREEMENT), advice)


def transfer(case: Case, surrogate: keras.Model | CompiledClassifier) -> Check:
    """Share of images that PGD fools only by way of the surrogate, at the decisive epsilon."""
    x_adv = case.run(case.attack, case.decisive, CompiledClassifier.of(surrogate).unit).x_adv
    advice = "Another model's gradients serve better than its own: they are masked."
    return _missed(case, "transfer", case.only_by_other(case.wrong(x_adv)), advice)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Noise(Attack):
    """Uniform draws from the ball: the last that the classifier gets wrong.

    Attributes:
        norm: Norm of the ball.
        draws: How many, for each image.
    """

    draws: int = 50

    fixed_epsilon: ClassVar[bool] = True

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """Makes all draws."""

        def draw(number: Tensor, x_adv: Tensor) -> Tensor:
            with random.at(number) as seed:
                noise = norms.random_in_ball(images, self.norm, epsilon, seed)
            noisy = ops.clip(images + noise, 0.0, 1.0)
            return select(misclassified(logits(noisy), labels), noisy, x_adv)

        x_adv = ops.fori_loop(0, self.draws, draw, images)
        return x_adv, ops.full_like(labels, self.draws)


def _missed(case: Case, name: str, figure: float, advice: str) -> Check:
    """Warns of one image; fails beyond what 99 of 100 draws give if `MISSED` is the truth."""
    count = len(case.labels)
    return graded(name, figure, 0, stats.binom.ppf(0.99, count, MISSED) / count, advice)
