"""Trains a robust classifier: `python -m tvkeras.train --gin_file=gin/cifar_tv_lip.gin`."""

import contextlib
import json
import pathlib
import random
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import keras
import numpy as np
from absl import flags

from tvkeras import backends, checks, config, data, evaluation, models, norms, runs, terminal, zoo
from tvkeras.defenses import Defense
from tvkeras.training import schedules
from tvkeras.training.averaging import Lookahead
from tvkeras.training.classifier import RobustClassifier
from tvkeras.training.losses import SmoothedCrossentropy
from tvkeras.training.recorder import Recorder, TrainingInterrupt
from tvkeras.training.validation import RobustValidation, first_images

TIMED_STEPS = 5
PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")
WHITENING_IMAGES = 2000


def train(
    *,
    run_dir: str,
    defense: Defense,
    dataset: str = "cifar10",
    test_split: str = "test",
    download: bool = False,
    image_size: int | None = None,
    validation_fraction: float = 0.02,
    augmentation: data.Augmentation | None = None,
    model: str = "resnext34",
    model_arguments: Mapping[str, Any] | None = None,
    initial_weights: str | None = None,
    optimizer: Callable[[int], keras.optimizers.Optimizer] = schedules.sgd,
    averaging: Callable[[int, int], Lookahead] | None = None,
    label_smoothing: float = 0.0,
    ramp: float = 0.0,
    epochs: int = 200,
    batch_size: int = 128,
    precision: str = "auto",
    jit_compile: bool | str = "auto",
    steps_per_execution: int = 1,
    devices: int | str = 1,
    checkpoint_minutes: float = 10.0,
    checkpoint_steps: int | None = None,
    seed: int = 0,
    norm: str = "l2",
    validation_epsilon: float | str | None = None,
    epsilons: tuple[float | str, ...] = (0.1, 0.25, "100/255"),
    attacked_images: int = 1000,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Trains in a run folder, or goes on with the run that is in it, and measures.

    Args:
        run_dir: The run folder, see `tvkeras.runs`.
        defense: What training minimises.
        dataset: "digits" or a TFDS name.
        test_split: TFDS split for the final measurement.
        download: Whether missing data may be downloaded.
        image_size: None holds the data in memory; a number streams it as square
            images of that side (see `tvkeras.data.Stream`).
        validation_fraction: Share of the training set held out to choose the best
            epoch; the test set is never used for that.
        augmentation: Of the training images, inside the compiled step.
        model: A name of `tvkeras.models.BUILDERS`.
        model_arguments: For the builder, such as {"width": 16}.
        initial_weights: Where training starts from: a run folder, a checkpoint in one,
            or a zoo entry, of the same network.
        optimizer: Maps the number of steps of the run to an optimizer.
        averaging: Maps it, and that of an epoch, to an average of the weights
            (`schedules.lookahead`), or None.
        label_smoothing: Share of a label that is spread over all classes.
        ramp: Fraction of the run over which the defence's weights grow to their values.
        epochs: Passes over the training set.
        batch_size: Images in a batch.
        precision: Keras dtype policy: "float32", "mixed_bfloat16", "mixed_float16", or
            "auto" for bfloat16 where the processor or accelerator computes in it and the
            defence's `fd_step` allows it, else float32; a run may go on elsewhere.
        jit_compile: Whether XLA compiles the step; "auto" for accelerators only.
        steps_per_execution: Steps in one call of the compiled function.
        devices: How many devices share each batch, or "all" (BUILD.md, "Many devices").
        checkpoint_minutes: Minutes between checkpoints (see `tvkeras.training.recorder`).
        checkpoint_steps: Steps between them instead.
        seed: Of everything random.
        norm: Threat norm of the final measurement, and of the choice of the best epoch.
        validation_epsilon: Radius of the short PGD on held-out images whose robust
            accuracy chooses the best epoch; None chooses by clean accuracy.
        epsilons: Radii of the final measurement.
        attacked_images: Test images attacked in the final measurement.
        dry_run: Only print the plan, with the time of a few steps.

    Returns:
        What `evaluation.measure` finds on the test set for the best epoch's weights;
        nothing in the second and further ones of several processes.

    Raises:
        ValueError: For an illegal argument, or a run folder of another configuration.
        tvkeras.data.DataNotFoundError: If the data is not on this machine.
        FloatingPointError: If the loss stops being finite.
        tvkeras.backends.PeerError: If another process of the run has failed.
        tvkeras.training.recorder.TrainingInterrupt: After SIGTERM or Ctrl-C, with a checkpoint.
    """
    # ---- Arguments ----------------------------------------------------------------------
    checks.whole_number("epochs", epochs, minimum=1)
    checks.whole_number("attacked_images", attacked_images, minimum=1)
    checks.one_of("norm", norm, norms.DUALS)
    for epsilon in checks.sequence("epsilons", epsilons):
        checks.epsilon(epsilon, "epsilons")
    checks.number("checkpoint_minutes", checkpoint_minutes, minimum=0.0)
    if checkpoint_steps is not None:
        checks.whole_number("checkpoint_steps", checkpoint_steps, minimum=1)
    checks.one_of("precision", precision, PRECISIONS)
    checks.instance("augmentation", augmentation, "tvkeras.data.Augmentation()")
    checks.number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0)
    checks.number("ramp", ramp, minimum=0.0, maximum=1.0)
    if validation_epsilon is not None:
        checks.epsilon(validation_epsilon, "validation_epsilon")
    if devices != "all":
        checks.whole_number("devices", devices, minimum=1)
    run = runs.Run(pathlib.Path(run_dir))

    with contextlib.ExitStack() as stack:
        spread = stack.enter_context(backends.spread(devices))

        # ---- Data ------------------------------------------------------------------
        shared: dict[str, Any] = {
            "batch_size": batch_size,
            "validation_fraction": validation_fraction,
            "seed": seed,
            "download": download,
            "test_split": test_split,
            "devices": spread,
        }
        with backends.together():
            if image_size is None:
                splits = data.in_memory(dataset, augmentation=augmentation, **shared)
            else:
                splits = data.streamed(dataset, image_size=image_size, **shared)
        steps = len(splits.train)

        if validation_epsilon is not None and splits.validation is None:
            raise ValueError(
                f"validation_epsilon needs held-out images, got {validation_epsilon!r} with "
                f"validation_fraction={validation_fraction}. Raise validation_fraction."
            )

        # ---- Model and objective ---------------------------------------------------
        shape = {"input_shape": splits.test.images.shape[1:]}
        arguments = {**shape, **(model_arguments or {})}

        def build() -> keras.Model:
            return models.build(model, splits.test.num_classes, **arguments)

        random.seed(seed)  # Keras draws every layer's seed from here, on all backends
        stack.callback(keras.config.set_dtype_policy, keras.config.dtype_policy())
        policy = _fastest(defense) if precision == "auto" else precision
        keras.config.set_dtype_policy(policy)
        classifier = build()
        if models.WHITENING in {layer.name for layer in classifier.layers}:
            models.whiten(classifier, first_images(splits.train, WHITENING_IMAGES)[0])
        robust = RobustClassifier(
            classifier,
            defense,
            augmentation=augmentation,
            seed=seed,
            averaging=averaging and averaging(steps * epochs, steps),
            ramp_steps=round(ramp * steps * epochs),
        )
        robust.compile(
            optimizer(steps * epochs),
            loss=SmoothedCrossentropy(label_smoothing) if label_smoothing else None,
            metrics=["accuracy"],
            jit_compile=jit_compile,
            steps_per_execution=steps_per_execution,
        )
        robust.optimizer.build(robust.trainable_variables)
        operations = 6 * models.multiply_adds(classifier) * defense.passes
        plan = {
            "parameters": classifier.count_params(),
            "steps_per_epoch": steps,
            "steps": steps * epochs,
        }
        cost = {
            "passes_per_step": defense.passes,
            "training_pflop": round(operations * batch_size * steps * epochs / 1e15, 3),
        }
        inner: Any = getattr(robust.optimizer, "inner_optimizer", robust.optimizer)
        facts = {
            **plan,
            "model": model,
            "model_arguments": arguments,
            "num_classes": splits.test.num_classes,
            "defense": keras.saving.serialize_keras_object(defense),
            "augmentation": str(augmentation),
            "optimizer": {**inner.get_config(), "name": type(inner).__name__},
            "dataset": dataset,
            "data_sha256": splits.checksums,
            "validation_fraction": validation_fraction,
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
            "backend": keras.backend.backend(),
            "devices": spread.total,
            "averaging": str(robust.averaging),
            "norm": norm,
            "validation_epsilon": validation_epsilon,
            "initial_weights": initial_weights,
            "label_smoothing": label_smoothing,
            "ramp": ramp,
        }
        if precision != "auto":
            facts["precision"] = precision
        if dry_run:
            return {
                **plan,
                **cost,
                "seconds_per_epoch": steps * _seconds_per_step(robust, splits.train),
            }

        # ---- Run folder ------------------------------------------------------------
        with backends.together():
            if spread.process == 0:
                stack.enter_context(run.locked())
                run.claim(config.operative(), facts, {"policy": policy})
                run.describe(**cost)
        recorder = Recorder(
            run,
            checkpoint_minutes=checkpoint_minutes,
            checkpoint_steps=checkpoint_steps,
            devices=spread,
        )
        if not recorder.restore(robust) and initial_weights is not None:
            with backends.together():
                sha256 = runs.load_start(classifier, zoo.find(initial_weights))
                if spread.process == 0:
                    run.describe(initial_weights_sha256=sha256)

        # ---- Training --------------------------------------------------------------
        callbacks: list[keras.callbacks.Callback] = [recorder]
        if keras.backend.backend() == "tensorflow":
            board = keras.callbacks.TensorBoard(run.tensorboard_path, write_graph=False)
            callbacks.insert(0, board)  # the recorder may stop the run at the end of an epoch
        if validation_epsilon is not None:
            check = RobustValidation(splits.validation, norm=norm, epsilon=validation_epsilon)
            callbacks.insert(0, check)
        if recorder.epoch < epochs:
            with recorder.catching_signals():
                robust.fit(
                    splits.train,
                    validation_data=splits.validation,
                    initial_epoch=recorder.epoch,
                    initial_step=recorder.step,
                    epochs=epochs,
                    callbacks=callbacks,
                    shuffle=False,  # the batches are shuffled already, as a function of the seed
                    verbose="auto" if sys.stdout.isatty() else 0,
                )

    # ---- Measurement, on one device and on the weights that are published ------------
    if spread.process > 0:
        return {}
    classifier = build()
    classifier.load_weights(run.weights_path)
    results = evaluation.measure(
        classifier, splits.test, norm=norm, epsilons=epsilons, attacked_images=attacked_images
    )
    run.describe(
        train_seconds=round(recorder.seconds, 1),
        writing_seconds=round(recorder.writing_seconds, 1),
        results=results,
    )
    return results


def _fastest(defense: Defense) -> str:
    """The fastest precision here that the defence's step is long enough for."""
    if not backends.computes_in_bfloat16():
        return "float32"
    try:
        defense.check_precision("bfloat16")
    except ValueError:
        return "float32"
    return "mixed_bfloat16"


def _seconds_per_step(robust: RobustClassifier, batches: keras.utils.PyDataset) -> float:
    """Median time of a few steps, after the call that compiles them."""
    ends = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: ends.append((float(logs["loss"]), time.monotonic()))
    )
    period = getattr(robust.defense, "penalty_every", 1)  # steps that differ in what they cost
    calls = period * TIMED_STEPS + 1
    steps = min(calls * robust.steps_per_execution, len(batches))
    robust.fit(batches, steps_per_epoch=steps, epochs=2, callbacks=[clock], verbose=0)
    seconds = np.diff([end for _, end in ends][::period])
    return statistics.median(seconds.tolist()) / (period * robust.steps_per_execution)


# ---- Command line --------------------------------------------------------------------
_RUN_DIR = flags.DEFINE_string("run_dir", None, "The run folder; default: runs/<gin files' names>.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and the time of an epoch only.")


def main(_: list[str]) -> None:
    """Parse, bind, call."""
    train_configured = config.configurable(train)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        config.bind(config.GIN_FILE.value, config.GIN_PARAM.value)
        if not config.GIN_FILE.value:
            raise ValueError("--gin_file must name an experiment, such as gin/cifar_tv_lip.gin.")
        name = "-".join(pathlib.Path(file).stem for file in config.GIN_FILE.value)
        run_dir = _RUN_DIR.value or f"runs/{name}"
        results = train_configured(run_dir=run_dir, dry_run=_DRY_RUN.value)
    except (ValueError, OSError, FloatingPointError, backends.PeerError) as error:
        terminal.fail(error)
    except TrainingInterrupt as interruption:
        command = shlex.join(["python", "-m", "tvkeras.train", *sys.argv[1:]])
        print(f"{interruption} The same command goes on:\n{command}", file=sys.stderr)
        sys.exit(128 + interruption.number)
    print(json.dumps(results, indent=2))
    if not _DRY_RUN.value:
        print(f"run folder: {run_dir}")


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Stops the command outside `fit`, which has its own way (`Recorder.catching_signals`)."""
    raise TrainingInterrupt(f"{signal.Signals(number).name} stopped it between steps.", number)


if __name__ == "__main__":
    terminal.run(main)
