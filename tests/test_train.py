import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import tvkeras
from tests.conftest import BACKEND
from tvkeras import checkpoint, config, data, runs
from tvkeras.training import schedules
from tvkeras.training.loop import plan, train

SMALL = [
    "Recipe.epochs=2",
    "Network.arguments={'width': 4}",
    "Task.epsilons=(0.5,)",
    "Task.attacked_images=60",
]


BINDINGS = (
    "Recipe.augmentation=@Augmentation()",
    "Augmentation.cutout=2",
    "Execution.checkpoint_steps=20",
)


def settings(*bindings, file="gin/digits_tv_lip.gin"):
    config.bind([file], [*SMALL, *bindings])
    return config.settings()


def run(run_dir, *bindings, **arguments):
    return train(run_dir, **settings(*bindings, **arguments), configuration=config.operative)


def log(run_dir):
    with open(run_dir / "log.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, with the card it returned; its settings are `BINDINGS`."""
    folder = tmp_path_factory.mktemp("finished")
    return runs.Run(folder), run(folder, *BINDINGS)


def test_a_run_leaves_a_complete_folder(finished):
    one, card = finished
    results = one.about["results"]
    assert results["clean_error"] == card.clean_error.value
    assert results["pgd_error"] == {"0.5": card.worst_case[0].error["0.5"].value}
    assert one.about["seed"] == 0
    assert one.defense == tvkeras.TVLipschitz(tv_weight=1.0, lipschitz_weight=0.1, fd_step=0.5)
    sums = {split: data.load("digits", split).checksum for split in ("train", "test")}
    assert one.about["data_sha256"] == sums
    assert one.about["versions"]["backend"] == BACKEND
    assert "Recipe.epochs = 2" in one.config_path.read_text()
    assert "one_cycle.warmup = 0.2" in one.config_path.read_text()  # a default
    rows = log(one.folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"loss", "val_accuracy", "total_variation", "lipschitz", "learning_rate"} <= set(rows[0])
    assert one.tensorboard_path.exists() == (BACKEND == "tensorflow")


def assert_half_size_and_as_reported(one, card):
    assert keras.config.dtype_policy().name == "float32"
    classifier = runs.Run.open(one.folder).classifier()
    for weights in classifier.get_weights():
        assert weights.dtype == "float32"
        np.testing.assert_array_equal(weights, weights.astype("float16").astype("float32"))
    test = data.load("digits", "test")
    logits = classifier.predict(test.images.astype("float32") / 255, verbose=0)
    wrong = logits.argmax(axis=1) != test.labels
    assert card.clean_error.value == pytest.approx(wrong.mean())
    assert card.worst_case[0].clean_error.value == pytest.approx(wrong[:60].mean())


def test_the_published_weights_are_half_size_and_give_what_is_reported(finished):
    assert_half_size_and_as_reported(*finished)


@pytest.mark.slow
def test_a_run_in_low_precision_publishes_such_weights_too(tmp_path):
    card = run(tmp_path, "Execution.precision='mixed_bfloat16'")
    assert_half_size_and_as_reported(runs.Run(tmp_path), card)


def test_a_run_goes_on_where_it_stopped(finished, tmp_path):
    """From the checkpoint after the first epoch the second is the same, to the last bit."""
    whole, parts = finished[0], runs.Run(tmp_path / "parts")
    shutil.copytree(whole.folder, parts.folder)
    os.replace(parts.previous_checkpoint_path, parts.checkpoint_path)
    parts.log_path.unlink()
    keras.utils.set_random_seed(123)
    run(parts.folder, *BINDINGS)
    assert parts.log_path.read_text() == whole.log_path.read_text()
    found, expected = (checkpoint.load(one.checkpoint_path)[0] for one in (parts, whole))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_another_configuration_in_the_folder_is_refused_with_the_difference(finished):
    with pytest.raises(ValueError, match=r"-Recipe.batch_size = 64\n\+Recipe.batch_size = 32"):
        run(finished[0].folder, *BINDINGS, "Recipe.batch_size=32")


def test_what_gin_does_not_know_is_compared_too(tmp_path):
    config = "Recipe.seed = 0"
    runs.Run(tmp_path).claim(config, {"backend": "jax", "shape": (8, 8), "data_sha256": "1"})
    runs.Run(tmp_path).claim(config, {"backend": "jax", "shape": (8, 8), "data_sha256": "1"})
    with pytest.raises(ValueError, match=r"another configuration:\n-data_sha256 = 1\n\+.* = 2\n"):
        runs.Run(tmp_path).claim(config, {"backend": "jax", "shape": (8, 8), "data_sha256": "2"})


def test_how_a_run_is_measured_may_change(tmp_path):
    before = "# Parameters for Task:\nTask.norm = 'l2'\n"
    long = "Task.epsilons = \\\n    (0.1,\n     0.2)\n"
    for more in ("", long, "Task.attacked_images = 100\n# Parameters for Execution:\n"):
        runs.Run(tmp_path).claim(before + more, {})
    with pytest.raises(ValueError, match=r"-Task.norm = 'l2'\n\+Task.norm = 'linf'\n"):
        runs.Run(tmp_path).claim(before.replace("l2", "linf") + long, {})


def test_other_versions_are_said_and_kept(tmp_path, monkeypatch):
    runs.Run(tmp_path).claim("", {})
    now = runs.versions()
    monkeypatch.setattr(runs, "versions", lambda: {**now, "keras": "4.0"})
    with pytest.warns(UserWarning, match=r"begun with .* goes on with .*'keras': '4.0'"):
        runs.Run(tmp_path).claim("", {})
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["versions"]["keras"] == "4.0"
    assert described["earlier_versions"] == [now]


@pytest.mark.parametrize(
    "defense", [tvkeras.Undefended(), tvkeras.TVLipschitz(norm="linf", tv_weight="8/255")], ids=str
)
def test_the_defence_of_a_run_returns(defense, tmp_path):
    run = runs.Run(tmp_path)
    run.describe(defense=keras.saving.serialize_keras_object(defense))
    assert run.defense == defense
    run.describe(defense=str(defense))
    with pytest.raises(ValueError, match=r"run\.json names no defence"):
        _ = run.defense


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"3", b"\xff\xfe{}", b"[" * 100_000])
def test_a_damaged_description_names_its_file(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "best.weights.h5").write_bytes(b"")
    for use in (
        lambda: runs.Run.open(tmp_path).classifier(),
        lambda: runs.Run(tmp_path).claim("", {}),
    ):
        with pytest.raises(checkpoint.DamagedError, match=r"run\.json is damaged: .*Restore it"):
            use()


@pytest.mark.parametrize("entry", [{"model": 3}, {"model_arguments": 3}, {"num_classes": "ten"}])
def test_a_description_of_no_network_names_its_file(entry, tmp_path):
    about = {"model": "small_cnn", "num_classes": 10, "model_arguments": {"width": 4}}
    (tmp_path / "run.json").write_text(json.dumps({**about, **entry}))
    (tmp_path / "best.weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"run\.json describes no network"):
        runs.Run.open(tmp_path).classifier()


def test_the_plan_of_a_run():
    found = plan(**settings())
    assert found["steps_per_epoch"] == 20
    assert found["steps"] == 40
    assert found["parameters"] == tvkeras.models.build("small_cnn", 10, width=4).count_params()
    assert found["passes_per_step"] == 2
    assert found["seconds_per_epoch"] > 0


def test_a_lost_loss_stops_with_its_circumstances(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"loss is (nan|inf) .* learning rate .* No checkpoint yet"
    ):
        run(tmp_path, "one_cycle.learning_rate=1e30", "one_cycle.warmup=0.0")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Recipe.epochs='3'", "epochs must be a whole number"),
        ("Network.name='resnext35'", "Did you mean 'resnext34'"),
        ("Recipe.batch_size=5000", "batch_size must be <= 1293"),
        ("Task.validation_fraction=1.0", "fraction must be a number"),
        ("Task.norm='L2'", "Did you mean 'l2'"),
        ("Task.epsilons=(0.5)", "epsilons must be a tuple"),
        ("Task.epsilons=()", "epsilons must hold a radius above 0"),
        ("Task.epsilons=('a',)", "epsilons must be a number or a fraction"),
        ("Task.attacked_images=0", "attacked_images must be a whole number >= 1"),
        ("Network.arguments={'wdth': 4}", "Did you mean 'width'"),
        (
            "Execution.precision='bfloat16'",
            "precision must be one of .*Did you mean 'mixed_bfloat16'",
        ),
    ],
)
def test_bad_settings_stop_before_training(binding, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", binding)
    assert not (tmp_path / "run").exists()


def test_schedules_fit_any_length():
    for steps in (10, 1000):
        decay = schedules.step_decay(steps, learning_rate=0.1)
        rates = [float(decay(step)) for step in (0, round(0.45 * steps), round(0.7 * steps), steps)]
        np.testing.assert_allclose(rates, [0.1, 0.02, 0.004, 0.0008], rtol=1e-5)
        cycle = schedules.one_cycle(steps, learning_rate=0.5, warmup=0.2)
        rates = [float(cycle(step)) for step in (0, round(0.2 * steps), steps)]
        np.testing.assert_allclose(rates, [0, 0.5, 0], atol=1e-6)
    with pytest.raises(ValueError, match="factors must have one entry more"):
        schedules.step_decay(10, boundaries=(0.5,))


@pytest.mark.slow
def test_the_command_trains_a_run(tmp_path):
    command = [sys.executable, "-m", "tvkeras.train", "--gin_file=gin/digits_undefended.gin"]
    command += [*(f"--gin_param={line}" for line in SMALL), f"--run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2" in done.stdout
    assert f"run folder: {tmp_path / 'run'}" in done.stdout


@pytest.mark.slow
def test_a_streamed_data_set_trains(synthetic, monkeypatch, tmp_path):
    monkeypatch.setattr(data.arrays, "prepared_builder", lambda name, download=False: synthetic)
    card = run(
        tmp_path,
        "Network.name='small_cnn'",
        "Network.arguments={'width': 4}",
        "Task.image_size=8",
        "Recipe.batch_size=16",
        "Execution.precision='mixed_bfloat16'",
        "TVLipschitz.fd_step=0.1",
        "Task.attacked_images=10",
        file="gin/imagenet_tv.gin",
    )
    assert card.clean_error.n == 20
    assert len(log(tmp_path)) == 2
    assert pathlib.Path(tmp_path / "best.weights.h5").exists()
