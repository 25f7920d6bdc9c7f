import dataclasses
import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import tvkeras
from tests.conftest import BACKEND, ROOT, full_disk, random_images
from tests.zoo_server import ARGUMENTS, index_of, start
from tvkeras import checkpoint, models, runs, zoo
from tvkeras.evaluation.card import AttackReport, Card, Rate
from tvkeras.runs import Run
from tvkeras.zoo import __main__ as command
from tvkeras.zoo import exporting, publishing, store

PUBLISHED = ROOT / "zoo" / "digits_tv_lip"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The empty zoo of a checkout."""
    (tmp_path / "index.json").write_text("{}")
    monkeypatch.setattr(store, "INDEX", tmp_path / "index.json")
    monkeypatch.setattr(store, "CHECKOUT", tmp_path / "zoo")
    return tmp_path / "zoo"


@pytest.fixture
def run(tmp_path):
    """An evaluated run: that of a published entry."""
    folder = shutil.copytree(PUBLISHED, tmp_path / "run")
    shutil.copytree(folder, folder / "evaluation")
    return Run.open(folder)


def test_a_published_run_is_a_whole_entry(run, checkout, tmp_path, capsys):
    (run.folder / "evaluation" / "more.png").write_bytes(b"")
    before = sorted(run.folder.rglob("*"))
    link = tmp_path / "link"
    link.symlink_to(run.folder)  # the folder itself may be one
    assert publishing.publish(link, "small") == checkout / "small"
    assert sorted(run.folder.rglob("*")) == before
    assert zoo.names() == ["small"]
    assert [path.name for path in checkout.iterdir()] == ["small"]
    names = {path.name for path in PUBLISHED.iterdir()}
    assert {path.name for path in (checkout / "small").iterdir()} == names
    card = zoo.card("small")
    assert card == dataclasses.replace(
        Card.from_json((PUBLISHED / "card.json").read_text()), name="small"
    )
    loaded, images = zoo.load("small"), random_images(3)
    np.testing.assert_array_equal(loaded(images), run.classifier()(images))
    assert zoo.detector("small").threshold == card.detection[0].threshold
    with pytest.raises(ValueError, match="statistic must be one of"):
        zoo.detector("small", "logits")

    for arguments in (["list"], ["show", "small"]):
        command.main(["zoo", *arguments])
    printed = capsys.readouterr().out
    assert "checkout" in printed
    assert 'tvkeras.zoo.load("small")' in printed


def test_verification_notices_other_files_and_other_logits(run, checkout, capsys):
    def exit_code():
        with pytest.raises(SystemExit) as ended:
            command.main(["zoo", "verify"])
        return ended.value.code

    entry = publishing.publish(run.folder, "small")
    assert exit_code() == 0
    with np.load(entry / "probe.npz") as probe:
        assert probe["images"].dtype == np.uint8
        assert probe["logits"].shape == (8, 10)
        wrong = {**probe, "logits": probe["logits"] + 2e-4}
    np.savez(entry / "probe.npz", **wrong)
    with pytest.raises(checkpoint.DamagedError, match=r"probe\.npz is not the published file"):
        zoo.verify("small")
    store.INDEX.write_text(json.dumps({"small": index_of(entry)}))
    with pytest.raises(checkpoint.CheckpointError, match=r"differ by 0\.0002, more than 0\.0001"):
        zoo.verify("small")
    assert exit_code() == 1
    assert "small: FAILED: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_other_backend_computes_the_published_logits(tmp_path):
    other = {"tensorflow": "jax", "jax": "tensorflow"}[BACKEND]
    code = f"""
store.INDEX, store.CHECKOUT = map(pathlib.Path, {(str(store.INDEX), str(store.CHECKOUT))!r})
tvkeras.zoo.verify({PUBLISHED.name!r})
"""
    process = start(tmp_path, code, other)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def test_what_cannot_be_published(run, checkout, monkeypatch):
    for name, message in (("../digits", "lower-case letters"), ("small", "lacks .*card.json")):
        if name == "small":
            (run.folder / "evaluation" / "card.json").unlink()
        with pytest.raises(ValueError, match=message):
            publishing.publish(run.folder, name)
    shutil.copy(PUBLISHED / "card.json", run.folder / "evaluation")
    runs.save_float16(models.build("small_cnn", 10, **ARGUMENTS), run.weights_path)
    with pytest.raises(ValueError, match="measured on other weights"):
        publishing.publish(run.folder, "small")
    assert not checkout.exists()

    shutil.copy(PUBLISHED / "best.weights.h5", run.weights_path)
    publishing.publish(run.folder, "small")
    with pytest.raises(ValueError, match="'small' exists and stays as it is"):
        publishing.publish(run.folder, "small")
    shutil.copytree(run.folder, checkout / "other")
    with pytest.raises(ValueError, match="is no zoo entry"):
        publishing.publish(checkout / "other", "other")
    monkeypatch.setattr(store, "CHECKOUT", None)
    with pytest.raises(OSError, match="in a checkout"):
        publishing.publish(run.folder, "new")


@pytest.mark.parametrize(
    "file", ["/etc/hostname", "../run.json", "../../secret.png", "card.json", "best.weights.h5"]
)
def test_files_that_are_no_figures_are_not_published(run, checkout, file):
    path = run.folder / "evaluation" / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "figures": {"a": file}}))
    (run.folder.parent / "secret.png").write_bytes(b"secret")
    with pytest.raises(ValueError, match="figures must be files beside the card"):
        publishing.publish(run.folder, "small")
    assert not checkout.exists()


@pytest.mark.parametrize(
    "file", ["config.gin", "evaluation/distances.png", "evaluation/examples.csv", "evaluation"]
)
def test_links_and_pipes_are_not_published(run, checkout, file):
    path = run.folder / file
    path.rename(checkout.parent / path.name)
    path.symlink_to(checkout.parent / path.name)
    with pytest.raises(ValueError, match=f"must hold its files itself, and .*{file}"):
        publishing.publish(run.folder, "small")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"lacks .*{file}"):
        publishing.publish(run.folder, "small")
    assert not checkout.exists()


def test_publishing_that_fails_leaves_no_entry(run, checkout):
    with full_disk(), pytest.raises(OSError, match="File too large"):
        publishing.publish(run.folder, "small")
    assert not list(checkout.iterdir())
    assert not zoo.names()


# ---- Other forms -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """A published entry as a folder for Hugging Face."""
    return exporting.package(PUBLISHED.name, tmp_path_factory.mktemp("packaged"))


@pytest.fixture
def package(packaged, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(packaged, tmp_path / "package")


def test_a_packaged_entry_is_read_by_keras_and_by_us(packaged):
    images = random_images(3)
    expected = zoo.load(PUBLISHED.name)(images)
    for model in (
        zoo.load(packaged),
        zoo.load(str(packaged)),
        keras.saving.load_model(packaged / "model.keras"),
        keras.saving.load_model(packaged),  # what Keras does after the download from hf://
    ):
        np.testing.assert_array_equal(model(images), expected)
    assert zoo.card(packaged) == zoo.card(PUBLISHED.name)
    metadata = (packaged / "README.md").read_text().split("---\n")[1]
    for line in ("license: apache-2.0", "library_name: keras", "datasets: [digits]"):
        assert line in metadata.splitlines()
    with pytest.raises(ValueError, match="output must be a new or empty folder"):
        exporting.package(PUBLISHED.name, packaged)


@pytest.mark.slow
def test_a_packaged_entry_is_read_from_a_hub(packaged):
    pytest.importorskip("huggingface_hub")
    command = [sys.executable, "-m", "tests.hub_server", str(packaged), PUBLISHED.name]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("file", ["model.keras", "hashes.json"])
def test_a_package_that_lacks_a_file_or_links_elsewhere_is_refused(package, tmp_path, file):
    (package / file).rename(tmp_path / file)
    with pytest.raises(checkpoint.DamagedError, match=f"holds the file {file} itself"):
        zoo.load(package)
    (package / file).symlink_to(tmp_path / file)
    with pytest.raises(checkpoint.DamagedError, match=f"holds the file {file} itself"):
        zoo.load(package)


@pytest.mark.parametrize("hashes", ["", "[]", '{"model.keras": 1}', "{}", "[" * 100_000])
def test_a_package_of_other_hashes_is_refused(package, hashes):
    (package / "hashes.json").write_text(hashes)
    with pytest.raises(checkpoint.DamagedError, match=r"hashes\.json"):
        zoo.load(package)


def test_a_package_with_another_model_or_code_is_refused(package):
    path = package / "model.keras"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(checkpoint.DamagedError, match=r"is not the packaged file: .*found \d+"):
        zoo.load(package)
    about = store.File.of(path.read_bytes())._asdict()
    (package / "hashes.json").write_text(json.dumps({"model.keras": about}))
    with pytest.raises(checkpoint.CheckpointError, match="is not loaded"):
        zoo.load(package)
    images = keras.Input((8, 8, 1))
    keras.Model(images, keras.layers.Lambda(lambda x: x)(images)).save(path)
    about = store.File.of(path.read_bytes())._asdict()
    (package / "hashes.json").write_text(json.dumps({"model.keras": about}))
    with pytest.raises(checkpoint.CheckpointError, match="is not loaded"):
        zoo.load(package)


def test_model_infos_hold_figures_of_autoattack_alone(tmp_path):
    plain = zoo.card(PUBLISHED.name)
    rate = Rate(value=0.25, low=0.2, high=0.3, n=1000)
    reports = [
        AttackReport(
            name=name,
            settings=settings,
            norm="linf",
            error={"8/255": rate},
            median_distance=None,
            median_queries=1.0,
        )
        for name, settings in (
            ("AutoAttack linf", str(tvkeras.attacks.AutoAttack(norm="linf"))),
            ("custom suite linf", "custom, without the targeted ratio"),
        )
    ]
    with_figure = dataclasses.replace(plain, name="measured", attacks=tuple(reports))
    custom = dataclasses.replace(plain, name="custom", attacks=tuple(reports[1:]))
    assert exporting.robustbench([with_figure, custom], tmp_path) == ["custom"]
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert path == tmp_path / "digits" / "Linf" / "measured.json"
    info = json.loads(path.read_text())
    assert (info["eps"], info["autoattack_acc"]) == ("8/255", "75.00")
    assert info["clean_acc"] == f"{100 * (1 - plain.clean_error.value):.2f}"


@pytest.mark.parametrize("name", zoo.names())
def test_the_published_entries_are_whole(name):
    assert zoo.verify(name) <= 1e-4
