"""A training step of a Keras model's copy in PyTorch, each time a line comes in.

Run by `benchmarks.step_cost` in a Python that has torch:
    python -m benchmarks.torch_step FOLDER SETTINGS
FOLDER holds the network (layers.json, arrays.npz); SETTINGS are JSON: the batch size, whether
the step is penalised, computes in bfloat16, is compiled.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from torch import nn

from benchmarks.torch_network import Network

STEP, WEIGHT = 0.1, 0.1


def losses(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image."""
    return nn.functional.cross_entropy(network(images).float(), labels, reduction="none")


def penalised(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss with its total variation and Lipschitz term, as autograd takes it: three passes."""
    x = images.clone().requires_grad_()
    here = losses(network, x, labels)
    (gradient,) = torch.autograd.grad(here.sum(), x, retain_graph=True)
    lengths = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
    ahead = losses(network, images + STEP * gradient / lengths[:, None, None, None], labels)
    sizes = (ahead - here) / STEP
    return here.mean() + WEIGHT * (sizes.mean() + sizes.max())


def main(folder: str, settings: str) -> None:
    """Answers each line of input by a step."""
    chosen = json.loads(settings)
    layers = json.loads(pathlib.Path(folder, "layers.json").read_text())
    network = Network(layers, np.load(pathlib.Path(folder, "arrays.npz"))).train()
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    called = torch.compile(network) if chosen["compiled"] else network
    torch.manual_seed(0)
    images = torch.rand(chosen["batch_size"], 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (len(images),))
    for _ in sys.stdin:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=chosen["bfloat16"]):
            if chosen["penalised"]:
                loss = penalised(called, images, labels)
            else:
                loss = losses(called, images, labels).mean()
        loss.backward()
        optimizer.step()
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
