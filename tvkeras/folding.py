"""BatchNorm folded into the layer before it, for a classifier that is only asked."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import keras
from keras import layers, ops

from tvkeras import cloning

Layer: TypeAlias = keras.layers.Layer
Tensor = Any
Weights = tuple[Sequence[Tensor], Sequence[Tensor]]  # trainable, and the rest


def folded(classifier: keras.Model) -> tuple[keras.Model, Callable[..., Weights]]:
    """The same function in inference mode, in fewer passes over memory.

    BatchNorm with given moments multiplies each channel and adds to it. So can the convolution
    or dense layer before it: through a pooling in between too, if that averages, or takes the
    largest and no channel changes its sign.

    Returns:
        A clone without those layers, and a function from the weights of `classifier`, trainable
        and other, to those of the clone. Where nothing can be folded, or where a clone is not
        the same function, `classifier` itself and the weights as they are.
    """
    itself = (classifier, lambda trainable, state: (trainable, state))
    norms = {id(layer): norm for layer, norm in _pairs(classifier)}
    gone = set(map(id, norms.values()))
    made: list[tuple[Layer, Layer]] = []

    def replaced(layer: Layer) -> Layer:
        if id(layer) in gone:
            return _Nothing(name=layer.name)
        bias = {"use_bias": True} if id(layer) in norms else {}
        made.append((layer, type(layer).from_config({**layer.get_config(), **bias})))
        return made[-1][1]

    def weights(trainable: Sequence[Tensor], state: Sequence[Tensor]) -> Weights:
        own = [*classifier.trainable_variables, *classifier.non_trainable_variables]
        live = dict(zip(map(id, own), [*trainable, *state], strict=True))
        values: dict[int, Tensor] = {}
        for layer, new in made:
            found = [live[id(variable)] for variable in layer.variables]
            if id(layer) in norms:
                found = _fold(found, norms[id(layer)], live)
            values.update(zip(map(id, new.variables), found, strict=True))
        parts = clone.trainable_variables, clone.non_trainable_variables
        one, other = ([values[id(variable)] for variable in part] for part in parts)
        return one, other

    if not norms:
        return itself
    try:
        clone = cloning.clone(classifier, replaced)
    except cloning.CloningError:
        return itself
    parts = classifier.trainable_variables, classifier.non_trainable_variables
    own = [[variable.value for variable in part] for part in parts]
    images = cloning.probe(classifier)
    logits = clone.stateless_call(*weights(*own), images, training=False)[0]
    same = cloning.agree(logits, classifier.stateless_call(*own, images, training=False)[0])
    return (clone, weights) if same else itself


class _Nothing(layers.Layer):
    """Stands where BatchNorm stood, and takes what it takes."""

    def call(self, inputs: Tensor, **_: Any) -> Tensor:
        """`inputs` as they are."""
        return inputs


def _fold(found: list[Tensor], norm: Layer, live: dict[int, Tensor]) -> list[Tensor]:
    """Kernel and bias of a layer that takes over what BatchNorm does to its outputs."""
    mean, variance = live[id(norm.moving_mean)], live[id(norm.moving_variance)]
    factor = ops.rsqrt(variance + norm.epsilon)
    if norm.scale:
        factor *= live[id(norm.gamma)]
    kernel, *bias = found
    shift = (bias[0] if bias else 0.0) - mean
    return [kernel * factor, shift * factor + (live[id(norm.beta)] if norm.center else 0.0)]


def _pairs(classifier: keras.Model) -> Iterator[tuple[Layer, Layer]]:
    """Layers that can take over a BatchNorm's work, and it."""
    for graph in cloning.graphs(classifier):
        before = _predecessors(graph)
        for norm in graph.layers:
            if type(norm) is not layers.BatchNormalization or norm.axis not in (-1, 3):
                continue
            layer = before.get(id(norm))
            while _passes(layer, norm):
                layer = before.get(id(layer))
            if _is_linear(layer):
                yield layer, norm


def _predecessors(graph: keras.Model) -> dict[int, Layer]:
    """Of layers with one input, by their id: the layer before, where its output goes nowhere else.

    A layer that is called more than once is taken for one that is called first: the comparison
    of the whole finds it out.
    """
    if isinstance(graph, keras.Sequential):
        return {id(layer): before for before, layer in itertools.pairwise(graph.layers)}
    uses = Counter(map(id, graph.outputs))
    made: dict[int, Layer] = {}
    before = {}
    for layer in graph.operations:
        inputs, outputs = map(keras.tree.flatten, (layer.input, layer.output))
        uses.update(map(id, inputs))
        made.update((id(tensor), layer) for tensor in outputs)
        if len(inputs) == 1:
            before[id(layer)] = id(inputs[0])
    alone = {layer: tensor for layer, tensor in before.items() if uses[tensor] == 1}
    return {layer: made[tensor] for layer, tensor in alone.items() if tensor in made}


def _passes(layer: Layer | None, norm: Layer) -> bool:
    """Whether a layer may as well come after what `norm` does to its inputs."""
    if getattr(layer, "data_format", "") != "channels_last":
        return False
    if isinstance(layer, layers.AveragePooling2D):
        return layer.padding == "valid"
    return isinstance(layer, layers.MaxPooling2D) and not norm.scale


def _is_linear(layer: Layer | None) -> bool:
    return (
        layer is not None
        and type(layer) in (layers.Conv2D, layers.Dense)
        and layer.activation is keras.activations.linear
        and getattr(layer, "data_format", "channels_last") == "channels_last"
        and len(layer.variables) == 1 + layer.use_bias
        and layer.compute_dtype in ("float32", "float64")
    )
