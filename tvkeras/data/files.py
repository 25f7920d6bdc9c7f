"""One's own images: a folder of class folders for each split, or an `.npz`."""

import pathlib

import keras
import numpy as np
import PIL.Image

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
BATCH = 256
Arrays = tuple[np.ndarray, np.ndarray, int]


def is_path(name: str) -> bool:
    """Whether a data set's name is that of a file or folder: "data/x.npz", "./flowers"."""
    return name.endswith(".npz") or ("/" in name and pathlib.Path(name).is_dir())


def read(name: str, split: str, image_size: int | None = None) -> Arrays:
    """Images, labels and the number of classes of one split.

    Args:
        name: An `.npz` with arrays `x_SPLIT` and `y_SPLIT`, as those of Keras's own data
            sets; or a folder that has one for each split, `NAME/train/CLASS/IMAGE.png`.
        split: "train", "test", or another that is there.
        image_size: Side that images of a folder are brought to; None leaves them as they
            are.

    Returns:
        Images, uint8 `(count, height, width, channels)`; labels, int64 `(count,)`, by the
        alphabet for a folder; and the number of classes.

    Raises:
        FileNotFoundError: If there is no such file, folder or split.
        ValueError: For images that are not uint8, not equally large, or labels that are no
            classes.
    """
    path = pathlib.Path(name)
    if not path.exists():
        raise FileNotFoundError(f"dataset {name!r} does not exist (from {pathlib.Path.cwd()}).")
    return _from_npz(path, split) if path.is_file() else _from_folder(path, split, image_size)


def _from_npz(path: pathlib.Path, split: str) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        splits = sorted(k[2:] for k in archive.files if k[:2] == "x_" and f"y_{k[2:]}" in archive)
        if split not in splits:
            raise FileNotFoundError(
                f"{path} must hold x_{split} and y_{split}, has the splits {splits} "
                f"(arrays: {archive.files}). Save it with np.savez(path, x_train=images, "
                "y_train=labels, x_test=..., y_test=...)."
            )
        images, labels = archive[f"x_{split}"], archive[f"y_{split}"].squeeze()
        classes = [int(archive[f"y_{name}"].max()) + 1 for name in splits]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"x_{split} of {path} must be uint8 (count, height, width[, channels]), got "
            f"{images.dtype} {images.shape}. Save pixels from 0 to 255."
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
        raise ValueError(
            f"y_{split} of {path} must hold {len(images)} classes, integers from 0, got "
            f"{labels.dtype} {labels.shape}."
        )
    return images, labels.astype(np.int64), max(classes)


def _from_folder(path: pathlib.Path, split: str, image_size: int | None) -> Arrays:
    classes = {part.name: _folders(part) for part in sorted(path.iterdir()) if part.is_dir()}
    if split not in classes:
        raise FileNotFoundError(
            f"{path} must hold a folder {split!r} of class folders, has {list(classes)}. Name "
            "another split, or move a part of the images to a folder of that name."
        )
    for other, names in classes.items():
        if names != classes[split]:
            raise ValueError(
                f"{path / other} and {path / split} must have the same class folders, got {names} "
                f"and {classes[split]}. Add the missing ones, empty where there are no images."
            )
    files = [file for file in (path / split).rglob("*") if file.suffix.lower() in ENDINGS]
    if not files:
        raise FileNotFoundError(f"{path / split} holds no images ({', '.join(ENDINGS)}).")
    headers = [_header(file) for file in files]
    sizes = {size for size, _ in headers}
    modes = {mode for _, mode in headers}
    if image_size is None and len(sizes) > 1:
        raise ValueError(
            f"the images in {path / split} are of {len(sizes)} sizes, such as "
            f"{sorted(sizes)[:2]}. Bring them to one, such as image_size=224."
        )
    width, height = (image_size, image_size) if image_size else sizes.pop()
    batches = keras.utils.image_dataset_from_directory(
        path / split,
        batch_size=BATCH,
        image_size=(height, width),
        color_mode="grayscale" if modes <= {"1", "L"} else "rgb",
        shuffle=False,
        verbose=False,
    )
    parts = [(np.round(x).astype(np.uint8), y) for x, y in batches.as_numpy_iterator()]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images, labels.astype(np.int64), len(classes[split])


def _folders(path: pathlib.Path) -> list[str]:
    return sorted(part.name for part in path.iterdir() if part.is_dir())


def _header(file: pathlib.Path) -> tuple[tuple[int, int], str]:
    """An image's (width, height) and mode, without its pixels."""
    with PIL.Image.open(file) as image:
        return image.size, image.mode
