"""A multi-layer perceptron wide enough that its matrix products, not Python, take the time."""

from __future__ import annotations

from torch import nn

from ..errors import WorkbenchError


def wide_mlp(width: int = 4096, hidden_layers: int = 2) -> nn.Sequential:
    """Images [N, 1, 28, 28] -> logits [N, 10] through layers of ``width`` with ReLU.

    Raises WorkbenchError if ``width`` or ``hidden_layers`` is below 1.
    """
    if width < 1 or hidden_layers < 1:
        raise WorkbenchError(
            f"wide-mlp: width and hidden_layers must be at least 1, got {width} and {hidden_layers}"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    features = 784
    for _ in range(hidden_layers):
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, 10))
