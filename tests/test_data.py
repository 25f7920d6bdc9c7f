import json
import pathlib
import time

import keras
import numpy as np
import pytest

from tvkeras import backends, data


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of data."""
    monkeypatch.setenv("TVKERAS_DATA_DIR", str(tmp_path))
    return tmp_path


def test_digits_are_split_cached_and_memory_mapped(digits, cache):
    train, test = digits
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.dtype == np.uint8
    assert train.images.max() == 255
    assert isinstance(train.images, np.memmap)
    joined = np.concatenate([train.images, test.images]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    original = np.round(load_digits().images * (255 / 16)).reshape(1797, -1)
    assert sorted(map(tuple, joined)) == sorted(map(tuple, original))
    again = data.load("digits")
    assert again.checksum == train.checksum
    meta = json.loads((cache / "digits" / "train" / "meta.json").read_text())
    assert set(meta) == {"num_classes", "sha256"}  # no absolute path


def test_a_damaged_cache_is_found(cache):
    data.load("digits")
    path = cache / "digits" / "train" / "images.npy"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: its sha256 is .* Remove that folder"):
        data.load("digits")


def test_missing_data_is_said_at_once(cache, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(cache))
    started = time.monotonic()
    with pytest.raises(data.DataNotFoundError, match=r"'cifar100' is neither cached nor prepared"):
        data.load("cifar100")
    assert time.monotonic() - started < 60  # a retry takes 205 seconds
    assert not (cache / "cifar100").exists()


def test_unknown_names_and_splits_are_refused():
    with pytest.raises(ValueError, match=r"'digits' or a name of tfds\.list_builders"):
        data.load("cifar11")
    with pytest.raises(ValueError, match="split must be one of"):
        data.load("digits", "validation")


def test_any_split_of_a_tfds_set_is_held_in_memory(same_size, cache, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(pathlib.Path(same_size.data_dir).parents[1]))
    examples = data.load("synthetic", "validation")
    assert examples.images.shape == (20, 8, 8, 3)
    np.testing.assert_array_equal(examples.labels, examples.images[:, 0, 0, 0] % 3)
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'validation'\]"):
        data.load("synthetic", "test")


def test_images_of_many_sizes_point_to_the_stream(synthetic, cache, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(pathlib.Path(synthetic.data_dir).parents[1]))
    with pytest.raises(ValueError, match=r"Stream it: train.image_size="):
        data.load("synthetic")


def test_the_held_out_part_depends_on_nothing_but_its_seed(digits):
    train, _ = digits
    kept, validation = data.held_out(train, 0.1, seed=3)
    assert len(validation) == 144
    assert len(kept) + len(validation) == len(train)
    joined = np.concatenate([kept.images, validation.images]).reshape(len(train), -1)
    assert sorted(map(tuple, joined)) == sorted(map(tuple, train.images.reshape(len(train), -1)))
    np.testing.assert_array_equal(data.held_out(train, 0.1, seed=3)[1].images, validation.images)
    assert len(data.held_out(train, 0.0)[1]) == 0


def test_batches_are_a_function_of_seed_epoch_and_index(digits):
    train, _ = digits

    def epoch(number, seed=5):
        batches = data.Batches(train, 100, seed=seed)
        batches.begin_epoch(number)
        return [batches[index] for index in range(len(batches))]

    assert len(epoch(0)) == 14
    assert all(images.shape == (100, 8, 8, 1) for images, _ in epoch(0))
    np.testing.assert_array_equal(epoch(2)[3][0], epoch(2)[3][0])
    assert (epoch(2)[3][1] != epoch(1)[3][1]).any()
    assert (epoch(2)[3][1] != epoch(2, seed=6)[3][1]).any()
    batches = data.Batches(train, 100, seed=5)
    batches.begin_epoch(2, first_batch=9)  # goes on with the next batch
    np.testing.assert_array_equal(batches[3][1], epoch(2)[12][1])
    in_order = data.Batches(train, 100)
    assert len(in_order) == 15
    np.testing.assert_array_equal(in_order[14][1], train.labels[1400:])
    with pytest.raises(ValueError, match="batch_size must be <= 1437"):
        data.Batches(train, 2000, seed=0)


@pytest.mark.parametrize("seed", [0, None])
def test_processes_share_every_batch(seed, digits):
    few = digits[0].take(np.arange(107), "few")
    whole = data.Batches(few, 20, seed=seed, devices=backends.Devices(total=4))
    shares = [
        data.Batches(few, 20, seed=seed, devices=backends.Devices(4, process, 2))
        for process in range(2)
    ]
    assert len(whole) == (6 if seed is None else 5)
    for index in range(len(whole)):
        together = np.concatenate([share[index][1] for share in shares])
        np.testing.assert_array_equal(together, whole[index][1])
    if seed is None:  # 7 images are left, of which 4 devices take 4
        assert len(whole[5][1]) == 4
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 devices"):
        data.Batches(few, 20, devices=backends.Devices(total=3))


def test_processes_share_a_stream(synthetic):
    def epoch(process, processes, first_batch=0):
        devices = backends.Devices(2, process, processes)
        arguments = {"batch_size": 16, "image_size": 8, "seed": 1, "devices": devices}
        stream = data.Stream(synthetic, "train", **arguments)
        stream.begin_epoch(3, first_batch)
        return [stream[index][1] for index in range(len(stream) - first_batch)]

    whole, shares = epoch(0, 1), [epoch(process, 2) for process in range(2)]
    for index, labels in enumerate(whole):
        np.testing.assert_array_equal(
            np.sort(np.concatenate([s[index] for s in shares])), np.sort(labels)
        )
    for labels, expected in zip(epoch(1, 2, first_batch=2), shares[1][2:], strict=True):
        np.testing.assert_array_equal(labels, expected)


def test_fit_draws_a_new_order_each_epoch(digits):
    """Keras itself resets data sets at moments of its own: `fit` says which epoch begins."""
    import tvkeras

    train, _ = digits
    begun = []

    class Spy(data.Batches):
        def begin_epoch(self, epoch, first_batch=0):
            begun.append(epoch)
            super().begin_epoch(epoch, first_batch)

    classifier = tvkeras.models.build("small_cnn", 10, width=2)
    robust = tvkeras.RobustClassifier(classifier, tvkeras.Undefended())
    robust.compile(keras.optimizers.SGD(0.01))
    robust.fit(Spy(train, 700, seed=0), initial_epoch=2, epochs=4, verbose=0, shuffle=False)
    assert begun == [0, 2, 3]  # 0 when it was made


def augmented(augmentation, images, seed=0):
    generator = keras.random.SeedGenerator(seed)
    return keras.ops.convert_to_numpy(augmentation(keras.ops.convert_to_tensor(images), generator))


def test_a_crop_is_a_window_of_the_padded_image():
    images = np.random.default_rng(0).random((40, 6, 7, 2)).astype("float32")
    result = augmented(data.Augmentation(crop=2, flip=False, cutout=0), images)
    offsets = set()
    for image, crop in zip(images, result, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=0.5)
        windows = {(i, j): padded[i : i + 6, j : j + 7] for i in range(5) for j in range(5)}
        found = [where for where, window in windows.items() if np.array_equal(window, crop)]
        assert found
        offsets.add(found[0])
    assert len(offsets) > 10


def test_half_of_the_images_are_mirrored():
    images = np.random.default_rng(0).random((400, 4, 5, 1)).astype("float32")
    result = augmented(data.Augmentation(crop=0, cutout=0), images)
    same = (result == images).all(axis=(1, 2, 3))
    mirrored = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert 0.4 < mirrored.mean() < 0.6


def test_cutout_replaces_a_square_by_its_mean():
    images = np.random.default_rng(0).random((50, 8, 8, 3)).astype("float32")
    result = augmented(data.Augmentation(crop=0, flip=False, cutout=4), images)
    for image, cut in zip(images, result, strict=True):
        changed = (image != cut).any(axis=-1)
        rows, columns = np.where(changed)
        square = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert changed[square].all()
        assert max(changed[square].shape) <= 4
        expected = np.broadcast_to(image[square].mean(axis=(0, 1)), cut[square].shape)
        np.testing.assert_allclose(cut[square], expected, rtol=1e-5)


def test_a_stream_is_a_function_of_seed_and_epoch(synthetic):
    stream = data.Stream(synthetic, "train", batch_size=16, image_size=32, seed=1)

    def epoch(number):
        stream.begin_epoch(number)
        return [stream[index] for index in range(len(stream))]

    first, second, again = epoch(0), epoch(1), epoch(0)
    assert [images.shape for images, _ in first] == [(16, 32, 32, 3)] * 4
    for (images, labels), (other_images, other_labels) in zip(first, again, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)
    colours = [np.concatenate([images[:, 0, 0, 0] for images, _ in e]) for e in (first, second)]
    assert all(len(set(colour)) == 64 for colour in colours)  # no image twice in an epoch
    assert (colours[0] != colours[1]).any()
    np.testing.assert_array_equal(stream[2][0], first[2][0])  # a jump back


def test_an_evaluation_stream_keeps_order_and_remainder(synthetic):
    stream = data.Stream(synthetic, "validation", batch_size=16, image_size=32)
    batches = [stream[index] for index in range(len(stream))]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    stored = [example["image"][0, 0, 0] for example in synthetic.as_dataset(split="validation")]
    np.testing.assert_array_equal(images[:, 5, 5, 0], stored)
    np.testing.assert_array_equal(labels, images[:, 5, 5, 0] % 3)
