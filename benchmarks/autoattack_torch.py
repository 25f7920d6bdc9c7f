"""The published AutoAttack on a copy of a Keras model: the PyTorch half of a comparison.

Run by `benchmarks.autoattack_reference` in a Python that has torch:
    python -m benchmarks.autoattack_torch CHECKOUT FOLDER
FOLDER holds the settings (settings.json), the model's weights and the images
(arrays.npz); result.npz is written there: the examples that stand, and the seconds.
"""

import itertools
import json
import pathlib
import sys
import time

import numpy as np
import torch
from torch import nn

from benchmarks.common import Clock
from benchmarks.torch_network import Network


def set_fastest(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Sets the number of threads and the memory format in which gradients are fastest."""
    images = images.clone().requires_grad_()

    def set_to(threads: int, kind: torch.memory_format) -> None:
        torch.set_num_threads(threads)
        network.to(memory_format=kind)

    def seconds(setting: tuple[int, torch.memory_format]) -> float:
        set_to(*setting)
        start = time.perf_counter()
        for _ in range(4):
            torch.autograd.grad(nn.functional.cross_entropy(network(images), labels), images)
        return time.perf_counter() - start

    formats = (torch.contiguous_format, torch.channels_last)
    settings = list(itertools.product({1, torch.get_num_threads()}, formats))
    fastest = min(settings[:1] + settings, key=seconds)
    set_to(*fastest)
    print("PyTorch's fastest threads and memory format:", *fastest, flush=True)


def main(reference_dir: str, folder: str) -> None:
    """Runs the members named in each list of the settings' `flows`, as one suite."""
    sys.path.insert(0, reference_dir)
    from autoattack import AutoAttack

    settings = json.loads((pathlib.Path(folder) / "settings.json").read_text())
    given = np.load(pathlib.Path(folder) / "arrays.npz")
    network = Network(settings["layers"], given)
    network.fold()
    images = torch.tensor(given["images"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(given["labels"])
    difference = np.abs(network(images).detach().numpy() - given["logits"]).max()
    if difference > 1e-3:
        raise RuntimeError(f"the copied network differs by {difference}.")
    set_fastest(network, images[:100], labels[:100])
    suite = AutoAttack(
        network,
        norm={"l2": "L2", "linf": "Linf"}[settings["norm"]],
        eps=settings["epsilon"],
        seed=0,
        verbose=False,
        device="cpu",
    )
    clock = Clock()
    members = suite.apgd, suite.apgd_targeted, suite.fab, suite.square
    for name, member in zip(suite.attacks_to_run, members, strict=True):
        member.perturb = clock.timed(name, member.perturb)
    run = clock.timed("suite", suite.run_standard_evaluation)
    stands = []
    for suite.attacks_to_run in settings["flows"]:
        x_adv = run(images, labels, bs=settings["batch_size"])
        with torch.no_grad():
            stands.append((network(x_adv).argmax(dim=1) == labels).numpy())
    np.savez(pathlib.Path(folder) / "result.npz", stands=stands, **clock.seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
