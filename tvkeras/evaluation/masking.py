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
from tvkeras.evaluation.case import ORDERS, Case, check, few
from tvkeras.inference import CompiledClassifier, Logits, Randomness

Tensor = Any

SQUARE_QUERIES = 300  # cheap: a masked gradient loses to far fewer

# Tolerances: shares of all images.
MISSED = 0.02  # a sound attack may lose single images, next to the boundary; on digits up to 1.4 %
DISAGREEMENT = 0.1  # on digits Auto-PGD with DLR finds up to 5.3 % more


def beyond_chance(case: Case) -> float:
    """What 99 of 100 draws stay below if `MISSED` is the truth."""
    count = len(case.labels)
    return float(stats.binom.ppf(0.99, count, MISSED)) / count


def frequent(case: Case) -> float:
    """The share of images that naming the most frequent class gets right."""
    return float(np.unique(case.labels, return_counts=True)[1].max()) / len(case.labels)


@check(0, beyond_chance, "One step beats many: the gradient misleads beyond the neighbourhood.")
def single_step(case: Case) -> float:
    """Share of images that FGSM fools and PGD does not, at the worst epsilon."""
    fgsm = dataclasses.replace(case.attack, steps=1, relative_step=None)
    return max((case.fooled(fgsm, e) & ~r.success).mean() for e, r in case.results.items())


@check(0, few(MISSED), "A larger ball holds the smaller one's successes: PGD loses its way in it.")
def monotone(case: Case) -> float:
    """Share of images that fall at an epsilon and stand at the next larger one, at most."""
    fooled = [result.success for result in case.results.values()]
    return max(((a & ~b).mean() for a, b in itertools.pairwise(fooled)), default=0)


@check(0, frequent, "All images may turn grey, and yet PGD leaves classes that are told apart.")
def chance_at_large_epsilon(case: Case) -> float:
    """Robust accuracy where every ball holds the grey image.

    No classifier is right there more often than by naming the most frequent class.
    """
    grey = np.linalg.norm(np.full(case.images[0].size, 0.5), ORDERS[case.attack.norm])
    return 1 - case.fooled(case.attack, float(grey)).mean()


@check(0, beyond_chance, "Without a bound every image can be fooled: the gradient leads nowhere.")
def unbounded(case: Case) -> float:
    """Share of images that a minimum-norm attack, FMN, cannot fool at any distance."""
    return (~case.fooled(FastMinimumNorm(norm=case.attack.norm), None)).mean()


@check(0, beyond_chance, "Chance finds what PGD misses: its gradients carry no information there.")
def random_noise(case: Case) -> float:
    """Share of images that noise fools at the decisive epsilon, and PGD does not."""
    return case.only_by_other(case.fooled(_Noise(norm=case.attack.norm), case.decisive))


@check(
    0, beyond_chance, "The logits' scale hides the gradient: rescale them, or attack the margin."
)
def rescaled_logits(case: Case) -> float:
    """Share of images that PGD fools only once the logits are rescaled.

    They are divided by their median margin (largest logit less the second), which
    changes no prediction but where cross-entropy saturates in float32.
    """
    classifier = case.model.classifier
    margins = np.diff(np.sort(case.logits, axis=1)[:, -2:], axis=1)
    scale = keras.layers.Rescaling(1 / max(float(np.median(margins)), 1e-30), dtype="float32")
    rescaled = keras.Model(classifier.inputs, scale(classifier.outputs[0]))
    model = CompiledClassifier(rescaled, case.model.own_bounds).unit
    return case.only_by_other(case.run(case.attack, case.decisive, model).success)


@check(0, beyond_chance, "An attack without gradients finds what PGD misses: quote the worst.")
def gradient_free(case: Case) -> float:
    """Share of images that Square fools at the decisive epsilon, and PGD does not."""
    square = Square(norm=case.attack.norm, queries=SQUARE_QUERIES)
    return case.only_by_other(case.fooled(square, case.decisive))


@check(few(MISSED), few(DISAGREEMENT), "A margin finds what cross-entropy misses: quote the worst.")
def margin_loss(case: Case) -> float:
    """Share of images that Auto-PGD with DLR fools at the decisive epsilon, and PGD not.

    Nor any other attack of a card, where the audit knows its worst case. Of weakly
    defended networks PGD alone misses many images, though its gradient is sound.
    """
    dlr = AutoPGD(norm=case.attack.norm, loss="dlr", steps=2 * case.attack.steps)
    return case.only_by_other(case.fooled(dlr, case.decisive) & ~case.quoted)


@check(0, beyond_chance, "Another model's gradients serve better than its own: they are masked.")
def transfer(case: Case, surrogate: keras.Model | CompiledClassifier) -> float:
    """Share of images that PGD fools only by way of the surrogate, at the decisive epsilon."""
    x_adv = case.run(case.attack, case.decisive, CompiledClassifier.of(surrogate).unit).x_adv
    return case.only_by_other(case.wrong(x_adv))


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
