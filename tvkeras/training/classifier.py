"""`RobustClassifier`: trains a plain Keras classifier under a defence."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from tvkeras import backends, checks, contract, inputs
from tvkeras.defenses import Defense, TrainingBatch, Update
from tvkeras.inputs import Bounds
from tvkeras.training import gate, resuming
from tvkeras.training.averaging import Lookahead
from tvkeras.training.recompute import segmented
from tvkeras.training.watch import Guard, Watch, named_errors

Tensor = Any

_trainer = importlib.import_module(f"tvkeras.training.{keras.backend.backend()}")


@keras.saving.register_keras_serializable("tvkeras")
class RobustClassifier(contract.Wrapper, keras.Model):
    """Wraps a classifier so that `fit` minimises a defence's objective.

    The wrapped `classifier` stays a plain Keras model: save it, serve it, load it without
    tvkeras. Images come as float32 in [0, 1], or as uint8, which is divided by 255 on the way
    in; normalisation belongs inside the classifier, so that every radius is in pixel units.
    One with its rescaling inside, as those of `keras.applications`, has bounds=(0, 255) and is
    given images in them; radii, steps and penalties are in units of [0, 1] all the same.

    Args:
        classifier: Maps images `(batch, height, width, channels)` to logits
            `(batch, num_classes)`.
        defense: What training minimises, such as `tvkeras.TVLipschitz()`.
        augmentation: Called as `augmentation(images, seed)` inside the compiled step,
            such as `tvkeras.data.Augmentation()`; None for none.
        seed: Seed of the augmentation's and the defence's random numbers.
        averaging: An average of the weights that training goes on from, such as
            `tvkeras.training.averaging.Lookahead(steps=...)`; None for none.
        ramp_steps: Steps over which the defence's weights grow linearly to their values.
        bounds: Pixel values of black and white in the classifier's images.
        recompute: Whether backward passes compute activations again, for less memory (see
            `tvkeras.training.recompute`).
        **kwargs: `name` and `dtype` of a `keras.Model`.

    Raises:
        ValueError: If the classifier is unbuilt, takes integers or images in other bounds, or
            ends in a softmax; or the defence's step is too small for its precision.

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
        recompute: bool = False,
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
        self.recompute = recompute
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
            **kwargs: As in Keras.

        Raises:
            ValueError: If `loss` is no loss of logits.
        """
        if loss is None:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        gate.check_loss(loss, kwargs.get("loss_weights"))
        optimizer = keras.optimizers.get(optimizer)
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if "float16" in _compute_dtypes(self.classifier) and not scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)
        twin = backends.fast_twin(self.classifier)
        self._call_twin = segmented(twin) if self.recompute else twin.stateless_call

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

        Before each epoch it calls `x.begin_epoch(epoch, first_batch)`, if `x` has that.

        Args:
            x: As in Keras.
            y: As in Keras.
            initial_step: Steps of `initial_epoch` that a checkpoint has done already,
                a multiple of `steps_per_execution`; needs an `x` with `begin_epoch`.
            **kwargs: As in Keras.

        Raises:
            ValueError: If images are not finite floats in the bounds (or uint8) of the
                classifier's shape; labels are not what the loss wants; the outputs are
                probabilities; no gradient reaches the images; or for such an `initial_step`.
        """
        resuming.check(self, x, initial_step)
        gate.check_mirroring(self.augmentation, x)
        if self.averages and not int(ops.convert_to_numpy(self.optimizer.iterations)):
            for average, v in zip(self.averages, _floating(self.classifier), strict=True):
                average.assign(ops.convert_to_numpy(v))  # which may have been loaded since
        x, y = gate.admitted(self, self.loss, x, y)
        first, x = gate.first_batch(x, y)
        if first is not None:
            images, labels = first
            images, _ = gate.admitted(self, self.loss, images, labels, ("images", "labels"))
            if contract.are_probabilities(ops.convert_to_numpy(self(images, training=False))):
                raise contract.probabilities_error()
            if initial_step:  # the metrics' sums so far need variables to be assigned to
                self.compute_metrics(images, labels, self(images), None)
        validation = kwargs.get("validation_data")
        if isinstance(validation, tuple | list) and len(validation) > 1:
            x_val, y_val, *weights = validation
            names = "validation_data[0]", "validation_data[1]"
            checked = gate.admitted(self, self.loss, x_val, y_val, names)
            kwargs["validation_data"] = (*checked, *weights)
        own: list[keras.callbacks.Callback] = [Guard()]
        if hasattr(x, "begin_epoch"):
            own.append(resuming.EpochStarter(x, initial_step))
        kwargs["callbacks"] = [*own, *keras.tree.flatten(kwargs.get("callbacks") or [])]
        with named_errors():
            return super().fit(x, y, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, **kwargs: Any) -> Any:
        """Loss and metrics as `keras.Model.evaluate`, of images and labels that are checked.

        Raises:
            ValueError: As `fit`, of images and labels.
        """
        callbacks = kwargs.get("callbacks")
        if not isinstance(callbacks, keras.callbacks.CallbackList):  # else `fit` asks
            x, y = gate.admitted(self, self.loss, x, y)
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
        """One optimizer step, as the backend's trainer calls it."""
        return _trainer.train_step(self, *arguments)

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
        buffers = self.classifier.non_trainable_variables
        images = self._as_images(images)
        if sample_weight is not None:
            sample_weight = ops.cast(ops.reshape(sample_weight, (-1,)), images.dtype)
        loss_scale, strength = self.optimizer.scale_loss(1.0), self._strength(images.dtype)
        step = ops.convert_to_tensor(self.optimizer.iterations)
        scope = keras.StatelessScope(zip(self.non_trainable_variables, non_trainable, strict=True))
        state = [scope.get_current_value(variable) for variable in buffers]

        def call(trainable: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Any, Tensor]:
            native = self.bounds.native(images)
            logits, new_state, losses = self._call_twin(
                trainable, state, native, training=True, return_losses=True
            )
            return logits, new_state, sum(losses) if losses else 0.0

        with scope:
            if self.augmentation is not None:
                images = self.augmentation(images, self.random)
            batch = TrainingBatch(
                call=call,
                example_loss=self.loss.call,
                trainable=trainable,
                images=images,
                labels=_flat_labels(labels),
                sample_weight=sample_weight,
                loss_scale=loss_scale,
                stochastic=any("seed_generator_state" in variable.path for variable in buffers),
                seed=self.random,
                strength=strength,
                step=step,
            )
            update = self.defense.update(batch)
        for variable, value in zip(buffers, update.state, strict=True):
            scope.add_update((variable, value))
        return update, [scope.get_current_value(v) for v in self.non_trainable_variables]

    def average_weights(self) -> None:
        """After a step, moves the averages and sets the weights to them, if there are any."""
        if self.averaging is None:
            return
        step = ops.convert_to_tensor(self.optimizer.iterations)
        variables = (_floating(self.classifier), self.averages)
        weights, averages = ([ops.convert_to_tensor(v) for v in group] for group in variables)
        averaged = self.averaging(step, weights, averages)
        for group, values in zip(variables, averaged, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)

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
            "recompute": self.recompute,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RobustClassifier":
        """The inverse of `get_config`."""
        parts = {name: config[name] for name in ("classifier", "defense")}
        parts |= {name: config[name] for name in ("augmentation", "averaging") if config[name]}
        return cls(**{**config, **keras.saving.deserialize_keras_object(parts)})

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


def _compute_dtypes(model: Any) -> set[str]:
    """Names of the precisions that a model's layers compute in, nested ones too."""
    nested = (_compute_dtypes(layer) for layer in model.layers if hasattr(layer, "layers"))
    return {layer.compute_dtype for layer in model.layers}.union(*nested)


def _floating(classifier: keras.Model) -> list[keras.Variable]:
    """A classifier's variables that can be averaged: all but the seeds' states."""
    return [v for v in classifier.variables if keras.backend.is_float_dtype(v.dtype)]


def _flat_labels(labels: Tensor) -> Tensor:
    """Labels of shape `(batch, 1)`, as Keras's data sets have them, as `(batch,)`."""
    if len(labels.shape) == 2 and labels.shape[1] == 1:
        return ops.squeeze(labels, axis=1)
    return labels
