"""The end of a classifier: its logits without the softmax."""

from typing import Any

import keras

from tvkeras import contract


def logits(classifier: keras.Model) -> keras.Model:
    """The same classifier without its final softmax.

    Args:
        classifier: Functional or Sequential, of one output, that ends in a softmax: a
            layer or operation, or the activation of a layer such as `Dense`.

    Returns:
        A model that shares all layers with `classifier`; where the softmax is the
        activation of a layer with weights, that layer is a new one with a copy of them.

    Raises:
        ValueError: If it does not end so.

    Example:
    ```python
    classifier = tvkeras.logits(keras.applications.MobileNetV3Small())
    ```
    """
    outputs: Any = getattr(classifier, "outputs", None)
    kind = contract.last_activation(classifier)[1] if outputs else ""
    if kind != "softmax" or len(outputs) != 1:
        raise ValueError(
            "classifier must be a functional or sequential model that ends in one softmax, got "
            f"{classifier!r}, which ends in {kind or 'none'}. Return the logits from its last "
            "layer (activation=None)."
        )
    history = outputs[0]._keras_history
    last = history.operation
    (features,) = last._inbound_nodes[history.node_index].input_tensors
    inputs = classifier.inputs[0] if len(classifier.inputs) == 1 else classifier.inputs
    return keras.Model(inputs, _without_softmax(last, features), name=classifier.name)


def _without_softmax(last: Any, features: Any) -> Any:
    """What the last operation gives `features`, but for the softmax."""
    if isinstance(last, keras.Model):
        return logits(last)(features)
    if not getattr(last, "weights", ()):
        return features
    linear = type(last).from_config({**last.get_config(), "activation": "linear"})
    result = linear(features)
    linear.set_weights(last.get_weights())
    return result
