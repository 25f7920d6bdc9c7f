import json
import os
import signal
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.conftest import BACKEND, ROOT
from tvkeras import backends, checkpoint, runs

CASES = {
    "tv_lip": {"ramp_steps": 3},
    "clipped": {"optimizer": {"global_clipnorm": 0.05, "use_ema": True}},
    "clipped by value": {"optimizer": {"clipvalue": 0.002, "weight_decay": 0.1, "nesterov": True}},
    "double backprop": {"defense": "double_backprop"},
    "adversarial training": {"defense": "pgd"},
    "central": {"defense": "central"},
}
# One array over all devices: these are exact under JAX, and replicas differ in them by design.
GLOBAL_CASES = {
    "batch norm and dropout": {"batch_norm": True, "dropout": 0.3},
    "lookahead": {"lookahead": True},
    "penalty fraction": {"defense": "fraction"},
    "several steps": {"compile_arguments": {"steps_per_execution": 2, "jit_compile": True}},
}
if BACKEND == "jax":  # where compiling is slow, and one path serves all
    CASES = {name: CASES[name] for name in ("tv_lip", "clipped")} | GLOBAL_CASES
ON_JAX = pytest.mark.skipif(BACKEND != "jax", reason="Keras's fit fails in TensorFlow's workers")
REFUSED = {
    "jit_compile must be False": {"compile_arguments": {"jit_compile": True}},
    "steps_per_execution must be 1": {"compile_arguments": {"steps_per_execution": 2}},
    "ema_overwrite_frequency": {"optimizer": {"use_ema": True, "ema_overwrite_frequency": 2}},
    "averaging must be None": {"lookahead": True},
    "penalty_every must be 1": {"defense": "every"},
    "every batch must be a multiple of the number of devices": {"uneven": True},
}


def run(out, runs, local=2, **environment):
    settings = json.dumps({"local": local, "runs": runs})
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed", str(out), settings],
        env={**os.environ, **environment},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(process, out):
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    found = {}
    with np.load(out) as archive:
        for name in archive.files:
            case, key = name.split("/")
            found.setdefault(case, {})[key] = archive[name]
    return found


def assert_equal_runs(found, expected, rtol=1e-9):
    """Weights agree to `rtol` of the largest of all, logs (float32) to 1e-5."""
    weights = [name for name in expected if name.isdigit()]
    scale = max(np.abs(expected[name]).max() for name in weights)
    for name in weights:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=rtol * scale)
    for name in expected.keys() - weights:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """Every case on one and on two virtual devices, and on TensorFlow what is refused."""
    out = tmp_path_factory.mktemp("devices") / "out.npz"
    one = {f"{name} on one": {**case, "devices": 1} for name, case in CASES.items()}
    two = {f"{name} on two": case for name, case in CASES.items()}
    more = {}
    if BACKEND == "tensorflow":
        statistics = {"batch_norm": True, "steps": 1, "epochs": 1, "dtype": "float32"}
        more = {"drawn": {}, "statistics on one": {**statistics, "devices": 1}}
        more["statistics on two"] = statistics
        more |= {f"refused {message}": arguments for message, arguments in REFUSED.items()}
    return results(run(out, {**one, **two, **more}), out)


@pytest.mark.slow
@pytest.mark.xdist_group("devices")  # one process computes what they share
@pytest.mark.parametrize("case", CASES)
def test_two_devices_train_as_one(case, devices):
    # Keras takes BatchNorm's means in float32, whatever the model computes in.
    rtol = 1e-5 if CASES[case].get("batch_norm") else 1e-9
    assert_equal_runs(devices[f"{case} on two"], devices[f"{case} on one"], rtol)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="replicas are TensorFlow's")
def test_replicas_average_batch_norm_s_statistics_and_draw_their_own_numbers(devices):
    first, second = devices["drawn"]["0"]
    assert first != second
    one, two = devices["statistics on one"], devices["statistics on two"]
    mean, variance = "4", "5"  # of the non-trainable weights, in Keras's order
    assert_equal_runs({mean: two[mean]}, {mean: one[mean]}, rtol=1e-5)
    assert np.all(two[variance] <= one[variance])  # within halves of the batch
    assert np.any(two[variance] < one[variance])


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX has no such limits")
@pytest.mark.parametrize("message", REFUSED)
def test_what_mirrored_training_cannot_do_is_refused(message, devices):
    assert message in str(devices[f"refused {message}"]["0"])


def run_together(tmp_path, *runs):
    """Starts a process for each of `runs`; they train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        run(
            tmp_path / f"{index}.npz",
            cases,
            local=1,
            KERAS_DISTRIBUTION_JOB_ADDRESSES=f"127.0.0.1:{port}",
            KERAS_DISTRIBUTION_NUM_PROCESSES=str(len(runs)),
            KERAS_DISTRIBUTION_PROCESS_ID=str(index),
        )
        for index, cases in enumerate(runs)
    ]


@pytest.mark.slow
@ON_JAX
def test_two_processes_train_as_one(tmp_path):
    cases = {"tv_lip": {}, "batch norm": {"batch_norm": True}}
    together = run_together(tmp_path, cases, cases)
    both = [results(process, tmp_path / f"{i}.npz") for i, process in enumerate(together)]
    alone = run(tmp_path / "alone.npz", cases, local=1)
    expected = results(alone, tmp_path / "alone.npz")
    for case in cases:
        for found in both:
            assert_equal_runs(found[case], expected[case], rtol=1e-5)


@pytest.mark.slow
@ON_JAX
def test_processes_that_share_no_folder_stop_and_go_on_together(tmp_path):
    def train(*names, signal_at=None):
        """Exit codes and errors of two processes that train runs one after the other together."""
        first, second = (
            {f"digits {name}": {"run_dir": str(tmp_path / f"{name}{index}")} for name in names}
            for index in range(2)
        )
        second[f"digits {names[-1]}"]["signal_at"] = signal_at
        processes = run_together(tmp_path, first, second)
        errors = [process.communicate()[1] for process in processes]
        return [process.returncode for process in processes], errors

    codes, errors = train("whole", "stopped", signal_at=25)
    assert codes == [128 + signal.SIGTERM] * 2, errors
    assert checkpoint.load(tmp_path / "stopped0" / "checkpoints" / "last")[1]["step"] == 40
    with runs.Run(tmp_path / "whole0").locked():
        codes, errors = train("stopped", "whole")
    assert codes == [1, 1], errors
    assert "is in use by" in errors[0]
    assert "PeerError: another process of this run has failed" in errors[1]
    assert not (tmp_path / "stopped1").exists()
    whole, stopped = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last")[0]
        for name in ("whole0", "stopped0")
    )
    for name, array in whole.items():
        np.testing.assert_array_equal(stopped[name], array, err_msg=name)


@pytest.mark.slow
def test_a_streamed_run_on_two_devices_resumes_inside_an_epoch(tmp_path):
    whole, killed = (
        {"run_dir": str(tmp_path / name), "builder_dir": str(tmp_path / "tfds")}
        for name in ("whole", "killed")
    )
    begun = {"imagenet whole": whole, "imagenet killed": {**killed, "kill_at": 6}}
    for cases, code in ((begun, -signal.SIGKILL), ({"imagenet killed": killed}, 0)):
        process = run(tmp_path / "out.npz", cases)
        _, errors = process.communicate()
        assert process.returncode == code, errors
    one, other = (
        checkpoint.load(tmp_path / n / "checkpoints" / "last") for n in ("whole", "killed")
    )
    assert (tmp_path / "whole" / "log.csv").read_text() == (
        tmp_path / "killed" / "log.csv"
    ).read_text()
    for name, array in one[0].items():
        np.testing.assert_array_equal(other[0][name], array, err_msg=name)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TF_CONFIG is TensorFlow's")
def test_several_tensorflow_workers_are_refused(monkeypatch):
    cluster = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    with pytest.raises(ValueError, match=r"2 workers.*KERAS_BACKEND=jax"), backends.spread(1):
        pass


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX clips in the optimizer")
def test_an_overflow_survives_clipping_by_value():
    from tvkeras.training import mirrored

    optimizer = keras.optimizers.SGD(clipvalue=0.5)
    (clipped,) = mirrored.clipped([keras.ops.array([np.inf, np.nan, 2.0])], optimizer)
    found = keras.ops.convert_to_numpy(clipped)
    assert not np.isfinite(found[:2]).any()
    assert found[2] == 0.5


def test_more_devices_than_there_are_is_refused():
    message = "devices must be 'all' or at most"
    with pytest.raises(ValueError, match=message), backends.spread(1000):
        pass
