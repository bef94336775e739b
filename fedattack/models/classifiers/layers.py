"""Pieces shared by the classifiers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Poly3(nn.Module):
    """u^2 + u^3, the activation with which a wide layer's gradient is a polynomial of its weights."""

    def forward(self, u: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return u * u * (1 + u)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "poly3": Poly3,
}


def activation(name: str | None) -> nn.Module:
    """A fresh activation module by the name used in the configuration."""
    assert name is not None, "resolve the model configuration first"
    return ACTIVATIONS[name]()


@torch.no_grad()
def kaiming_uniform(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all convolutions and linear layers of `module`: U(-b, b) with b = sqrt(6 / inputs), zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = (6.0 / layer.weight[0].numel()) ** 0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
