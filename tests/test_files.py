import numpy as np
import PIL.Image
import pytest

from tvkeras import config, data
from tvkeras.data import files
from tvkeras.training.loop import train


@pytest.fixture
def pixels():
    """24 grey images of 7x9 in three classes."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (24, 7, 9, 1), np.uint8), np.arange(24) % 3


@pytest.fixture
def folder(tmp_path, pixels):
    """The same as PNG files, a folder a class, for training and test."""
    for split in ("train", "test"):
        for number, (image, label) in enumerate(zip(*pixels, strict=True)):
            path = tmp_path / split / "abc"[label] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image[..., 0]).save(path)
    return tmp_path


def npz(folder, **arrays):
    path = folder / "own.npz"
    np.savez(path, **arrays)
    return str(path)


def test_a_folder_gives_its_pixels_in_the_order_of_its_classes(folder, pixels):
    images, labels = pixels
    order = np.argsort(labels, kind="stable")
    read = data.load(str(folder), "test")
    np.testing.assert_array_equal(read.images, images[order])
    np.testing.assert_array_equal(read.labels, labels[order])
    assert read.num_classes == 3


def test_colour_and_size_of_a_folder(folder):
    assert data.load(str(folder), image_size=16).images.shape == (24, 16, 16, 1)
    PIL.Image.new("RGB", (5, 5)).save(folder / "train" / "a" / "colour.png")
    assert data.load(str(folder), image_size=16).images.shape == (25, 16, 16, 3)
    with pytest.raises(ValueError, match="2 sizes"):
        data.load(str(folder))


def test_an_npz_gives_its_arrays(tmp_path, pixels):
    images, labels = pixels
    path = npz(tmp_path, x_train=images[..., 0], y_train=labels[:, None], x_test=images, y_test=[0])
    read = data.load(path)
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels)
    with pytest.raises(ValueError, match="24 classes"):
        data.load(path, "test")


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"x_train": np.zeros((2, 4, 4))}, FileNotFoundError, "y_train"),
        ({"x_train": np.zeros((2, 4, 4)), "y_train": [0, 1]}, ValueError, "uint8"),
        ({"x_train": np.zeros((2, 4), "uint8"), "y_train": [0, 1]}, ValueError, "uint8"),
        ({"x_train": np.zeros((2, 4, 4), "uint8"), "y_train": [0, -1]}, ValueError, "classes"),
        ({"x_train": np.zeros((2, 4, 4), "uint8"), "y_train": [0.0, 1]}, ValueError, "classes"),
    ],
)
def test_a_bad_npz_is_refused(tmp_path, arrays, error, message):
    with pytest.raises(error, match=message):
        data.load(npz(tmp_path, **arrays))


def test_a_bad_folder_is_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"'val'.*\['test', 'train'\]"):
        data.load(str(folder), "val")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.load("./nowhere.npz")
    (folder / "test" / "d").mkdir()
    with pytest.raises(ValueError, match="same class folders"):
        data.load(str(folder))


@pytest.mark.parametrize(("name", "path"), [("cifar10", False), ("a/b", False), ("x.npz", True)])
def test_what_is_a_path(name, path):
    assert files.is_path(name) == path


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_run_on_ones_own_images(folder, pixels, kind, tmp_path_factory):
    images, labels = pixels
    name = str(folder)
    if kind == "npz":
        arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
        name = npz(tmp_path_factory.mktemp("npz"), **arrays)
    settings = [f"Task.dataset={name!r}", "Recipe.epochs=1", "Recipe.batch_size=8"]
    settings += ["Network.arguments={'width': 2}", "Task.epsilons=(0.1,)"]
    config.bind(["gin/digits_undefended.gin"], settings)
    run_dir = tmp_path_factory.mktemp("run")
    assert train(run_dir, **config.settings()).clean_error.n == 24
