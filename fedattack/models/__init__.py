"""Classifiers by name. `resolve` fills a :class:`ModelConfig`'s gaps, `build_model` makes the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError, DataError
from fedattack.registry import Registry
from fedattack.rng import torch_rng


@runtime_checkable
class Initialised(Protocol):
    """A model that brings its published initialisation."""

    def initialise(self, generator: torch.Generator) -> None:
        """Overwrite all parameters with draws of `generator`."""


Builder = Callable[[ModelConfig], nn.Module]

MODELS: Registry[Builder] = Registry(
    "model",
    {
        "lenet-zhu": "fedattack.models.lenet:lenet_zhu",
        "resnet18": "fedattack.models.resnet:resnet18",
        "resnet34": "fedattack.models.resnet:resnet34",
        "tiny-cnn": "fedattack.models.lenet:tiny_cnn",
        "mlp": "fedattack.models.lenet:mlp",
        "two-layer": "fedattack.models.two_layer:two_layer",
        "lenet-two-layer": "fedattack.models.two_layer:lenet_two_layer",
    },
    group="fedattack.models",
)

_PUBLISHED_HEADS = {"lenet-zhu": 10_177}
_PUBLISHED_ACTIVATIONS = {"lenet-zhu": "sigmoid", "two-layer": "poly3", "lenet-two-layer": "poly3"}
_WIDTHS = {"two-layer": 1024, "lenet-two-layer": 1024}
_FIXED_WIDTH = {"lenet-zhu", "resnet18", "resnet34", "tiny-cnn", "mlp"}


def resolve(model: ModelConfig, channels: int, image_size: int, classes: int) -> ModelConfig:
    """Fill what the configuration leaves open.

    Parameters
    ----------
    model : ModelConfig
    channels, image_size, classes : int
        The data set's.

    Returns
    -------
    ModelConfig
        With `classes`, `channels`, `image_size` and `activation` set, and `width` where the model has one.

    Raises
    ------
    ConfigError
        If the model is unknown, its head is narrower than the data's label space, or it has no free width.
    """
    MODELS.get(model.name)
    if model.width is not None and model.name in _FIXED_WIDTH:
        raise ConfigError(
            f"setting 'model.width' = {model.width}: model {model.name!r} has no free width; "
            f"{' and '.join(sorted(_WIDTHS))} have"
        )
    activation = model.activation or _PUBLISHED_ACTIVATIONS.get(model.name, "relu")
    published_head = 500 if model.name.startswith("resnet") and activation == "sigmoid" else None
    head = model.classes or _PUBLISHED_HEADS.get(model.name) or published_head or classes
    resolved = model.model_copy(
        update={
            "classes": head,
            "channels": model.channels or channels,
            "image_size": model.image_size or image_size,
            "activation": activation,
            "width": model.width or _WIDTHS.get(model.name),
        }
    )
    if head < classes:
        raise ConfigError(f"setting 'model.classes' = {head}: the data set has {classes} classes")
    return resolved


def build_model(model: ModelConfig) -> nn.Module:
    """The module of a resolved configuration, in torch's default initialisation (see :func:`initial_weights`)."""
    return MODELS.get(model.name)(model)


def initial_weights(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """First global weights: read from `model.weights`, or drawn from (seed, "model").

    A model may bring its published initialisation as a method ``initialise(generator)``; others get Kaiming-uniform
    weights and zero biases.

    Returns
    -------
    dict of str to Tensor
        The state dict, float32 on the CPU (integer buffers keep their type).

    Raises
    ------
    DataError
        If `model.weights` is missing, is not safetensors, or does not fit.
    """
    module = build_model(model)
    if model.weights is not None:
        return _read_weights(model.weights, module)
    generator = torch_rng(seed, "model")
    with torch.no_grad():
        if isinstance(module, Initialised):
            module.initialise(generator)
        else:
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    bound = (6.0 / layer.weight[0].numel()) ** 0.5
                    layer.weight.uniform_(-bound, bound, generator=generator)
                    if layer.bias is not None:
                        layer.bias.zero_()
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _read_weights(path: str, module: nn.Module) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except FileNotFoundError:
        raise DataError(f"setting 'model.weights' = {path!r}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"setting 'model.weights' = {path!r}: not a readable safetensors file ({error})"
        ) from None
    wanted = module.state_dict()
    if state.keys() != wanted.keys() or any(state[n].shape != wanted[n].shape for n in wanted):
        raise DataError(f"setting 'model.weights' = {path!r}: tensors do not fit the model")
    if not all(torch.isfinite(t).all() for t in state.values()):
        raise DataError(f"setting 'model.weights' = {path!r}: holds NaN or infinite values")
    return state


__all__ = ["MODELS", "build_model", "initial_weights", "resolve"]
