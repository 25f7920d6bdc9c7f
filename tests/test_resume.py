import errno
import os
import signal
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

from tests import resumable
from tvkeras import checkpoint, runs
from tvkeras.training.recorder import Recorder, TrainingInterrupt


class Killed(BaseException):
    """Stands for a kill: nothing on the way out writes a file."""


def stop():
    raise Killed


def assert_same_run(one, other):
    """Weights, optimizer, seeds, position and logs agree to the last bit."""
    (found, meta), (expected, whole) = (
        checkpoint.load(folder / "checkpoints" / "last") for folder in (one, other)
    )
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    clocks = {"seconds": 0, "writing_seconds": 0}
    assert {**meta, **clocks} == {**whole, **clocks}
    assert (one / "log.csv").read_bytes() == (other / "log.csv").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    resumable.train(folder)
    return folder


MOMENTS = np.random.default_rng(7)


@pytest.mark.parametrize(
    "moments",
    [
        [("step", int(MOMENTS.integers(5, 30))), ("step", int(MOMENTS.integers(2, 10)))],
        pytest.param(
            [("epoch", 1), ("write", int(MOMENTS.integers(2, 12)))], marks=pytest.mark.slow
        ),
        pytest.param([("write", number) for number in (1, 2, 3)], marks=pytest.mark.slow),
    ],
    ids=["inside epochs", "between epochs and while writing", "in the first writes"],
)
def test_a_run_that_was_killed_ends_as_if_it_never_was(moments, whole, tmp_path):
    for where, number in moments:
        with pytest.raises(Killed):
            resumable.train(tmp_path, resumable.ending(where, number, stop))
    resumable.train(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_several_steps_in_one_call_resume_exactly_too(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    steps = {"steps_per_execution": 3}  # which leaves a shorter last call in an epoch of 10
    resumable.train(one, **steps)
    with pytest.raises(Killed):
        resumable.train(other, resumable.ending("step", 7, stop), **steps)
    resumable.train(other, **steps)
    assert_same_run(other, one)


@pytest.mark.slow
def test_a_damaged_checkpoint_never_replaces_a_whole_one(whole, tmp_path):
    with pytest.raises(Killed):
        resumable.train(tmp_path, resumable.ending("step", 19, stop))
    last = tmp_path / "checkpoints" / "last"
    last.write_bytes(last.read_bytes()[:-9])
    passed_over = r"checkpoints/last is not .*Going on from .*previous"
    for number in (1, 2):  # killed where it is put aside, and at the first rename after that
        with pytest.raises(Killed), pytest.warns(UserWarning, match=passed_over):
            resumable.train(tmp_path, resumable.ending("write", number, stop))
    resumable.train(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_crash_between_the_two_renames_loses_nothing(whole, tmp_path):
    with pytest.raises(Killed):
        resumable.train(tmp_path, resumable.ending("step", 19, stop))
    (tmp_path / "checkpoints" / "last").unlink()
    resumable.train(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_no_checkpoint_holds_a_lost_loss(tmp_path):
    with pytest.raises(FloatingPointError, match=r"No checkpoint yet|checkpoints/last"):
        resumable.train(tmp_path, rate=1e30)
    if (tmp_path / "checkpoints" / "last").exists():
        arrays, _ = checkpoint.load(tmp_path / "checkpoints" / "last")
        assert all(np.isfinite(a).all() for a in arrays.values() if a.dtype.kind == "f")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_real_kill(backend, tmp_path):
    environment = {**os.environ, "KERAS_BACKEND": backend}

    def run(name, *end):
        command = [sys.executable, "-m", "tests.resumable", str(tmp_path / name), *end]
        return subprocess.run(command, env=environment, check=False).returncode

    assert run("whole") == 0
    assert run("killed", "write", "8") == -signal.SIGKILL
    assert run("killed") == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_signal_stops_after_the_step_with_a_checkpoint(whole, tmp_path):
    number = signal.SIGTERM
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupt, match=r"after step 3 of epoch 2.*checkpoints/last"):
        resumable.train(
            tmp_path,
            resumable.ending("step", 12, lambda: signal.raise_signal(number)),
            checkpoint_steps=1000,
        )
    assert signal.getsignal(number) == before
    _, meta = checkpoint.load(tmp_path / "checkpoints" / "last")
    assert (meta["epoch"], meta["step"]) == (1, 3)
    resumable.train(tmp_path)
    assert_same_run(tmp_path, whole)


def test_two_damaged_checkpoints_stop_the_run(tmp_path):
    for name in ("last", "previous"):
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"nothing")
    with pytest.raises(checkpoint.DamagedError, match="no other checkpoint"):
        resumable.train(tmp_path)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_inside_an_epoch_leaves_the_run_going(whole, tmp_path, monkeypatch):
    steps = [0]
    fsync = os.fsync

    def sometimes_full(number):
        steps[0] += 1
        return full() if steps[0] == 2 else fsync(number)

    monkeypatch.setattr(checkpoint.os, "fsync", sometimes_full)
    with pytest.warns(UserWarning, match=r"No space left.*Last good checkpoint.*Make room"):
        resumable.train(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_signal_stops_a_run_whose_disk_is_full(tmp_path, monkeypatch):
    def signalled():
        monkeypatch.setattr(checkpoint.os, "fsync", full)
        signal.raise_signal(signal.SIGTERM)

    with (
        pytest.warns(UserWarning, match="No space left"),
        pytest.raises(TrainingInterrupt, match=r"step 8 of epoch 1\. Last good .*/last"),
    ):
        resumable.train(tmp_path, resumable.ending("step", 7, signalled))
    assert (tmp_path / "checkpoints" / "last").exists()


def test_an_unreadable_checkpoint_is_passed_over(tmp_path):
    last, previous = tmp_path / "last", tmp_path / "previous"
    last.mkdir()
    checkpoint.save(previous, {}, {"epoch": 3})
    with pytest.warns(UserWarning, match=rf"Is a directory: '{last}' Going on from {previous}"):
        assert checkpoint.newest((last, previous)) == previous.read_bytes()
    assert not last.exists()


@pytest.mark.slow
def test_a_disk_that_stays_full_stops_the_run_and_loses_nothing(whole, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        resumable.train(tmp_path, resumable.ending("step", 6, stop))
    kept = (tmp_path / "checkpoints" / "last").read_bytes()
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left.*cannot be written after epoch 1.*last"):
            resumable.train(tmp_path)
    assert (tmp_path / "checkpoints" / "last").read_bytes() == kept
    resumable.train(tmp_path)
    assert_same_run(tmp_path, whole)


def test_checkpoints_are_apart_by_a_multiple_of_their_cost(tmp_path, monkeypatch):
    """At most 2 % of the time goes into them, however often they are asked for."""
    clock = [0.0]
    monkeypatch.setattr("tvkeras.training.recorder.time.monotonic", lambda: clock[0])
    saved = []

    def save(*_, **__):
        saved.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr(checkpoint, "save", save)
    recorder = Recorder(runs.Run(tmp_path), checkpoint_minutes=0.0)
    classifier = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    classifier.compile(keras.optimizers.SGD())
    recorder.set_model(classifier)
    recorder.set_params({"steps": 1000, "epochs": 1})
    recorder.on_train_begin()
    recorder.on_epoch_begin(0)
    for step in range(400):
        clock[0] += 0.5
        recorder.on_train_batch_end(step, {})
    assert len(saved) == 5
    assert np.all(np.diff(saved) >= 50)


def test_a_second_process_is_kept_out_of_a_run_folder(tmp_path):
    code = f"""
import pathlib, time
from tvkeras import runs
with runs.Run(pathlib.Path({str(tmp_path)!r})).locked():
    print("in", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "in\n"
        with (
            pytest.raises(ValueError, match=rf"in use by process {process.pid} on "),
            runs.Run(tmp_path).locked(),
        ):
            pass
        process.kill()
        process.wait()
    unfinished = tmp_path / f".run.json.1{checkpoint.UNFINISHED}"
    unfinished.touch()
    with runs.Run(tmp_path).locked():  # the lock died with its holder
        assert not unfinished.exists()
