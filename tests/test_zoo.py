import concurrent.futures
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from absl import app

import tvkeras
from tests import zoo_server
from tests.conftest import BACKEND, ROOT, full_disk, random_images
from tests.zoo_server import ARGUMENTS, index_of, start
from tvkeras import checkpoint, models, runs, zoo
from tvkeras.runs import Run
from tvkeras.zoo import __main__ as command
from tvkeras.zoo import store

PUBLISHED = ROOT / "zoo" / "digits_tv_lip"


@pytest.fixture(scope="module")
def classifier():
    """An untrained classifier."""
    return models.build("small_cnn", 10, **ARGUMENTS)


@pytest.fixture(scope="module")
def origin(tmp_path_factory, classifier):
    """A zoo of the entry "small", and the index of it."""
    folder = tmp_path_factory.mktemp("origin") / "small"
    folder.mkdir()
    runs.save_float16(classifier, folder / "best.weights.h5")
    Run(folder).describe(model="small_cnn", model_arguments=ARGUMENTS, num_classes=10)
    (folder / "card.json").write_text("{}")
    index = {"small": index_of(folder), "newer": index_of(folder, schema=store.SCHEMA + 1)}
    (folder.parent / "index.json").write_text(json.dumps(index))
    return folder.parent


@pytest.fixture
def cache(origin, tmp_path, monkeypatch):
    """An empty cache of an installed package that knows "small"."""
    monkeypatch.setattr(store, "INDEX", origin / "index.json")
    monkeypatch.setattr(store, "CHECKOUT", None)
    monkeypatch.setenv("TVKERAS_ZOO_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("TVKERAS_ZOO_URL", raising=False)
    monkeypatch.delenv("TVKERAS_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def server(origin, cache, monkeypatch):
    """A server of "small" that the package downloads from."""
    with zoo_server.serving(origin) as server:
        monkeypatch.setenv("TVKERAS_ZOO_URL", server.url)
        monkeypatch.setattr(store, "TIMEOUT_SECONDS", 1)
        yield server


def kept(cache):
    return [path for path in cache.rglob("*") if path.is_file()]


# ---- Look-up ---------------------------------------------------------------------------
def test_a_downloaded_classifier_is_the_published_one_and_needs_no_network_again(
    server, cache, classifier, monkeypatch
):
    loaded = tvkeras.zoo.load("small")
    assert type(loaded) is type(classifier)  # a plain Keras model
    assert {str(weights.dtype) for weights in loaded.get_weights()} == {"float32"}
    for one, other in zip(loaded.get_weights(), classifier.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other.astype("float16").astype("float32"))
    assert sorted(server.requests) == ["/small/best.weights.h5", "/small/run.json"]
    assert [path.name for path in sorted(kept(cache))] == ["best.weights.h5", "run.json"]

    monkeypatch.setenv("TVKERAS_OFFLINE", "1")
    again = zoo.load("small")
    np.testing.assert_array_equal(again(random_images(3)), loaded(random_images(3)))
    assert len(server.requests) == 2


def test_the_checkout_comes_before_the_cache(server, origin, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHECKOUT", tmp_path / "checkout")
    zoo.load("small")
    assert store.place("small") == "cache"
    shutil.copytree(origin / "small", tmp_path / "checkout" / "small")
    assert store.folder("small", "run.json") == tmp_path / "checkout" / "small"
    assert store.place("small") == "checkout"
    (tmp_path / "checkout" / "small" / "run.json").write_text("{}")
    with pytest.raises(
        checkpoint.DamagedError, match=r"found 2 bytes.*git checkout -- .*run\.json"
    ):
        zoo.load("small")
    (tmp_path / "checkout" / "small" / "run.json").unlink()
    os.mkfifo(tmp_path / "checkout" / "small" / "run.json")
    with pytest.raises(checkpoint.DamagedError, match="found no file"):
        zoo.load("small")
    assert len(server.requests) == 2


def test_names_match_a_pattern_and_an_unknown_or_newer_one_is_refused(server):
    assert zoo.names() == ["newer", "small"]
    assert zoo.names("s*") == ["small"]
    with pytest.raises(ValueError, match=r"one of \['newer', 'small'\].*Did you mean 'small'"):
        zoo.load("smal")
    with pytest.raises(ValueError, match=r"'newer' has schema=2.*Install a newer tvkeras"):
        zoo.load("newer")
    assert not server.requests


def test_without_a_network_the_error_says_what_to_set(cache, monkeypatch):
    by_hand = rf"by hand: {cache}/small/run\.json, \d+ bytes with sha256 [0-9a-f]{{64}}"
    for variable, value, why in (
        ("TVKERAS_ZOO_URL", "", "Set TVKERAS_ZOO_URL"),
        ("TVKERAS_ZOO_URL", "http://127.0.0.1:9", "refused"),
        ("TVKERAS_ZOO_URL", "no address", "unknown url type"),
        ("TVKERAS_OFFLINE", "1", "TVKERAS_OFFLINE forbids"),
    ):
        monkeypatch.setenv(variable, value)
        with pytest.raises(zoo.DownloadError, match=f"{why}.*{by_hand}"):
            zoo.load("small")


def test_commands_take_a_run_or_the_name_of_an_entry(server, cache, tmp_path, monkeypatch):
    assert zoo.find("small") == cache / "small"
    monkeypatch.chdir(tmp_path)
    pathlib.Path("small").mkdir()
    assert zoo.find("small") == cache / "small"
    Run(pathlib.Path("small")).describe()
    assert zoo.find("small") == pathlib.Path("small")
    assert zoo.find("smal") == pathlib.Path("smal")


# ---- Downloads that go wrong -----------------------------------------------------------
@pytest.mark.parametrize(
    ("behaviour", "found"),
    [
        (zoo_server.tampered, r"found \d+ bytes"),
        (zoo_server.short, r"found \d+ bytes"),
        (zoo_server.truncated, r"found \d+ bytes"),
        (zoo_server.endless, r"found more than \d+ bytes"),
        (zoo_server.another_file, "found 33 bytes"),
        (zoo_server.web_page, "found 55 bytes.*It is a web page"),
    ],
)
def test_a_download_that_is_not_the_published_file_is_refused(server, cache, behaviour, found):
    server.behaviour = behaviour
    with pytest.raises(checkpoint.DamagedError, match=found) as raised:
        zoo.load("small")
    message, path = str(raised.value), "small/run.json"
    for part in (f"{server.url}/{path}", str(store.files("small")["run.json"]), f"{cache}/{path}"):
        assert part in message
    assert not kept(cache)
    server.behaviour = zoo_server.well
    zoo.load("small")


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        (zoo_server.stalled, ""),
        (zoo_server.silent, ""),
        (zoo_server.missing, "404"),
        (zoo_server.trickling, "took more than 1 s"),
        (zoo_server.trickling_headers, "took more than 1 s"),
    ],
)
def test_a_server_that_does_not_answer_in_time_is_named(server, cache, behaviour, why):
    server.behaviour = behaviour
    start = time.monotonic()
    with pytest.raises(zoo.DownloadError, match=f"{server.url}/small/run.json cannot be .*{why}"):
        store.folder("small", "run.json")
    assert time.monotonic() - start < 10
    assert not kept(cache)


@pytest.mark.parametrize("make", [os.mkfifo, pathlib.Path.mkdir])
def test_what_is_no_file_in_the_cache_is_named(server, cache, make):
    path = cache / "small" / "run.json"
    path.parent.mkdir(parents=True)
    make(path)
    with pytest.raises(OSError, match=f"{path} must be a file"):
        zoo.load("small")
    assert not server.requests


def test_a_damaged_file_in_the_cache_is_removed_and_fetched_again(server, cache, monkeypatch):
    zoo.load("small")
    path = cache / "small" / "best.weights.h5"
    published = path.read_bytes()
    path.write_bytes(published[:-100])
    with pytest.warns(UserWarning, match=rf"{path} is not the published file: expected \d+ bytes"):
        zoo.load("small")
    assert path.read_bytes() == published
    path.write_bytes(b"")
    monkeypatch.setenv("TVKERAS_OFFLINE", "1")
    with pytest.warns(UserWarning, match="0 bytes"), pytest.raises(zoo.DownloadError):
        zoo.load("small")
    assert not path.exists()


# ---- Places that cannot be written -----------------------------------------------------
def test_a_full_disk_leaves_nothing_and_says_so(server, cache):
    with (
        full_disk(10),
        pytest.raises(OSError, match=r"run\.json cannot be written.*Make room") as raised,
    ):
        store.folder("small", "run.json")
    assert raised.value.__cause__.errno == errno.EFBIG
    assert not kept(cache)


def test_a_cache_that_cannot_be_written_says_what_to_set(server, monkeypatch):
    monkeypatch.setenv("TVKERAS_ZOO_DIR", "/proc/tvkeras")
    with pytest.raises(OSError, match=r"run\.json cannot be written.*TVKERAS_ZOO_DIR"):
        zoo.load("small")


# ---- Several at once, and interruptions ------------------------------------------------
def test_threads_that_load_at_once_get_the_same_file(server, cache):
    barrier = threading.Barrier(4)

    def together(handler, content):
        barrier.wait(30)
        zoo_server.well(handler, content)

    server.behaviour = together
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.folder("small", "best.weights.h5"), range(4)))
    assert [path.name for path in kept(cache)] == ["best.weights.h5"]


@pytest.mark.slow
def test_a_process_killed_in_a_download_leaves_nothing(server, origin, cache):
    server.behaviour = zoo_server.stalled
    process = start(origin, "store.folder('small', 'best.weights.h5')", BACKEND)
    deadline = time.monotonic() + 120
    while not server.requests and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert len(server.requests) == 1
    assert not kept(cache)


# ---- Weights that do not fit -----------------------------------------------------------
@pytest.fixture
def weights(origin, tmp_path):
    """A copy of the weights, to be spoilt."""
    return pathlib.Path(shutil.copy(origin / "small" / "best.weights.h5", tmp_path))


def test_weights_of_another_network_are_refused_with_the_difference(weights, classifier):
    with h5py.File(weights, "a") as file:
        names = []
        file.visititems(lambda name, item: names.append(name))
        for name in (name for name in names if isinstance(file[name], h5py.Dataset)):
            double = np.repeat(file[name], 2, axis=0)
            del file[name]
            file[name] = double
    before = classifier.get_weights()
    with pytest.raises(checkpoint.CheckpointError, match="is of another model") as raised:
        runs.load_weights(classifier, weights)
    _, *lines = str(raised.value).splitlines()
    assert len(lines) == 10
    assert "layers/batch_normalization/vars/0: the model has (4,), the file (8,)" in lines[0]
    assert lines[-1] == "  and 8 more"
    for one, other in zip(classifier.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["layers/dense/vars/1", "layers/dense/vars/2"])
def test_weights_with_an_array_too_few_or_too_many_are_refused(weights, classifier, name):
    with h5py.File(weights, "a") as file:
        if name in file:
            del file[name]
        else:
            file[name] = np.zeros(3)
    with pytest.raises(checkpoint.CheckpointError, match=rf"{name}: the model has.*nothing"):
        runs.load_weights(classifier, weights)


def virtual(file, name):
    layout = h5py.VirtualLayout((10,), "f2")
    layout[:] = h5py.VirtualSource("/elsewhere.h5", "x", (10,))
    file.create_virtual_dataset(name, layout)


HOSTILE = {
    "external link": lambda file, name: file.update({name: h5py.ExternalLink("/etc/passwd", "/x")}),
    "soft link": lambda file, name: file.update({name: h5py.SoftLink("/layers/conv2d/vars/0")}),
    "text": lambda file, name: file.update({name: ["a"] * 10}),
    "pickled": lambda file, name: file.update({name: np.array([np.void(b"cos\nsystem\n")] * 10)}),
    "virtual": virtual,
    "elsewhere": lambda file, name: file.create_dataset(
        name, (10,), "f2", external=[("/elsewhere", 0, 20)]
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_weights_that_are_no_arrays_of_numbers_are_refused(weights, classifier, what):
    name = "layers/dense/vars/1"
    with h5py.File(weights, "a") as file:
        del file[name]
        HOSTILE[what](file, name)
    message = f"{name} (points elsewhere|is no array of numbers)"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        runs.load_weights(classifier, weights)


@pytest.mark.parametrize("content", [b"", b"<html>", None], ids=["empty", "page", "half"])
def test_a_file_that_is_no_hdf5_is_refused(weights, classifier, content):
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(checkpoint.DamagedError, match="cannot be read as Keras weights"):
        runs.load_weights(classifier, weights)


def test_whatever_the_damage_the_error_is_ours(weights, classifier):
    whole, rng, refused = weights.read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for position in rng.integers(3000, size=10):  # where HDF5 keeps what describes the rest
            damaged[position] = rng.integers(256)
        weights.write_bytes(damaged)
        try:
            runs.load_weights(classifier, weights)
        except checkpoint.CheckpointError:
            refused += 1
    assert refused > 30


def test_commands_that_are_mistyped(cache, capsys):
    for arguments in ([], ["lst"], ["show"], ["publish", "run"], ["list", "a", "b"]):
        with pytest.raises(app.UsageError):
            command.main(["zoo", *arguments])
    with pytest.raises(ValueError, match=r"no entry matches pattern='no\*'; there are \["):
        command.main(["zoo", "list", "no*"])
    command.main(["zoo", "list"])
    newer, small = capsys.readouterr().out.splitlines()
    assert "Install a newer tvkeras" in newer
    assert small.split() == ["small", "0.0", "MB", "to", "download"]


@pytest.mark.slow
def test_an_installed_package_loads_from_an_address(origin, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "tvkeras", source / "tvkeras")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    shutil.copy(origin / "index.json", source / "tvkeras" / "zoo")
    install = ["install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    code = """
import tvkeras
print(tvkeras.__file__)
print(tvkeras.zoo.load("small").count_params())
"""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("TVKERAS_ZOO")},
        "PYTHONPATH": str(target),
        "TVKERAS_ZOO_DIR": str(tmp_path / "cache"),
    }
    with zoo_server.serving(origin) as server:
        output = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**environment, "TVKERAS_ZOO_URL": server.url, "no_proxy": "*"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    file, parameters = output.split()
    assert file.startswith(str(target))
    assert int(parameters) == models.build("small_cnn", 10, **ARGUMENTS).count_params()
