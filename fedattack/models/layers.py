"""Pieces shared by the classifiers."""

from __future__ import annotations

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


def activation(name: str | None) -> nn.Module:
    """A fresh activation module by the name used in the configuration."""
    assert name is not None, "resolve the model configuration first"
    return ACTIVATIONS[name]()
