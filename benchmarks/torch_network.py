"""A functional Keras model in PyTorch, for benchmarks that compare the two."""

import functools
import json
import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Layer = Callable[..., torch.Tensor]


class Network(nn.Module):
    """A functional Keras model of the layers in `_layer`.

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

    def fold(self) -> None:
        """Folds each BatchNorm into the convolution before it, as who attacks a network would do.

        Through a pooling too: a factor is positive where that matters.
        """
        self.eval()
        for name, (inputs, norm) in self.steps.items():
            if isinstance(norm, nn.BatchNorm2d):
                before = inputs[0]
                while not isinstance(self.steps[before][1], nn.Conv2d):
                    (before,) = self.steps[before][0]
                self._set(before, fuse_conv_bn_eval(self.steps[before][1], norm))
                self._set(name, nn.Identity())

    def _set(self, name: str, layer: nn.Module) -> None:
        self.add_module(name, layer)
        self.steps[name] = self.steps[name][0], layer

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
