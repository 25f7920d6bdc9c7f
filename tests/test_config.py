import dataclasses
import pathlib

import gin
import pytest
from absl import flags

import tvkeras
from tests.conftest import BACKEND, net
from tvkeras import checks, config, train
from tvkeras.defenses import Defense
from tvkeras.evaluation import trials
from tvkeras.evaluation.benchmark import benchmark
from tvkeras.evaluation.certified import Certification
from tvkeras.evaluation.detecting import Detection

EVALUATIONS = sorted(pathlib.Path("gin").glob("evaluate_*.gin"))
SUITES = sorted(pathlib.Path("gin").glob("suite_*.gin"))
EXPERIMENTS = sorted(set(pathlib.Path("gin").glob("*_*.gin")) - {*EVALUATIONS, *SUITES})


def bound(name):
    return gin.query_parameter(name)


def test_importing_defines_no_flag():
    assert train.main
    assert not {"gin_file", "gin_param", "run_dir", "dry_run"} & set(flags.FLAGS)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["gin/fast.gin"],
        ["gin/fast.gin", "gin/branch.gin"],
        ["gin/airbench.gin", "gin/branch.gin"],
    ],
    ids=lambda more: str(len(more)),
)
def test_every_experiment_binds(path, more):
    config.bind([str(path), *more])
    defense = bound("Recipe.defense").scoped_configurable_fn()
    assert isinstance(defense, Defense)
    shortest = net(dtype="mixed_bfloat16")  # what "auto" may choose
    tvkeras.RobustClassifier(shortest, defense)  # refuses a step too short for it


@pytest.mark.parametrize("path", EVALUATIONS, ids=str)
@pytest.mark.parametrize("more", [None, *SUITES], ids=str)
def test_every_evaluation_binds_with_every_suite(path, more):
    config.configurable(benchmark, (Certification, Detection, *trials.library_attacks()))
    config.bind([str(path), *([str(more)] if more else []), "gin/certify.gin"])
    parts = bound("benchmark.suite") if more else "quick"
    parts = [parts] if isinstance(parts, str) else parts

    def suite():
        own = [p if isinstance(p, str) else p.scoped_configurable_fn() for p in parts]
        given = bound("benchmark.epsilons").items()
        return trials.chosen(own, {norm: [*map(checks.epsilon, radii)] for norm, radii in given})

    if BACKEND != "tensorflow" and more and more.stem in ("suite_talk", "suite_zoo"):
        with pytest.raises(ValueError, match=r"cannot be had: .*KERAS_BACKEND=tensorflow"):
            suite()
    else:
        assert len(suite()) >= 2
    assert f"python -m tvkeras.evaluate --gin_file={path}" in path.read_text()


def test_the_command_line_wins_over_files():
    config.bind(
        ["gin/cifar_tv.gin", "gin/fast.gin"], ["Recipe.epochs=3", "TVLipschitz.tv_weight='8/255'"]
    )
    assert bound("Recipe.epochs") == 3
    assert bound("TVLipschitz.tv_weight") == "8/255"
    assert bound("Network.name") == "resnext34"


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("trian.epochs=3", "No configurable matching 'trian'"),
        ("Recipe.epoch=3", "doesn't have a parameter named 'epoch'"),
        ("Recipe.defense=@TVLipshitz()", "No configurable matching reference"),
        ("EPOCHS=3", r"nothing reads the macros \['EPOCHS'\]"),
        ("Recipe.epochs=%EPOCHS", "EPOCHS"),
        ("Recipe.epochs=three", "three"),
        ("Recipe.epochs==3", "parse"),
    ],
)
def test_a_mistyped_setting_stops_with_the_legal_ones(binding, message):
    with pytest.raises(config.ConfigError, match=message) as caught:
        config.bind([], [binding])
    assert "TVLipschitz: norm, tv_weight, lipschitz_weight" in str(caught.value)
    assert "Recipe: defense, augmentation" in str(caught.value)


def test_a_missing_file_lists_those_there_are():
    with pytest.raises(config.ConfigError, match=r"'gin/cifar.gni' does not exist; .*cifar_tv"):
        config.bind(["gin/cifar.gni"])


def test_a_bad_value_is_refused_when_it_is_used():
    config.bind(["gin/digits_tv_lip.gin"], ["TVLipschitz.tv_weight='a lot'"])
    with pytest.raises(ValueError, match="tv_weight must be a number or a fraction"):
        config.settings()


def test_the_listing_holds_all_settings_and_is_gin(tmp_path):
    config.bind(["gin/digits_tv_lip.gin"], ["Recipe.epochs=7"])
    text = config.listing()
    lines = text.splitlines()
    assert "Recipe.epochs = 7" in lines
    assert "# Recipe.ramp = 0.0" in lines
    assert not any(line.startswith("# Recipe.epochs") for line in lines)
    everything = [line.removeprefix("# ") for line in lines if " = " in line]
    config.bind([], everything)  # every line is a binding
    (tmp_path / "listed.gin").write_text(text.replace("# Recipe.ramp = 0.0", "Recipe.ramp = 0.5"))
    config.bind(["gin/digits_tv_lip.gin"], ["Recipe.epochs=7"])
    before = config.settings()["recipe"]
    config.bind([str(tmp_path / "listed.gin")])
    assert config.settings()["recipe"] == dataclasses.replace(before, ramp=0.5)
