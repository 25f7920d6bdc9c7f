"""Projected gradient ascent on the cross-entropy; FGSM is one step of it."""

import dataclasses
from typing import ClassVar

from keras import ops

from tvkeras import norms
from tvkeras.attacks.base import Attack
from tvkeras.attacks.parts import misclassified, select, tempered
from tvkeras.inference import Logits, Randomness, Tensor, example_losses, input_gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectedGradient(Attack):
    """PGD, at a fixed epsilon.

    Each step goes along the steepest direction of the threat norm. (For l1 that is
    one pixel, which may be at its bound already: there it is a weak attack.) Logits
    are `tempered`: margins, held to 10, never grow so large that an attack is lost.

    Attributes:
        norm: Norm of the perturbation: "l2", "linf" or "l1".
        steps: Gradient steps; one without random start is FGSM and its relatives.
        relative_step: Length of a step over epsilon; by default 2.5 / steps, at most
            1, so that the ascent can reach the ball's edge and come back.
        random_start: Whether to start from a random point of the ball, not the image.
        restarts: Independent ascents; an example keeps its first success. More than
            one needs `random_start`.
        temper: Whether to temper the logits; without it this is the attack as
            published, which large logits defeat: an audit wants to know.

    Reference: Madry et al. (2018), arXiv:1706.06083.
    """

    steps: int = 20
    relative_step: float | None = None
    random_start: bool = False
    restarts: int = 1
    temper: bool = True

    fixed_epsilon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the arguments."""
        super().__post_init__()
        if self.restarts > 1 and not self.random_start:
            raise ValueError(
                f"restarts must be 1 without random_start, got restarts={self.restarts}: "
                "every ascent would be the same."
            )

    def perturb(
        self, logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """The first ascent that succeeds, else the last one; all of them are made."""

        def loss(outputs: Tensor) -> Tensor:
            return example_losses(tempered(outputs, labels) if self.temper else outputs, labels)

        def gradient(x: Tensor) -> Tensor:
            return input_gradient(logits, x, loss)[2]

        step_size = epsilon * (self.relative_step or min(1.0, 2.5 / self.steps))

        def ascend(restart: Tensor) -> Tensor:
            start = ops.zeros_like(images)
            if self.random_start:
                with random.at(restart) as seed:
                    start = norms.random_in_ball(images, self.norm, epsilon, seed)
            return norms.projected_ascent(
                gradient,
                images,
                norm=self.norm,
                epsilon=epsilon,
                steps=self.steps,
                step_size=step_size,
                start=start,
            )

        def again(restart: Tensor, x_adv: Tensor) -> Tensor:
            return select(misclassified(logits(x_adv), labels), x_adv, ascend(restart))

        x_adv = ascend(0)
        if self.restarts > 1:
            x_adv = ops.fori_loop(1, self.restarts, again, x_adv)
        calls = self.restarts * (self.steps + 1) - 1
        return x_adv, ops.full_like(labels, calls)
