"""`train`: a run from its settings to a measured classifier."""

import contextlib
import hashlib
import os
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from tvkeras import attacks, backends, checkpoint, data, models, runs, zoo
from tvkeras.backends import Devices
from tvkeras.data import Splits
from tvkeras.evaluation.benchmark import benchmark
from tvkeras.evaluation.card import Card
from tvkeras.evaluation.trials import Trial
from tvkeras.runs import Run
from tvkeras.training.classifier import RobustClassifier
from tvkeras.training.losses import SmoothedCrossentropy
from tvkeras.training.recorder import Recorder
from tvkeras.training.settings import Execution, Network, Recipe, Task
from tvkeras.training.validation import NoisyValidation, RobustValidation, first_images

PGD_STEPS = 20
TIMED_STEPS = 5
WHITENING_IMAGES = 2000


def train(
    run_dir: str | os.PathLike[str],
    *,
    task: Task,
    network: Network,
    recipe: Recipe,
    execution: Execution = Execution(),  # noqa: B008 (immutable)
    configuration: Callable[[], str] = str,
) -> Card | None:
    """Trains in a run folder, or goes on with the run that is in it, and measures.

    Args:
        run_dir: The run folder, see `tvkeras.runs.Run`.
        task: Images and perturbations.
        network: What is trained.
        recipe: How.
        execution: On what.
        configuration: Returns the settings as text, when all of them were used, for the
            folder's `config.gin`: a run goes on only with the same. By default there is none.

    Returns:
        The test error of the best epoch's weights, clean and under 20-step PGD: a quick
        check, no robust accuracy to quote. None in the second and further ones of several
        processes.

    Raises:
        ValueError: For an illegal argument, or a run folder of another configuration.
        tvkeras.data.DataNotFoundError: If the data is not on this machine.
        FloatingPointError: If the loss stops being finite.
        tvkeras.backends.PeerError: If another process of the run has failed.
        tvkeras.training.recorder.TrainingInterrupt: After SIGTERM or Ctrl-C, with a checkpoint.
    """
    run = Run(pathlib.Path(run_dir))
    with contextlib.ExitStack() as stack:
        devices = stack.enter_context(_placed(execution, recipe))
        with backends.together():
            splits = _read(task, recipe, devices)
        robust, about = _build(network, recipe, execution, splits)
        about |= _facts(task, network, recipe, execution, robust, splits, devices)
        with backends.together():
            if devices.process == 0:
                stack.enter_context(run.locked())
                run.claim(configuration(), about, {"policy": keras.config.dtype_policy().name})
        minutes, number = execution.checkpoint_minutes, execution.checkpoint_steps
        recorder = Recorder(
            run, checkpoint_minutes=minutes, checkpoint_steps=number, devices=devices
        )
        if not recorder.restore(robust) and network.initial_weights is not None:
            with backends.together():
                sha256 = load_start(robust.classifier, zoo.find(network.initial_weights))
                if devices.process == 0:
                    run.describe(initial_weights_sha256=sha256)
        if recorder.epoch < recipe.epochs:
            _fit(robust, splits, task, recipe, recorder, run)
    return _measured(run, task, splits, recorder) if devices.process == 0 else None


def plan(
    *,
    task: Task,
    network: Network,
    recipe: Recipe,
    execution: Execution = Execution(),  # noqa: B008
) -> dict[str, Any]:
    """What `train` would do with these settings: steps, arithmetic, and seconds an epoch here.

    Raises:
        ValueError, tvkeras.data.DataNotFoundError: As `train`.
    """
    with _placed(execution, recipe) as devices:
        splits = _read(task, recipe, devices)
        robust, about = _build(network, recipe, execution, splits)
        seconds = about["steps_per_epoch"] * _seconds_per_step(robust, splits.train)
        return {**about, "seconds_per_epoch": seconds}


def load_start(classifier: keras.Model, source: pathlib.Path) -> str:
    """Sets a classifier to the weights that another run ended, or stood, with.

    Args:
        classifier: Of the same architecture.
        source: A run folder, of which the best weights are meant, or a checkpoint of a
            run, such as `RUN_FOLDER/checkpoints/last`.

    Returns:
        The sha256 of the file.

    Raises:
        ValueError: If there is no such file.
        checkpoint.CheckpointError: If it is damaged, or of another model.
    """
    path = Run(source).weights_path if source.is_dir() else source
    if not path.is_file():
        raise ValueError(
            "initial_weights must be a run folder, a checkpoint in one or a name of "
            f"tvkeras.zoo.names(), got {str(source)!r}; {path} does not exist."
        )
    if path.suffix == ".h5":
        runs.load_weights(classifier, path)
    else:
        checkpoint.assign_part(classifier.variables, checkpoint.load(path)[0], path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _placed(execution: Execution, recipe: Recipe) -> Iterator[Devices]:
    """Devices to train on, and inside, the precision that suits them."""
    before = keras.config.dtype_policy()
    with backends.spread(execution.devices) as devices:
        keras.config.set_dtype_policy(execution.policy(recipe.defense))
        try:
            yield devices
        finally:
            keras.config.set_dtype_policy(before)


def _read(task: Task, recipe: Recipe, devices: Devices) -> Splits:
    shared: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "validation_fraction": task.validation_fraction,
        "seed": recipe.seed,
        "download": task.download,
        "test_split": task.test_split,
        "devices": devices,
    }
    size = task.image_size
    if size is None or data.is_path(task.dataset):
        augmentation = recipe.augmentation
        splits = data.in_memory(task.dataset, augmentation=augmentation, image_size=size, **shared)
    else:
        splits = data.streamed(task.dataset, image_size=size, **shared)
    if task.validation_epsilon is not None and splits.validation is None:
        raise ValueError(
            f"validation_epsilon needs held-out images, got {task.validation_epsilon!r} with "
            f"validation_fraction={task.validation_fraction}. Raise validation_fraction."
        )
    return splits


def _build(
    network: Network, recipe: Recipe, execution: Execution, splits: Splits
) -> tuple[RobustClassifier, dict[str, Any]]:
    """The compiled classifier, and what training it costs."""
    random.seed(recipe.seed)  # Keras draws every layer's seed from here, on all backends
    classifier = models.build(network.name, splits.test.num_classes, **_arguments(network, splits))
    if models.WHITENING in {layer.name for layer in classifier.layers}:
        images, _ = first_images(splits.train, WHITENING_IMAGES)
        models.whiten(classifier, images, recipe.noise)
    epoch_steps = len(splits.train)
    steps = epoch_steps * recipe.epochs
    robust = RobustClassifier(
        classifier,
        recipe.defense,
        augmentation=recipe.augmentation,
        seed=recipe.seed,
        averaging=recipe.averaging and recipe.averaging(steps=steps, epoch_steps=epoch_steps),
        ramp_steps=round(recipe.ramp * steps),
        recompute=execution.recompute,
    )
    smoothing = recipe.label_smoothing
    robust.compile(
        recipe.optimizer(steps),
        loss=SmoothedCrossentropy(smoothing) if smoothing else None,
        metrics=["accuracy"],
    )
    robust.optimizer.build(robust.trainable_variables)
    operations = 6 * models.multiply_adds(classifier) * recipe.defense.passes
    return robust, {
        "parameters": classifier.count_params(),
        "steps_per_epoch": epoch_steps,
        "steps": steps,
        "passes_per_step": recipe.defense.passes,
        "training_pflop": round(operations * recipe.batch_size * steps / 1e15, 3),
    }


def _arguments(network: Network, splits: Splits) -> dict[str, Any]:
    return {"input_shape": splits.test.images.shape[1:], **network.arguments}


def _facts(
    task: Task,
    network: Network,
    recipe: Recipe,
    execution: Execution,
    robust: RobustClassifier,
    splits: Splits,
    devices: Devices,
) -> dict[str, Any]:
    """What decides the run's result, for its `run.json`."""
    precision = execution.precision
    optimizer: Any = getattr(robust.optimizer, "inner_optimizer", robust.optimizer)
    return {
        "model": network.name,
        "model_arguments": _arguments(network, splits),
        "num_classes": splits.test.num_classes,
        "defense": keras.saving.serialize_keras_object(recipe.defense),
        "augmentation": str(recipe.augmentation),
        "optimizer": {**optimizer.get_config(), "name": type(optimizer).__name__},
        "dataset": task.dataset,
        "image_size": task.image_size,
        "data_sha256": splits.checksums,
        "validation_fraction": task.validation_fraction,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "backend": keras.backend.backend(),
        "devices": devices.total,
        "averaging": str(robust.averaging),
        "norm": task.norm,
        "validation_epsilon": task.validation_epsilon,
        "initial_weights": network.initial_weights,
        "label_smoothing": recipe.label_smoothing,
        "ramp": recipe.ramp,
        **({} if precision == "auto" else {"precision": precision}),
    }


def _fit(
    robust: RobustClassifier,
    splits: Splits,
    task: Task,
    recipe: Recipe,
    recorder: Recorder,
    run: Run,
) -> None:
    callbacks: list[keras.callbacks.Callback] = []
    if task.validation_epsilon is not None:
        epsilon = task.validation_epsilon
        callbacks.append(RobustValidation(splits.validation, norm=task.norm, epsilon=epsilon))
    if recipe.noise and splits.validation is not None:
        callbacks.append(NoisyValidation(splits.validation, noise=recipe.noise))
    if keras.backend.backend() == "tensorflow":
        callbacks.append(keras.callbacks.TensorBoard(run.tensorboard_path, write_graph=False))
    with recorder.catching_signals():
        robust.fit(
            splits.train,
            validation_data=splits.validation,
            initial_epoch=recorder.epoch,
            initial_step=recorder.step,
            epochs=recipe.epochs,
            callbacks=[*callbacks, recorder],  # it may stop the run at the end of an epoch
            shuffle=False,  # the batches are shuffled already, as a function of the seed
            verbose="auto" if sys.stdout.isatty() else 0,
        )


def _measured(run: Run, task: Task, splits: Splits, recorder: Recorder) -> Card:
    """Measures the weights that are published, on one device, and notes it in `run.json`."""
    pgd = attacks.ProjectedGradient(norm=task.norm, steps=PGD_STEPS)
    card = benchmark(
        run.classifier(),
        splits.test.images,
        splits.test.labels,
        norm=task.norm,
        epsilons=task.epsilons,
        suite=[Trial(name=f"PGD {task.norm}", attack=pgd)],
        attacked_images=task.attacked_images,
        audited_images=0,
        corruptions=False,
        name=run.folder.name,
        dataset=f"{splits.test.name} {splits.test.split}",
    )
    errors = card.worst_case[0].error
    run.describe(
        train_seconds=round(recorder.seconds, 1),
        writing_seconds=round(recorder.writing_seconds, 1),
        results={
            "clean_error": card.clean_error.value,
            "pgd_error": {radius: error.value for radius, error in errors.items()},
            "gradient_norm_mean": card.gradient_norms["loss"]["mean"],
            "gradient_norm_max": card.gradient_norms["loss"]["max"],
        },
    )
    return card


def _seconds_per_step(robust: RobustClassifier, batches: keras.utils.PyDataset) -> float:
    """Median time of a few steps, after the one that compiles them."""
    ends = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: ends.append((float(logs["loss"]), time.monotonic()))
    )
    period = getattr(robust.defense, "penalty_every", 1)  # steps that differ in what they cost
    steps = min(period * TIMED_STEPS + 1, len(batches))
    robust.fit(batches, steps_per_epoch=steps, epochs=2, callbacks=[clock], verbose=0)
    seconds = np.diff([end for _, end in ends][::period])
    return statistics.median(seconds.tolist()) / period
