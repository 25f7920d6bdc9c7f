import numpy as np
import pytest

from tests.conftest import net
from tvkeras import checkpoint


def test_arrays_and_header_return(tmp_path):
    arrays = {"a/b": np.arange(6.0).reshape(2, 3), "meta": np.array([3], "uint32")}
    checkpoint.save(tmp_path / "x", arrays, {"epoch": 3, "log": [{"loss": 0.1}]})
    found, meta = checkpoint.load(tmp_path / "x")
    assert meta == {"epoch": 3, "log": [{"loss": 0.1}]}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_any_damage_is_found(tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, {"a": np.arange(100.0)}, {})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        if rng.random() < 0.3:
            del damaged[rng.integers(len(damaged)) :]
        else:
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError, match="checksum does not match"):
            checkpoint.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    checkpoint.write_atomically(path, b"old")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_model_s_checkpoint_is_refused_with_the_difference():
    small = net(dtype="float32")
    values = checkpoint.values(net(dtype="float32", batch_norm=True).variables)
    with pytest.raises(checkpoint.CheckpointError, match=r"gamma: the model has nothing"):
        checkpoint.assign(small.variables, values)


def test_values_return_to_a_model_made_later_in_the_process():
    one, other = net(dtype="float32"), net(dtype="float32")
    checkpoint.assign(other.variables, checkpoint.values(one.variables))
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
