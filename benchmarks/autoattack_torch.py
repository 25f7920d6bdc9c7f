"""The published AutoAttack on a copy of a Keras model: the PyTorch half of a comparison.

Run by `benchmarks.autoattack_reference` in a Python that has torch:
    python -m benchmarks.autoattack_torch CHECKOUT FOLDER
FOLDER holds the settings (settings.json), the model's weights and the images
(arrays.npz); result.npz is written there: the examples that stand, and the seconds.
"""

import functools
import itertools
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.common import Clock

Layer = Callable[..., torch.Tensor]


class Network(nn.Module):
    """A functional Keras model of the layers in `_layer`, in inference mode.

    BatchNorm is folded into the convolution before it, as who attacks a network would do.

    Args:
        layers: As `common.described` returns them.
        arrays: Likewise; others are ignored.
    """

    def __init__(self, layers: list[dict], arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.first, *rest = (layer["name"] for layer in layers)
        self.steps: dict[str, tuple[list[str], Layer]] = {}
        for name, layer in zip(rest, layers[1:], strict=True):
            count = sum(key.startswith(f"{name}/") for key in arrays)
            weights = [torch.tensor(arrays[f"{name}/{i}"]) for i in range(count)]
            inputs = re.findall(r'"keras_history": \["([^"]+)"', json.dumps(layer["inbound_nodes"]))
            made = _layer(layer["class_name"], layer["config"], weights)
            if isinstance(made, nn.Module):
                self.add_module(name, made)
            self.steps[name] = inputs, made
        self.eval()
        for name, (inputs, layer) in self.steps.items():
            if isinstance(layer, nn.BatchNorm2d):
                self._fold(name, inputs[0], layer)

    def _fold(self, name: str, before: str, norm: nn.BatchNorm2d) -> None:
        """Folds a BatchNorm, through a pooling too: its factors are positive where that matters."""
        while not isinstance(self.steps[before][1], nn.Conv2d):
            (before,) = self.steps[before][0]
        inputs, conv = self.steps[before]
        self.steps[before] = inputs, fuse_conv_bn_eval(conv, norm)
        self.steps[name] = self.steps[name][0], nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images of shape `(batch, channels, height, width)`."""
        values = {self.first: images}
        for name, (inputs, layer) in self.steps.items():
            values[name] = layer(*(values[key] for key in inputs))
        return values[name]


def _layer(kind: str, config: dict, weights: list[torch.Tensor]) -> Layer:
    if kind == "Conv2D":
        inputs, outputs = weights[0].shape[2:]
        size, stride = config["kernel_size"], config["strides"]
        padding = size[0] // 2 if config["padding"] == "same" else 0
        bias = dict(enumerate(weights)).get(1)
        conv = nn.Conv2d(inputs, outputs, size, stride, padding=padding, bias=bias is not None)
        conv.weight.data = weights[0].permute(3, 2, 0, 1).contiguous()
        if bias is not None:
            conv.bias.data = bias
        return conv
    if kind == "BatchNormalization":
        norm = nn.BatchNorm2d(len(weights[0]), eps=config["epsilon"])
        *scale, norm.bias.data, norm.running_mean, norm.running_var = weights
        if scale:
            norm.weight.data = scale[0]
        return norm
    if kind == "Dense":
        head = nn.Linear(*weights[0].shape, bias=config["use_bias"])
        head.weight.data = weights[0].T.contiguous()
        if config["use_bias"]:
            head.bias.data = weights[1]
        return head
    if kind == "Activation":
        return {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU()}[config["activation"]]
    if kind in ("AveragePooling2D", "MaxPooling2D"):
        pool = nn.AvgPool2d if kind == "AveragePooling2D" else nn.MaxPool2d
        return pool(config["pool_size"], config["strides"])
    if kind == "Rescaling":
        return lambda x: x * config["scale"] + config["offset"]
    return {
        "Add": lambda *parts: functools.reduce(torch.add, parts),
        "Average": lambda *parts: functools.reduce(torch.add, parts) / len(parts),
        "GlobalAveragePooling2D": lambda x: x.mean(dim=(2, 3)),
        "GlobalMaxPooling2D": lambda x: x.amax(dim=(2, 3)),
    }[kind]


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
