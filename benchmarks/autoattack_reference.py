"""Robust accuracy under our AutoAttack and under the published PyTorch code.

    python -m benchmarks.autoattack_reference --reference_dir=CHECKOUT [--reference_python=PYTHON]

Trains a narrow `small_cnn` on digits without and with TV + Lipschitz (kept in
`--folder`), copies the weights into PyTorch, and runs every member of both suites
on the same test images. CHECKOUT is one of github.com/fra31/auto-attack; without
it or without torch the comparison is skipped.
"""

import pathlib
import subprocess
import sys
import tempfile

import tvkeras  # isort: skip  (first: it chooses TensorFlow's kernels)
import numpy as np
from absl import app, flags

import tvkeras.data
from tvkeras import attacks, config
from tvkeras.train import train

MODEL = {"activation": "gelu", "width": 8}
EXPERIMENTS = {
    "gin/digits_undefended.gin": {"l2": 0.4, "linf": 0.08},
    "gin/digits_tv_lip.gin": {"l2": 0.7, "linf": 0.15},
}

_REFERENCE_DIR = flags.DEFINE_string("reference_dir", None, "Checkout of the published code.")
_REFERENCE_PYTHON = flags.DEFINE_string("reference_python", sys.executable, "Python with torch.")
_FOLDER = flags.DEFINE_string("folder", "runs/autoattack_reference", "Where the runs go.")
_NORMS = flags.DEFINE_list("norms", ["l2", "linf"], "Threat norms.")
_IMAGES = flags.DEFINE_integer("images", 200, "Test images.")


def trained(file: str) -> attacks.AttackedClassifier:
    """The classifier of an experiment, trained unless it was before."""
    run_dir = pathlib.Path(_FOLDER.value) / pathlib.Path(file).stem
    train_configured = config.configurable(train)
    config.bind([file], [f"train.model_arguments={MODEL}"])
    train_configured(run_dir=str(run_dir))
    classifier = tvkeras.models.build("small_cnn", 10, **MODEL)
    classifier.load_weights(run_dir / "best.weights.h5")
    return attacks.AttackedClassifier(classifier)


def ours(
    model: attacks.AttackedClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    norm: str,
    epsilon: float,
) -> dict[str, np.ndarray]:
    """Which examples stand under each member alone and under the suite."""
    suite = attacks.AutoAttack(norm=norm)
    members = {**suite.members(10)[1], "suite": suite}
    return {
        name: ~member(model, images, labels, epsilon=epsilon).success
        for name, member in members.items()
    }


def published(
    model: attacks.AttackedClassifier,
    images: np.ndarray,
    labels: np.ndarray,
    norm: str,
    epsilon: float,
) -> dict[str, np.ndarray]:
    """The same by the published code; its suite is the union of its members."""
    weights = {f"weight_{i}": w for i, w in enumerate(model.classifier.get_weights())}
    logits = model.classifier.predict(images, verbose=0)
    script = pathlib.Path(__file__).with_name("autoattack_torch.py")
    with tempfile.TemporaryDirectory() as folder:
        arrays = pathlib.Path(folder) / "arrays.npz"
        np.savez(arrays, images=images, labels=labels, logits=logits, **weights)
        settings = [_REFERENCE_DIR.value, str(arrays), norm, str(epsilon)]
        subprocess.run([_REFERENCE_PYTHON.value, script, *settings], check=True)
        robust = dict(np.load(arrays.with_name("robust.npz")))
    return {**robust, "suite": np.all(list(robust.values()), axis=0)}


def main(_: list[str]) -> None:
    """Prints a table of robust accuracies."""
    has_torch = [_REFERENCE_PYTHON.value, "-c", "import torch"]
    if not _REFERENCE_DIR.value or subprocess.run(has_torch, capture_output=True).returncode:
        print("No --reference_dir, or no torch in --reference_python: skipped.")
        return
    test = tvkeras.data.load("digits", "test").take(np.arange(_IMAGES.value), "attacked")
    images, labels = test.images.astype("float32") / 255, test.labels.astype("int64")
    for file, radii in EXPERIMENTS.items():
        model = trained(file)
        for norm in _NORMS.value:
            epsilon = radii[norm]
            print(f"\n{file}, {norm} {epsilon}, {len(labels)} images: robust accuracy, %")
            found, other = (
                side(model, images, labels, norm, epsilon) for side in (ours, published)
            )
            print(f"{'':<10}{'tvkeras':>10}{'published':>11}{'differ':>8}")
            for name, robust in found.items():
                accuracies = f"{100 * robust.mean():10.1f}{100 * other[name].mean():11.1f}"
                print(f"{name:<10}{accuracies}{np.sum(robust != other[name]):8}", flush=True)


if __name__ == "__main__":
    app.run(main)
