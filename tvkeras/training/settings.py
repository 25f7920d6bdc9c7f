"""The settings of a training run by concern: task, network, recipe, execution."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras

from tvkeras import backends, checks, data, models, norms
from tvkeras.defenses import Defense
from tvkeras.training import schedules
from tvkeras.training.averaging import Lookahead

PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Which images are learned, and which perturbations count.

    Attributes:
        dataset: "digits", a TFDS name, or one's own images: an `.npz`, or a folder of class
            folders for each split (`tvkeras.data.files`).
        test_split: Split for the final measurement.
        validation_fraction: Share of the training set held out to choose the best epoch;
            the test set is never used for that.
        image_size: None holds the data in memory; a number streams it from TFDS as square
            images of that side (see `tvkeras.data.Stream`), or brings those of a folder to it.
        download: Whether missing data may be downloaded.
        norm: Threat norm of the final measurement, and of the choice of the best epoch.
        epsilons: Radii of the final measurement, in pixel units, one of them above 0.
        attacked_images: Test images attacked in it.
        validation_epsilon: Radius of the short PGD on held-out images whose robust accuracy
            chooses the best epoch; None chooses by accuracy under the noise of the
            augmentation, if it has any, else by clean accuracy.

    Raises:
        ValueError: For an illegal argument.
    """

    dataset: str = "cifar10"
    test_split: str = "test"
    validation_fraction: float = 0.02
    image_size: int | None = None
    download: bool = False
    norm: str = "l2"
    epsilons: tuple[float | str, ...] = (0.1, 0.25, "100/255")
    attacked_images: int = 1000
    validation_epsilon: float | str | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.number("validation_fraction", self.validation_fraction, minimum=0.0, maximum=1.0)
        if self.image_size is not None:
            checks.whole_number("image_size", self.image_size, minimum=1)
        checks.one_of("norm", self.norm, norms.DUALS)
        given = checks.sequence("epsilons", self.epsilons)
        if max((checks.epsilon(epsilon, "epsilons") for epsilon in given), default=0) <= 0:
            raise ValueError(f"epsilons must hold a radius above 0, got {self.epsilons!r}.")
        checks.whole_number("attacked_images", self.attacked_images, minimum=1)
        if self.validation_epsilon is not None:
            checks.epsilon(self.validation_epsilon, "validation_epsilon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What is trained, and where it starts.

    Attributes:
        name: A name of `tvkeras.models.BUILDERS`.
        arguments: For the builder, such as {"width": 16}.
        initial_weights: Where training starts from: a run folder, a checkpoint in one, or a
            zoo entry, of the same network.

    Raises:
        ValueError: For an unknown name.
    """

    name: str = "resnext34"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    initial_weights: str | None = None

    def __post_init__(self) -> None:
        """Checks the name; the builder checks its arguments."""
        checks.one_of("name", self.name, models.BUILDERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What training minimises, and how.

    Attributes:
        defense: What it minimises.
        augmentation: Of the training images, inside the compiled step.
        optimizer: Maps the number of steps of the run to an optimizer.
        averaging: Maps `steps` and `epoch_steps`, those of the run and of an epoch, to an
            average of the weights (`Lookahead`); None for none.
        label_smoothing: Share of a label that is spread over all classes.
        ramp: Fraction of the run over which the defence's weights grow to their values.
        epochs: Passes over the training set.
        batch_size: Images in a batch, over all devices.
        seed: Of everything random.

    Raises:
        ValueError: For an illegal argument.
    """

    defense: Defense
    augmentation: data.Augmentation | None = None
    optimizer: Callable[[int], keras.optimizers.Optimizer] = schedules.sgd
    averaging: Callable[..., Lookahead] | None = None
    label_smoothing: float = 0.0
    ramp: float = 0.0
    epochs: int = 200
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.instance("augmentation", self.augmentation, "tvkeras.data.Augmentation()")
        checks.number("label_smoothing", self.label_smoothing, minimum=0.0, maximum=1.0)
        checks.number("ramp", self.ramp, minimum=0.0, maximum=1.0)
        checks.whole_number("epochs", self.epochs, minimum=1)
        checks.whole_number("batch_size", self.batch_size, minimum=1)
        checks.whole_number("seed", self.seed)

    @property
    def noise(self) -> float:
        """Standard deviation of the noise on training images, in units of [0, 1]."""
        return self.augmentation.noise if self.augmentation else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """On what, and how safely, a run computes.

    Attributes:
        precision: Keras dtype policy: "float32", "mixed_bfloat16", "mixed_float16", or "auto"
            for bfloat16 where the processor or accelerator is faster in it and the defence's
            `fd_step` allows it, else float32; a run may go on elsewhere.
        devices: How many devices share each batch, or "all" (BUILD.md, "Many devices").
        recompute: Whether backward passes compute activations again instead of keeping them
            (see `tvkeras.training.recompute`): for large networks.
        checkpoint_minutes: Minutes between checkpoints (see `tvkeras.training.recorder`).
        checkpoint_steps: Steps between them instead.

    Raises:
        ValueError: For an illegal argument.
    """

    precision: str = "auto"
    devices: int | str = 1
    recompute: bool = False
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        checks.one_of("precision", self.precision, PRECISIONS)
        if self.devices != "all":
            checks.whole_number("devices", self.devices, minimum=1)
        checks.number("checkpoint_minutes", self.checkpoint_minutes, minimum=0.0)
        if self.checkpoint_steps is not None:
            checks.whole_number("checkpoint_steps", self.checkpoint_steps, minimum=1)

    def policy(self, defense: Defense) -> str:
        """The dtype policy: for "auto" the fastest here that the defence is exact enough in."""
        if self.precision != "auto":
            return self.precision
        if not backends.gains_from_bfloat16():
            return "float32"
        try:
            defense.check_precision("bfloat16")
        except ValueError:
            return "float32"
        return "mixed_bfloat16"
