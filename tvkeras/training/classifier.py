"""`RobustClassifier`: trains a plain Keras classifier under a defence."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tvkeras import backends, checks, contract, inputs
from tvkeras.defenses import Defense, TrainingBatch, Update
from tvkeras.inputs import Bounds
from tvkeras.training.averaging import Lookahead
from tvkeras.training.losses import SmoothedCrossentropy
from tvkeras.training.watch import Guard, Watch, named_errors

Tensor = Any

CHECKED_IMAGES = 64  # that the classifier is asked about before it trains


@keras.saving.register_keras_serializable("tvkeras")
class RobustClassifier(contract.Wrapper, keras.Model):
    """Wraps a classifier so that `fit` minimises a defence's objective.

    The wrapped `classifier` stays a plain Keras model: save it, serve it, load it
    without tvkeras. Images come as float32 in [0, 1], or as uint8, which is divided
    by 255 on the way in; normalisation belongs inside the classifier, so that every
    radius is in pixel units. A classifier with its rescaling inside, as those of
    `keras.applications`, has bounds=(0, 255) and is given images in them; radii, steps
    and penalties are in units of [0, 1] all the same.

    Args:
        classifier: Maps images `(batch, height, width, channels)` to logits
            `(batch, num_classes)`.
        defense: What training minimises, such as `tvkeras.TVLipschitz()`.
        augmentation: Called as `augmentation(images, seed)` inside the compiled
            training step, such as `tvkeras.data.Augmentation()`; None for none.
        seed: Seed of the augmentation's and the defence's random numbers.
        averaging: An average of the weights that training goes on from, such as
            `tvkeras.training.averaging.Lookahead(steps=...)`; None for none.
        ramp_steps: Steps over which the defence's weights grow linearly to their values.
        bounds: Pixel values of black and white in the classifier's images.
        **kwargs: `name` and `dtype` of a `keras.Model`.

    Raises:
        ValueError: If the classifier is unbuilt, takes integers, is made for images in
            other bounds or ends in a softmax, the augmentation cannot be called, or the
            defence's step is too small for the classifier's precision.

    Example:
    ```python
    robust = tvkeras.RobustClassifier(classifier, defense=tvkeras.TVLipschitz())
    robust.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy"])
    robust.fit(images, labels, epochs=10)
    robust.classifier.save("model.keras")
    ```
    """

    def __init__(
        self,
        classifier: keras.Model,
        defense: Defense,
        augmentation: Callable[[Tensor, keras.random.SeedGenerator], Tensor] | None = None,
        seed: int = 0,
        averaging: Lookahead | None = None,
        ramp_steps: int = 0,
        bounds: tuple[float, float] = inputs.UNIT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bounds = Bounds.of(bounds)
        contract.check(classifier, self.bounds)
        if not isinstance(defense, Defense):
            raise ValueError(
                f"defense must be a tvkeras.Defense, got defense={defense!r}. "
                "Use an instance such as tvkeras.TVLipschitz()."
            )
        checks.instance("augmentation", augmentation, "tvkeras.data.Augmentation()")
        for dtype in sorted(_compute_dtypes(classifier)):
            defense.check_precision(dtype)
        self.classifier = classifier
        self.defense = defense
        self.augmentation = augmentation
        self.random = keras.random.SeedGenerator(checks.whole_number("seed", seed))
        self.penalty_metrics = {name: keras.metrics.Mean(name) for name in defense.penalties}
        self.averaging = averaging
        self.ramp_steps = checks.whole_number("ramp_steps", ramp_steps)
        self.averages = [  # of copies: `v.value` would be the same storage
            keras.Variable(ops.convert_to_numpy(v), trainable=False, dtype=v.dtype, name="average")
            for v in (_floating(classifier) if averaging else ())
        ]
        self.watch = Watch(self.bounds)
        self._seed = seed
        self.built = True

    def compile(
        self,
        optimizer: Any = "sgd",
        loss: keras.losses.Loss | None = None,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """Configures training, as `keras.Model.compile` does.

        Args:
            optimizer: Any Keras optimizer; for a classifier that computes in float16
                it is wrapped in a `LossScaleOptimizer`.
            loss: A `keras.losses.Loss` of logits; by default
                `SparseCategoricalCrossentropy(from_logits=True)`.
            metrics: As in Keras.
            **kwargs: As in Keras: `jit_compile`, `steps_per_execution`, ...

        Raises:
            ValueError: If `loss` is no loss of logits.
        """
        if loss is None:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if not isinstance(loss, keras.losses.Loss) or not loss.get_config().get("from_logits", 1):
            raise ValueError(
                "loss must be a keras.losses.Loss built with from_logits=True, "
                f"got loss={loss!r}. The classifier's outputs are logits."
            )
        if loss.reduction != "sum_over_batch_size" or kwargs.get("loss_weights") is not None:
            raise ValueError(
                "loss must have reduction='sum_over_batch_size' and no loss_weights, got "
                f"reduction={loss.reduction!r}, loss_weights={kwargs.get('loss_weights')!r}. "
                "Weigh examples with sample_weight."
            )
        optimizer = keras.optimizers.get(optimizer)
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if "float16" in _compute_dtypes(self.classifier) and not scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)
        self._call_twin = backends.fast_twin(self.classifier).stateless_call

    def call(self, images: Tensor, training: bool | None = None) -> Tensor:
        """Logits, shape `(batch, num_classes)`."""
        return self.classifier(self.bounds.native(self._as_images(images)), training=training)

    def fit(
        self, x: Any = None, y: Any = None, *, initial_step: int = 0, **kwargs: Any
    ) -> keras.callbacks.History:
        """Trains as `keras.Model.fit` does, on images and labels that are checked.

        Arrays are checked before the first step, those of `validation_data` too; of a
        data set the first batch, and all others in the compiled step: bad ones among them
        stop training within the epoch. So does a total variation that is exactly zero in
        the first steps, where no gradient reaches the images.

        Before each epoch it calls `x.begin_epoch(epoch, first_batch)` where there is
        one, as `tvkeras.data.Batches` has.

        Args:
            x: As in Keras.
            y: As in Keras.
            initial_step: Steps of `initial_epoch` that a checkpoint has done already,
                a multiple of `steps_per_execution`; needs an `x` with `begin_epoch`.
            **kwargs: As in Keras.

        Raises:
            ValueError: If images are not finite floats in the bounds (or uint8), or not
                of the classifier's shape; labels are no classes, or not what the loss
                wants; the classifier's outputs are probabilities; no gradient reaches the
                images; or if `initial_step` is no such number.
        """
        partial = initial_step % self.steps_per_execution or not hasattr(x, "begin_epoch")
        if initial_step and partial:
            raise ValueError(
                "initial_step must be a multiple of steps_per_execution="
                f"{self.steps_per_execution}, with an x that has begin_epoch (such as "
                f"tvkeras.data.Batches), got initial_step={initial_step}, x={x!r}."
            )
        if initial_step and len(x) % self.steps_per_execution:
            raise ValueError(
                f"steps_per_execution must divide the {len(x)} steps of an epoch to go on inside "
                f"one, got steps_per_execution={self.steps_per_execution}: the last call of an "
                "epoch would do more steps than are left."
            )
        mirroring = getattr(self.augmentation, "flip", None) == "alternating"
        if mirroring and getattr(x, "augmentation", None) != self.augmentation:
            raise ValueError(
                "augmentation with flip='alternating' needs an x that mirrors the images, "
                "tvkeras.data.Batches(examples, batch_size, seed, augmentation=augmentation), got "
                f"x={x!r:.80}. Use flip=True for other data."
            )
        if self.averages and not int(ops.convert_to_numpy(self.optimizer.iterations)):
            for average, v in zip(self.averages, _floating(self.classifier), strict=False):
                average.assign(ops.convert_to_numpy(v))  # which may have been loaded since
        x, y = self._admitted(x, y, "x", "y")
        first, x = _first_batch(x, y)
        if first is not None:
            self._check_batch(*first)
            if initial_step:  # the metrics' sums so far need variables to be assigned to
                self.compute_metrics(first[0], first[1], self(first[0]), None)
        validation = kwargs.get("validation_data")
        if isinstance(validation, tuple | list) and len(validation) > 1:
            x_val, y_val, *weights = validation
            names = "validation_data[0]", "validation_data[1]"
            kwargs["validation_data"] = (*self._admitted(x_val, y_val, *names), *weights)
        own: list[keras.callbacks.Callback] = [Guard()]
        if hasattr(x, "begin_epoch"):
            own.append(_EpochStarter(x, initial_step))
        kwargs["callbacks"] = [*own, *keras.tree.flatten(kwargs.get("callbacks") or [])]
        with named_errors():
            return super().fit(x, y, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, **kwargs: Any) -> Any:
        """Loss and metrics as `keras.Model.evaluate`, of images and labels that are checked.

        Args:
            x: As in Keras.
            y: As in Keras.
            **kwargs: As in Keras.

        Raises:
            ValueError: As `fit`, of images and labels.
        """
        callbacks = kwargs.get("callbacks")
        if not isinstance(callbacks, keras.callbacks.CallbackList):  # else `fit` asks
            x, y = self._admitted(x, y, "x", "y")
            kwargs["callbacks"] = [Guard(), *keras.tree.flatten(callbacks or [])]
        with named_errors():
            return super().evaluate(x, y, **kwargs)

    def compute_metrics(
        self, x: Tensor, y: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Keras's own, after a look at the images and labels of the step."""
        self.watch.update_state(x, y, y_pred)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def train_step(self, *arguments: Any) -> Any:
        """One optimizer step, in the form that the backend's trainer calls."""
        return backends.train_step(self, *arguments)

    def test_step(self, *arguments: Any) -> Any:
        """Keras's own, without the penalties, which only training measures."""
        result = super().test_step(*arguments)
        logs, state = (result, ()) if isinstance(result, dict) else (result[0], result[1:])
        logs = {name: value for name, value in logs.items() if name not in self.penalty_metrics}
        return (logs, *state) if state else logs

    def compute_update(
        self,
        trainable: Sequence[Tensor],
        non_trainable: Sequence[Tensor],
        images: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None,
    ) -> tuple[Update, list[Tensor]]:
        """Augments a batch and differentiates the objective; assigns no variable.

        Args:
            trainable: Values of `trainable_variables`.
            non_trainable: Values of `non_trainable_variables`.
            images: Shape `(batch, height, width, channels)`.
            labels: Shape `(batch,)`, or `(batch, num_classes)` for soft labels.
            sample_weight: Shape `(batch,)`, or None.

        Returns:
            The update and the new values of `non_trainable_variables`.
        """
        values = {
            id(variable): value
            for variable, value in zip(self.non_trainable_variables, non_trainable, strict=True)
        }
        buffers = self.classifier.non_trainable_variables
        state = [values[id(variable)] for variable in buffers]
        images = self._as_images(images)
        loss_scale, strength = self.optimizer.scale_loss(1.0), self._strength(images.dtype)
        step = ops.convert_to_tensor(self.optimizer.iterations)

        def call(trainable: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Any, Tensor]:
            native = self.bounds.native(images)
            logits, new_state, losses = self._call_twin(
                trainable, state, native, training=True, return_losses=True
            )
            return logits, new_state, sum(losses) if losses else 0.0

        with keras.StatelessScope([(self.random.state, values[id(self.random.state)])]) as scope:
            if self.augmentation is not None:
                images = self.augmentation(images, self.random)
            batch = TrainingBatch(
                call=call,
                example_loss=self.loss.call,
                trainable=trainable,
                images=images,
                labels=_flat_labels(labels),
                sample_weight=_as_weight(sample_weight, images),
                loss_scale=loss_scale,
                stochastic=any("seed_generator_state" in variable.path for variable in buffers),
                seed=self.random,
                strength=strength,
                step=step,
            )
            update = self.defense.update(batch)
            values[id(self.random.state)] = scope.get_current_value(self.random.state)
        values.update({id(v): value for v, value in zip(buffers, update.state, strict=True)})
        return update, [values[id(variable)] for variable in self.non_trainable_variables]

    def average_weights(
        self, step: Tensor, trainable: Sequence[Tensor], non_trainable: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Values of the variables after `averaging`, assigning none.

        Args:
            step: Steps that are done, a scalar.
            trainable: Values of `trainable_variables` after the step.
            non_trainable: Values of `non_trainable_variables` after the step.
        """
        if self.averaging is None:
            return list(trainable), list(non_trainable)
        groups = (self.trainable_variables, self.non_trainable_variables)
        values = {
            id(variable): value
            for variables, group in zip(groups, (trainable, non_trainable), strict=True)
            for variable, value in zip(variables, group, strict=True)
        }
        averaged = (_floating(self.classifier), self.averages)
        fast, slow = ([values[id(variable)] for variable in group] for group in averaged)
        for variables, new in zip(averaged, self.averaging(step, fast, slow), strict=True):
            values.update({id(v): value for v, value in zip(variables, new, strict=True)})
        one, other = ([values[id(variable)] for variable in group] for group in groups)
        return one, other

    def compute_logs(
        self, update: Update, images: Tensor, labels: Tensor, sample_weight: Tensor | None
    ) -> dict[str, Tensor]:
        """Updates the metrics with a step's results and returns their values."""
        count = ops.shape(images)[0]
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(update.loss, sample_weight=count)
        for name, metric in self.penalty_metrics.items():
            value = update.penalties[name]
            lost = ops.logical_not(ops.isfinite(value))  # an overflow of float16, or not measured
            weight = ops.where(lost, 0, count)
            metric.update_state(ops.where(lost, ops.zeros_like(value), value), sample_weight=weight)
        return self.compute_metrics(images, _flat_labels(labels), update.logits, sample_weight)

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, serialised."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "classifier": serialize(self.classifier),
            "defense": serialize(self.defense),
            "augmentation": self.augmentation and serialize(self.augmentation),
            "averaging": self.averaging and serialize(self.averaging),
            "ramp_steps": self.ramp_steps,
            "seed": self._seed,
            "bounds": list(self.bounds),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RobustClassifier":
        """The inverse of `get_config`."""
        parts = ("classifier", "defense", "augmentation", "averaging")
        restored = {
            name: config[name] and keras.saving.deserialize_keras_object(config[name])
            for name in parts
        }
        return cls(**{**config, **restored})

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as the saved one was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def _strength(self, dtype: str) -> Tensor | float:
        """What the defence's weights are multiplied with at the next step."""
        if not self.ramp_steps:
            return 1.0
        return ops.minimum((ops.cast(self.optimizer.iterations, dtype) + 1) / self.ramp_steps, 1.0)

    def _as_images(self, images: Tensor) -> Tensor:
        """Images in [0, 1], in the precision of the weights."""
        dtype = keras.backend.standardize_dtype(images.dtype)
        inputs.check_dtype(dtype, self.bounds)
        images = ops.cast(images, self.variable_dtype)
        return images / 255 if dtype == "uint8" else self.bounds.unit(images)

    def _admitted(self, x: Any, y: Any, x_name: str, y_name: str) -> tuple[Any, Any]:
        """Images and labels as arrays, if they pass the gate; a data set as it is."""
        is_array = hasattr(x, "__array__") or isinstance(x, list | tuple)
        if y is None and x is not None and not is_array:
            return x, y
        shape = contract.image_shape(self.classifier)
        images = inputs.images(x, bounds=self.bounds, shape=shape, argument=x_name)
        if y is None:
            raise ValueError(f"{y_name} must hold the labels of the images in {x_name}, got None.")
        check = inputs.soft_labels if _wants_rows(self.loss, y) else inputs.labels
        num_classes = contract.num_classes(self.classifier, images.shape[1:])
        return images, check(y, len(images), num_classes, y_name)

    def _check_batch(self, images: Any, labels: Any) -> None:
        """Checks a first batch, and what the classifier says of it."""
        images, _ = self._admitted(np.asarray(images), np.asarray(labels), "images", "labels")
        outputs = ops.convert_to_numpy(self(images, training=False))
        if contract.are_probabilities(outputs):
            raise contract.probabilities_error()


class _EpochStarter(keras.callbacks.Callback):
    """Tells the data which epoch begins, and passes over the steps of it that are done."""

    def __init__(self, batches: Any, initial_step: int) -> None:
        super().__init__()
        self._batches = batches
        self._done = initial_step

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Orders the data; in a first epoch that is partly done, skips its steps."""
        self._batches.begin_epoch(epoch, self._done)
        if self._done:
            self._skip(self._done // self.model.steps_per_execution)
            self._done = 0

    def _skip(self, count: int) -> None:
        model, step = self.model, self.model.train_function
        left = itertools.chain([True] * count, itertools.repeat(False))

        def skipping(*arguments: Any) -> Any:
            if next(left):
                return backends.skipped_step(*arguments)
            model.train_function = step
            return step(*arguments)

        model.train_function = skipping


def _compute_dtypes(model: Any) -> set[str]:
    """Names of the precisions that a model's layers compute in, nested ones too."""
    nested = (_compute_dtypes(layer) for layer in model.layers if hasattr(layer, "layers"))
    return {layer.compute_dtype for layer in model.layers}.union(*nested)


def _floating(classifier: keras.Model) -> list[keras.Variable]:
    """A classifier's variables that can be averaged: all but the seeds' states."""
    return [v for v in classifier.variables if keras.backend.is_float_dtype(v.dtype)]


def _wants_rows(loss: Any, labels: Any) -> bool:
    """Whether a loss takes rows of class weights; one of which that is not known, these labels."""
    losses = keras.losses
    if isinstance(loss, losses.CategoricalCrossentropy | losses.CategoricalFocalCrossentropy):
        return True
    if isinstance(loss, losses.SparseCategoricalCrossentropy | SmoothedCrossentropy):
        return False
    shape = np.shape(labels)
    return len(shape) == 2 and shape[1] > 1


def _flat_labels(labels: Tensor) -> Tensor:
    """Labels of shape `(batch, 1)`, as Keras's data sets have them, as `(batch,)`."""
    if len(labels.shape) == 2 and labels.shape[1] == 1:
        return ops.squeeze(labels, axis=1)
    return labels


def _as_weight(sample_weight: Tensor | None, images: Tensor) -> Tensor | None:
    if sample_weight is None:
        return None
    return ops.cast(ops.reshape(sample_weight, (-1,)), images.dtype)


def _first_batch(x: Any, y: Any) -> tuple[tuple[Any, Any] | None, Any]:
    """A few leading images and labels, and `x` with nothing of it consumed."""
    if y is not None:
        return (x[:CHECKED_IMAGES], y[:CHECKED_IMAGES]), x
    if isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    elif hasattr(x, "take"):  # tf.data.Dataset
        batch = next(iter(x.take(1)))
    elif hasattr(x, "__next__"):
        batch = next(x)
        x = (element for element in itertools.chain([batch], x))
    else:
        return None, x
    images, labels, *_ = batch
    return (images[:CHECKED_IMAGES], labels[:CHECKED_IMAGES]), x
