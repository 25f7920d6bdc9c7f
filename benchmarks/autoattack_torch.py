"""The published AutoAttack on a copy of `small_cnn`: the PyTorch half of a comparison.

Run by `benchmarks.autoattack_reference` in a Python that has torch:
    python autoattack_torch.py CHECKOUT ARRAYS.npz NORM EPSILON
Writes ROBUST.npz next to the arrays: for each member, which examples stand.
"""

import pathlib
import sys

import numpy as np
import torch
from torch import nn


class Network(nn.Module):
    """`tvkeras.models.small_cnn` with gelu, from its list of weights."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        tensors = list(map(torch.tensor, weights))
        self.blocks = nn.ModuleList()
        for kernel, gamma, beta, mean, variance in (tensors[i : i + 5] for i in (0, 5, 10)):
            inputs, outputs = kernel.shape[2:]
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            conv.weight.data = kernel.permute(3, 2, 0, 1)
            norm = nn.BatchNorm2d(outputs, eps=1e-5)
            norm.weight.data, norm.bias.data = gamma, beta
            norm.running_mean, norm.running_var = mean, variance
            self.blocks.append(nn.Sequential(conv, norm, nn.GELU()))
        kernel, bias = tensors[15:]
        self.head = nn.Linear(*kernel.shape)
        self.head.weight.data, self.head.bias.data = kernel.T, bias

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images of shape `(batch, channels, height, width)`."""
        x = self.blocks[1](self.blocks[0](images))
        x = self.blocks[2](nn.functional.avg_pool2d(x, 2))
        return self.head(x.mean(dim=(2, 3)))


def main(reference_dir: str, arrays: str, norm: str, epsilon: str) -> None:
    """Runs each member on all examples."""
    sys.path.insert(0, reference_dir)
    from autoattack import AutoAttack

    torch.set_num_threads(1)  # small tensors: threads cost more than they give
    given = np.load(arrays)
    network = Network([given[f"weight_{i}"] for i in range(17)]).eval()
    images = torch.tensor(given["images"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(given["labels"])
    difference = network(images).detach().numpy() - given["logits"]
    if np.abs(difference).max() > 1e-3:
        raise RuntimeError(f"the copied network differs by {np.abs(difference).max()}.")
    norm = {"l2": "L2", "linf": "Linf"}[norm]
    suite = AutoAttack(network, norm=norm, eps=float(epsilon), seed=0, verbose=False, device="cpu")
    found = suite.run_standard_evaluation_individual(images, labels, bs=len(images))
    with torch.no_grad():
        robust = {
            name: (network(x_adv).argmax(dim=1) == labels).numpy() for name, x_adv in found.items()
        }
    np.savez(pathlib.Path(arrays).with_name("robust.npz"), **robust)


if __name__ == "__main__":
    main(*sys.argv[1:])
