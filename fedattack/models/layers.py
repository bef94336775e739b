"""Pieces shared by the classifiers."""

from __future__ import annotations

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
