"""What a benchmark attacks with: named suites, and trials of one's own."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvkeras import attacks, checks
from tvkeras.attacks import Attack
from tvkeras.checks import Radius


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One attack of a suite.

    Attributes:
        name: Short, the same in tables, cards and figures.
        attack: The attack.
        epsilons: Radii for an attack that takes one: numbers, or text such as "8/255";
            those of the card if there are none.
        images: How many of the first images it attacks; all if None, or if there are fewer.
        supplementary: Whether the worst case is over the images of the other trials, and
            this one counts where it attacked them: for a slow attack on a few.

    Raises:
        ValueError: For an illegal argument, or a name that promises AutoAttack for another.
    """

    name: str
    attack: Attack
    epsilons: tuple[float | str, ...] = ()
    images: int | None = None
    supplementary: bool = False

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.images is not None:
            checks.whole_number("images", self.images, minimum=1)
        for epsilon in checks.sequence("epsilons", self.epsilons):
            checks.epsilon(epsilon, "epsilons")
        if self.epsilons and not self.attack.fixed_epsilon:
            raise ValueError(
                f"epsilons of trial {self.name!r} must be empty for {type(self.attack).__name__}, "
                f"got epsilons={self.epsilons!r}."
            )
        automatic = isinstance(self.attack, attacks.AutoAttack)
        if "autoattack" in self.name.lower().replace(" ", "") and not automatic:
            raise ValueError(
                f"name must not call {type(self.attack).__name__} AutoAttack, which is a fixed "
                f"suite, got name={self.name!r}."
            )


def quick(norm: str, radii: Sequence[Radius]) -> list[Trial]:
    """One attack of each kind: by gradients, for the smallest perturbation, by scores alone.

    Args:
        norm: Norm of the perturbations.
        radii: Those above 0, ascending.
    """
    pgd = attacks.ProjectedGradient(norm=norm, steps=20)
    trials = [Trial(name=f"PGD {norm}", attack=pgd, epsilons=tuple(radii)), _smallest(norm)]
    if norm == "l1":  # which Square does not know
        return trials
    square = attacks.Square(norm=norm, queries=500)
    return [*trials, Trial(name=f"Square {norm}", attack=square, epsilons=_middle(radii))]


def standard(norm: str, radii: Sequence[Radius]) -> list[Trial]:
    """AutoAttack at the middle radius, and those of `quick`, PGD from two random starts."""
    pgd, *others = quick(norm, radii)
    restarted = attacks.ProjectedGradient(norm=norm, steps=20, random_start=True, restarts=2)
    suite = attacks.AutoAttack(norm=norm)
    return [
        dataclasses.replace(pgd, attack=restarted),
        *others,
        Trial(name=f"AutoAttack {norm}", attack=suite, epsilons=_middle(radii)),
    ]


def talk(norm: str, radii: Sequence[Radius]) -> list[Trial]:
    """The paper's attacks: PGD, C&W and Boundary in l2, I-FGSM in linf; on TensorFlow alone."""
    checks.one_of("a norm of the suite 'talk'", norm, ("l2", "linf"))
    if norm == "linf":
        bim = attacks.CleverHansBIM(norm=norm)
        return [Trial(name="I-FGSM linf", attack=bim, epsilons=tuple(radii)), _smallest(norm)]
    boundary = attacks.FoolboxBoundary(steps=25_000)
    return [
        quick(norm, radii)[0],
        _smallest(norm),
        Trial(name="C&W", attack=attacks.CarliniWagner(steps=200, search_steps=6)),
        Trial(name="Boundary", attack=boundary, images=50, supplementary=True),  # it is slow
    ]


SUITES: dict[str, Callable[[str, Sequence[Radius]], list[Trial]]] = {
    "quick": quick,
    "standard": standard,
    "talk": talk,
}


def chosen(
    suite: str | Sequence[str | Attack | Trial], radii: Mapping[str, Sequence[Radius]]
) -> list[Trial]:
    """The trials of a suite, with their radii.

    Args:
        suite: A name of `SUITES`, or a list of such names, attacks and trials; a trial
            takes the place of one of the same name in a named suite.
        radii: The card's, by norm.

    Raises:
        ValueError: For an unknown name, no trials, two of the same name, an attack that
            cannot be had on this backend, or in a norm without radii.
    """
    parts = [suite] if isinstance(suite, str) else checks.sequence("suite", suite)
    above = {norm: tuple(sorted(e for e in given if e > 0)) for norm, given in radii.items()}
    named: dict[str, Trial] = {}
    own: dict[str, Trial] = {}
    for part in parts:
        if isinstance(part, str):
            build = SUITES[checks.one_of("suite", part, SUITES)]
            try:
                trials = [trial for norm, given in above.items() for trial in build(norm, given)]
            except ImportError as error:
                raise ValueError(f"the suite {part!r} cannot be had: {error}") from error
            named |= {trial.name: trial for trial in trials}
            continue
        if isinstance(part, Attack):
            part = Trial(name=f"{type(part).__name__} {part.norm}", attack=part)
        if not isinstance(part, Trial):
            raise ValueError(f"suite must hold names, attacks and trials, got {part!r}.")
        if part.name in own:
            raise ValueError(f"trials must have different names, got {part.name!r} twice.")
        own[part.name] = part
    found = [*(named | own).values()]
    if not found or {trial.attack.norm for trial in found} - radii.keys():
        needed = sorted({trial.attack.norm for trial in found})
        raise ValueError(
            f"epsilons must give radii in {needed} for at least one trial, got "
            f"epsilons={dict(radii)!r} and {len(found)} trials."
        )
    return [
        dataclasses.replace(trial, epsilons=above[trial.attack.norm])
        if trial.attack.fixed_epsilon and not trial.epsilons
        else trial
        for trial in found
    ]


def _smallest(norm: str) -> Trial:
    """A search for the smallest perturbation."""
    if norm == "l2":
        return Trial(name="DDN", attack=attacks.DecoupledDirectionNorm())
    return Trial(name=f"FMN {norm}", attack=attacks.FastMinimumNorm(norm=norm))


def _middle(radii: Sequence[Radius]) -> tuple[Radius, ...]:
    """The middle radius, of two the larger, for an attack that is dear at each."""
    return (radii[len(radii) // 2],)


@functools.cache
def library_attacks() -> list[Callable[..., Attack]]:
    """CleverHans's and Foolbox's attacks, for gin; for one that cannot be had, what says why."""
    return [_library_attack(name) for name in attacks.TENSORFLOW_ATTACKS]


def _library_attack(name: str) -> Callable[..., Attack]:
    try:
        return getattr(attacks, name)
    except ImportError as error:
        why = str(error)

    def refuse(**_: Any) -> Attack:
        raise ValueError(f"{name} cannot be had: {why}")

    refuse.__name__ = name
    return refuse
