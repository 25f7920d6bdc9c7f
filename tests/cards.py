"""Trials, results and cards that several tests of evaluation share."""

import csv

import keras
import numpy as np

import tvkeras
from tvkeras import attacks, evaluation
from tvkeras.evaluation import card, page, reports
from tvkeras.evaluation.trials import Trial

PGD = Trial(
    name="PGD",
    attack=attacks.ProjectedGradient(norm="l2", steps=5),
    epsilons=(0.25, "1/2"),
    images=30,
)
DDN = Trial(name="DDN", attack=attacks.DecoupledDirectionNorm(steps=20))
BRIEF = {"suite": [attacks.ProjectedGradient(steps=2)], "audited_images": 0, "corruptions": False}


def brief(classifier, images, labels, **settings):
    settings = {"norm": "l2", "epsilons": (0.1,), **BRIEF, **settings}
    return tvkeras.benchmark(classifier, images, labels, **settings)


def table(output):
    with open(output / "examples.csv") as file:
        return list(csv.DictReader(file))


def result(distances):
    distance = np.array(distances)
    return attacks.AttackResult(
        x_adv=np.zeros((len(distances), 1, 1, 1)),
        success=np.isfinite(distance),
        distance=distance,
        queries=np.ones(len(distances), int),
    )


def attack_report(name, count=40, **changes):
    content = {
        "settings": "",
        "norm": "l2",
        "error": {"1/2": reports.rate(np.arange(count) < 30)},
        "median_distance": None,
        "median_queries": 20.0,
    }
    return card.AttackReport(name=name, **{**content, **changes})


def by_hand(**changes):
    """A card that nothing was measured for."""
    share = reports.rate(np.arange(40) < 10)
    check = evaluation.Check("unbounded", "fail", None, "No good.")
    audit = card.AuditReport(
        norm="l2", verdict="unreliable", images=40, surrogate=None, checks=(check,)
    )
    detection = card.DetectionReport(
        statistic="loss",
        threshold=0.5,
        held_out_images=99,
        false_positive_rate=share,
        detected={"PGD": share, "evasive": share},
        at={"PGD": {"0.01": 0.3}},
        median_distance={"PGD": 1.0, "evasive": 1.5},
        evasive_success=share,
    )
    content = {
        "name": 'the "first": one',
        "command": "python -m tvkeras.evaluate",
        "model": {"model": "m", "model_arguments": {}, "num_classes": 10, "parameters": 1234},
        "training": {
            "defense": keras.saving.serialize_keras_object(tvkeras.Undefended()),
            "dataset": "digits",
            "epochs": 3,
        },
        "dataset": "digits test",
        "seed": 7,
        "clean_error": share,
        "gradient_norms": {name: {"mean": 1.0, "max": 2.0} for name in ("loss", "model")},
        "attacks": (),
        "worst_case": (
            card.WorstCase(
                norm="l2", clean_error=share, error={"1/2": share}, median_distance=None
            ),
        ),
        "audit": (audit,),
        "detection": (detection,),
        "bounds": (),
        "figures": {},
        "versions": {},
    }
    return card.Card(**{**content, **changes})


def assert_page_is_its_card(folder):
    """The page is what the card beside it renders to, and its figures are there."""
    found = card.Card.from_json((folder / "card.json").read_text())
    assert page.render(found) == (folder / "README.md").read_text()
    for file in found.figures.values():
        assert (folder / file).exists()
