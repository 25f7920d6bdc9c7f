"""Gradient checkpointing: activations that a backward pass computes again instead of keeping."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tvkeras import backends

Tensor = Any


def segmented(classifier: keras.Model) -> Callable[..., tuple[Tensor, list[Tensor], list[Tensor]]]:
    """A classifier's `stateless_call` that keeps only what lies between its segments.

    The network is cut where a single tensor carries all that follows, such as between residual
    blocks. A backward pass computes a segment's activations again when it comes to it: one more
    forward pass, for the memory of one segment and of the cuts.

    Args:
        classifier: A functional or sequential model.

    Returns:
        A function of trainable and non-trainable values and of images, called with
        `training` and `return_losses=True`: logits, new non-trainable values, losses.

    Raises:
        ValueError: For a classifier without such cuts.

    Reference: Chen et al. (2016), arXiv:1604.06174.
    """
    parts = _parts(classifier)
    places = {
        id(variable): place
        for variables in (classifier.trainable_variables, classifier.non_trainable_variables)
        for place, variable in enumerate(variables)
    }

    def call(
        trainable: Sequence[Tensor],
        non_trainable: Sequence[Tensor],
        images: Tensor,
        *,
        training: bool,
        return_losses: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, state, losses = images, list(non_trainable), []
        for part in parts:

            def forward(*tensors: Any, part: keras.Model = part) -> tuple[Tensor, Any, Any]:
                return part.stateless_call(*tensors, training=training, return_losses=return_losses)

            own = [places[id(variable)] for variable in part.trainable_variables]
            buffers = [places[id(variable)] for variable in part.non_trainable_variables]
            x, new_state, more = backends.recomputed(forward)(
                [trainable[place] for place in own], [state[place] for place in buffers], x
            )
            for place, value in zip(buffers, new_state, strict=True):
                state[place] = value
            losses += more
        return x, state, losses

    return call


def _parts(classifier: keras.Model) -> list[keras.Model]:
    """The segments, of which the chosen division keeps least at once."""
    if not getattr(classifier, "inputs", None):
        raise ValueError(
            f"recompute needs a functional or sequential classifier, got {classifier.name!r}."
        )
    (images,), (logits,) = classifier.inputs, classifier.outputs
    steps = _steps(keras.Model(images, logits))
    total = sum(size for size, _ in steps)
    count = sum(cut is not None for _, cut in steps)
    divisions = [_division(steps, total / parts) for parts in range(2, count + 2)]
    if not divisions:
        raise ValueError(
            f"recompute needs a classifier that can be cut, got {classifier.name!r}: no tensor "
            "inside it carries all that follows."
        )
    _, cuts = min(divisions, key=lambda division: division[0])
    ends = [images, *cuts, logits]
    return [keras.Model(*pair) for pair in itertools.pairwise(ends)]


def _division(steps: Sequence[tuple[int, Tensor | None]], share: float) -> tuple[int, list[Tensor]]:
    """What a division into segments of about `share` keeps at most, and its cuts."""
    kept, largest, segment, cuts = 0, 0, 0, []
    for size, cut in steps:
        segment += size
        largest = max(largest, segment)
        if cut is not None and segment >= share:
            kept, segment = kept + math.prod(side or 1 for side in cut.shape), 0
            cuts.append(cut)
    return kept + largest, cuts


def _steps(classifier: keras.Model) -> list[tuple[int, Tensor | None]]:
    """For each call of a layer, in order: values it gives, and its output if that is a cut.

    A cut is a tensor that alone carries what follows; no layer is called on both sides.
    """
    depths = sorted(classifier._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in classifier._nodes_by_depth[depth]]
    last_read = {id(t): place for place, node in enumerate(nodes) for t in node.input_tensors}
    last_call = {node.operation: place for place, node in enumerate(nodes)}
    found: list[tuple[int, Tensor | None]] = []
    alive: set[int] = set()
    for place, node in enumerate(nodes):
        alive |= {id(tensor) for tensor in node.output_tensors}
        alive -= {tensor for tensor in alive if last_read.get(tensor, place) <= place}
        size = sum(math.prod(side or 1 for side in t.shape) for t in node.output_tensors)
        again = any(last_call[earlier.operation] > place for earlier in nodes[: place + 1])
        output = node.output_tensors[0]
        alone = alive == {id(output)} and node.input_tensors and not again
        found.append((size, output if alone else None))
    return found
