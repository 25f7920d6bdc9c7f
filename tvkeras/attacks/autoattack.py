"""AutoAttack: four attacks without a parameter to tune, one after the other."""

import dataclasses
import os
import pathlib
from typing import Any, ClassVar

import keras
import numpy as np

from tvkeras.attacks.apgd import CLASSES, AutoPGD
from tvkeras.attacks.base import Attack, AttackResult, Batch
from tvkeras.attacks.fab import FastAdaptiveBoundary
from tvkeras.attacks.square import Square
from tvkeras.inference import CompiledClassifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoAttackResult(AttackResult):
    """What the suite found, example by example.

    Attributes:
        version: "standard", or "custom" followed by what differs from it: figures of a
            custom version are not AutoAttack's.
        broken_by: text `(count,)`: the member that broke the example, "clean" where it
            was misclassified to begin with, "" where it stands.
    """

    version: str
    broken_by: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """The suite AutoAttack, at a fixed epsilon.

    Its members are APGD on the cross-entropy, APGD on the targeted difference of logits
    ratio, targeted FAB, and Square, with the published parameters; targeted members
    turn to 9 classes, or to all the others. Each gets the examples that still stand,
    packed into full batches. The classifier must be deterministic.

    With fewer than 4 classes the targeted ratio does not exist. With 3 classes the
    suite takes the untargeted ratio instead, with 2 it leaves that member out (the
    published code warns and fails there), and calls its result "custom".

    Attributes:
        norm: Norm of the perturbation: "l2" or "linf".

    Reference: Croce & Hein (2020), arXiv:2003.01690.
    """

    fixed_epsilon: ClassVar[bool] = True
    legal_norms: ClassVar[tuple[str, ...]] = ("l2", "linf")

    def members(self, num_classes: int) -> tuple[str, dict[str, Attack]]:
        """The version that suits `num_classes`, and its attacks by name, in order."""
        first: dict[str, Attack] = {"apgd-ce": AutoPGD(norm=self.norm)}
        last = {"fab-t": FastAdaptiveBoundary(norm=self.norm), "square": Square(norm=self.norm)}
        if num_classes >= CLASSES["targeted_dlr"]:
            targeted = AutoPGD(norm=self.norm, loss="targeted_dlr")
            return "standard", first | {"apgd-t": targeted} | last
        if num_classes == CLASSES["dlr"]:
            untargeted = AutoPGD(norm=self.norm, loss="dlr")
            return "custom: apgd-dlr for apgd-t (3 classes)", first | {
                "apgd-dlr": untargeted
            } | last
        return "custom: without apgd-t (2 classes)", first | last

    def __call__(
        self,
        classifier: keras.Model | CompiledClassifier,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        epsilon: float | str | None = None,
        resume_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> AutoAttackResult:
        """Runs the members; arguments as for every attack.

        Returns:
            The union of the members' successes; `queries` are those of all members.
        """
        self._radius(epsilon)
        model = CompiledClassifier.of(classifier)
        images = model.images(images)
        labels = model.labels(labels, images)
        version, members = self.members(model.num_classes(images))
        broken_by = np.full(len(labels), "", "<U16")
        found: dict[str, np.ndarray] = {}
        rows = np.arange(len(labels))
        for name, member in {"clean": _Unperturbed(norm=self.norm), **members}.items():
            part = member(
                model,
                images[rows],
                labels[rows],
                epsilon=epsilon,
                **options,
                resume_dir=None if resume_dir is None else pathlib.Path(resume_dir) / name,
            )
            arrays = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
            if not found:
                found = arrays
            else:
                arrays["queries"] = found["queries"][rows] + arrays["queries"]
            for field, values in arrays.items():
                found[field][rows] = values
            broken_by[rows[part.success]] = name
            rows = rows[~part.success]
            if not len(rows):
                break
        return AutoAttackResult(**found, version=version, broken_by=broken_by)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unperturbed(Attack):
    """Finds the images that are misclassified as they are."""

    fixed_epsilon: ClassVar[bool] = True

    def search(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The images, for no query."""
        return batch.images, np.zeros(len(batch.images), np.int64)
