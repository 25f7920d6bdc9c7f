"""What the command evaluates: a run, or a classifier that Keras saved, on a known data set."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from tvkeras import data
from tvkeras.evaluation import suite
from tvkeras.evaluation.benchmark import Twin
from tvkeras.evaluation.card import Card
from tvkeras.runs import Run

# Of `run.json`: what cards repeat; without these a run is not finished.
MODEL_ENTRIES = ("model", "model_arguments", "num_classes", "parameters")
TRAINING_ENTRIES = ("defense", "dataset", "epochs", "data_sha256")
COST_ENTRIES = ("passes_per_step", "training_pflop", "train_seconds")  # where they were written
RUN_ENTRIES = {*MODEL_ENTRIES, *TRAINING_ENTRIES, "validation_fraction", "results"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A classifier, its test images, and what a card says of it besides figures.

    Attributes:
        classifier: The classifier.
        name: What to call it.
        test: The images to attack.
        held_out_images: Training images that it was not trained on; None if unknown.
        model: Entries of the card's `model`; none if nothing else is known of it.
        training: The card's `training`.
    """

    classifier: keras.Model
    name: str
    test: data.Examples
    held_out_images: np.ndarray | None = None
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: pathlib.Path, dataset: str | None = None, split: str = "test") -> "Subject":
        """What is in a run folder, or a `.keras` file.

        Args:
            model: The folder or file.
            dataset: Of the test images; by default the run's.
            split: Of the data set.

        Raises:
            ValueError: For a folder that is no finished run, a file that is no model, or a
                file without a data set.
            tvkeras.data.DataNotFoundError: If the data is not on this machine.
        """
        if model.suffix == ".keras":
            if dataset is None:
                raise ValueError(f"--dataset must name the test images of {model}: cifar10, ...")
            classifier = keras.saving.load_model(model, compile=False)
            return cls(classifier=classifier, name=model.stem, test=data.load(dataset, split))
        run = Run.open(model)
        about = run.about
        if missing := RUN_ENTRIES - about.keys():
            raise ValueError(
                f"{run.about_path} lacks {sorted(missing)}: the run is not finished, or of an "
                "older tvkeras."
            )
        size = about.get("image_size")
        training = data.load(about["dataset"], "train", image_size=size)
        facts = {"weights_sha256": hashlib.sha256(run.weights_path.read_bytes()).hexdigest()}
        return cls(
            classifier=run.classifier(),
            name=model.resolve().name,
            test=data.load(dataset or about["dataset"], split, image_size=size),
            held_out_images=data.held_out(training, about["validation_fraction"])[1].images,
            model={key: about[key] for key in MODEL_ENTRIES} | facts,
            training={key: about[key] for key in (*TRAINING_ENTRIES, *COST_ENTRIES) if key in about}
            | {"defense": keras.saving.serialize_keras_object(run.defense)},
        )

    @property
    def dataset(self) -> str:
        """What a card calls the test images."""
        return f"{self.test.name} {self.test.split}"

    def evaluated(
        self, benchmark: Callable[..., Card], output: pathlib.Path, *, command: str, **settings: Any
    ) -> Card:
        """The card, with what is known of the model, saved in a folder.

        Args:
            benchmark: `tvkeras.benchmark`, or the same with settings bound.
            output: The folder; an interrupted call goes on with what is in it.
            command: What to state in the card as its origin.
            **settings: Arguments of `benchmark`.

        Raises:
            ValueError: As `benchmark`.
        """
        card = benchmark(
            self.classifier,
            self.test.images,
            self.test.labels,
            held_out_images=self.held_out_images,
            name=self.name,
            dataset=self.dataset,
            resume_dir=output / "attacks",
            **settings,
        )
        model = {**card.model, **self.model}
        training = dict(self.training)
        card = dataclasses.replace(card, model=model, training=training, command=command)
        card.save(output)
        return card


def twin(folder: pathlib.Path, dataset: str) -> Twin:
    """The evaluated model in a folder, to stand beside one of the same test images.

    Args:
        folder: An evaluation, such as the undefended network's. If its run is there or in
            the folder around it, its adversarial images can be tried, too.
        dataset: What the card calls the test images.

    Raises:
        ValueError: If it is no evaluation, or on other images.
    """
    path, table = folder / "card.json", folder / "examples.csv"
    if not path.exists() or not table.exists():
        raise ValueError(
            "twin must be the folder of an evaluation, with card.json and examples.csv, got "
            f"{str(folder)!r}. Evaluate that run first; its folder is <run>/evaluation."
        )
    about = json.loads(path.read_text())
    if about["dataset"] != dataset:
        raise ValueError(f"twin must be evaluated on {dataset!r}, got one on {about['dataset']!r}.")
    near = (folder, folder.resolve().parent)  # a zoo entry, or a run's evaluation
    found = [run for run in map(Run, near) if run.about]
    return Twin(
        name=about["name"],
        classifier=Run.open(found[0].folder).classifier() if found else None,
        distances=suite.read_worst_cases(table),
    )
