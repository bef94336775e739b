"""Linear layers with bias that a ReLU follows, wherever they stand: their gradients are inputs times sparse factors.

With z = W x + b and d_i = dL/dz_i of sample i, ``dL/dW = sum_i d_i x_i'`` and ``dL/db = sum_i d_i``, where d_i is
exactly zero for every neuron that is inactive at sample i.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.models.normalise import bare, normaliser
from fedattack.rng import torch_rng

# Functions of torch that hand on the numbers they are given, in another shape.
_SHAPES = {"view", "reshape", "flatten", "clone", "contiguous", "squeeze", "unsqueeze", "dropout", "dropout1d",
           "dropout2d", "feature_dropout", "alpha_dropout", "to", "type", "float", "double"}  # fmt: skip
# Whose answers are no less than zero where what they are given is.
_POSITIVE = _SHAPES | {
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "amax", "permute", "transpose"
}  # fmt: skip
_WORDS = {
    "leaky_relu": "leaky ReLU, which is zero for no neuron",
    "gelu": "GELU, whose slope is zero for no neuron",
    "linear": "another linear layer",
    "batch_norm": "BatchNorm",
    "layer_norm": "LayerNorm",
}


@dataclass(frozen=True)
class HiddenLayer:
    """A linear layer with bias before a ReLU.

    Attributes
    ----------
    name : str
        Of its module.
    neurons, inputs : int
        m and n of its weights, (m, n).
    pixels : bool
        Whether its inputs are the image's pixels themselves, or these normalised.
    positive : bool
        Whether no input can be below zero: a ReLU, or pooling behind one, hands them on.
    """

    name: str
    neurons: int
    inputs: int
    pixels: bool
    positive: bool
    biased: bool = True

    @property
    def weight(self) -> str:
        """State-dict name of W, shape (m, n)."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """State-dict name of b, shape (m,)."""
        return f"{self.name}.bias"


@lru_cache(maxsize=16)
def hidden_layers(model: ModelConfig) -> tuple[HiddenLayer, ...]:
    """Linear layers with a trained bias that only a ReLU follows, lowest first, found by trying a resolved model.

    Layers that see an image in several parts (tokens), or are called more than once, are none. NotApplicable where
    there is none, with what stands in the way of each linear layer.
    """
    usable, refused = _tried(model)
    if not usable:
        what = "; ".join(f"{name!r} {why}" for name, why in refused.items()) or "it has no linear layer"
        raise NotApplicable(
            f"model.name = {model.name!r} has no linear layer with bias that a ReLU follows, and this attack works "
            f"behind relu: {what}; use --model mlp or cnn-mcmahan with --activation relu"
        )
    return usable


def layer_named(model: ModelConfig, name: str) -> HiddenLayer:
    """One of :func:`hidden_layers` by its module's name; ConfigError for no such module, NotApplicable else."""
    usable, refused = _tried(model)
    for layer in usable:
        if layer.name == name:
            return layer
    names = ", ".join(repr(layer.name) for layer in usable)
    if name in refused:
        raise NotApplicable(
            f"spear.layer = {name!r}: it {refused[name]}; accepted: "
            + (f"auto, {names}" if names else "none here")
        )
    raise ConfigError(
        f"setting 'spear.layer' = {name!r}: no linear layer of the model; accepted: auto, {names}"
    )


@lru_cache(maxsize=16)
def _tried(model: ModelConfig) -> tuple[tuple[HiddenLayer, ...], dict[str, str]]:
    """The layers that will do, and of the other linear ones what stands in the way."""
    with torch.random.fork_rng(devices=[]):
        module = build_model(bare(model)).eval()
    channels, side, _ = model.resolved
    probe = torch.rand(2, channels, side, side, generator=torch_rng(0, "hidden layers"))
    follower = _Follower()
    if normaliser(model) is None:
        follower.positive.append(probe)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(
                lambda part, inputs, output, name=name: follower.passed(name, part, inputs[0], output)
            )
    with torch.no_grad(), follower:
        module(probe)
    usable: list[HiddenLayer] = []
    refused: dict[str, str] = {}
    for name, part, given, positive in follower.layers:
        if name in refused:
            continue
        if why := _unfit(part, given, follower.after[name]):
            refused[name] = why
            continue
        pixels = given.shape == (2, probe[0].numel()) and torch.equal(given, probe.flatten(1))
        found = HiddenLayer(name, part.out_features, part.in_features, pixels, positive)
        if any(one.name == name for one in usable):
            refused[name] = "is called more than once"
            usable = [one for one in usable if one.name != name]
        else:
            usable.append(found)
    return tuple(usable), refused


def _unfit(part: nn.Linear, given: Tensor, after: set[str]) -> str:
    """What keeps a linear layer from being read, or ""."""
    if part.bias is None:
        return "has no bias, whose gradient fixes the scale of what its rows hold"
    if not part.weight.requires_grad or not part.bias.requires_grad:
        return "is frozen, and its gradient is read"
    if given.shape != (2, part.in_features):
        return "sees an image in several parts"
    if after != {"relu"}:
        others = sorted(_WORDS.get(one, one.replace("_", " ")) for one in after - {"relu"})
        return "is followed by " + (" and ".join(others) if others else "nothing")
    return ""


class _Follower(TorchFunctionMode):
    """Sees which functions are given what linear layers answer, and what cannot be below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[str, nn.Linear, Tensor, bool]] = []
        self.after: dict[str, set[str]] = {}
        self.positive: list[Tensor] = []
        self._answers: list[tuple[Tensor, str]] = []

    def passed(self, name: str, part: nn.Linear, given: Tensor, answer: Tensor) -> None:
        """A linear layer was called."""
        positive = any(given is one for one in self.positive)
        self.layers.append((name, part, given, positive))
        self.after.setdefault(name, set())
        self._answers.append((answer, name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [part for one in args for part in (one if isinstance(one, tuple | list) else [one])]
        given = [one for one in [*flat, *(kwargs or {}).values()] if isinstance(one, Tensor)]
        sources = [name for answer, name in self._answers if any(answer is one for one in given)]
        positive = bool(given) and any(given[0] is one for one in self.positive)
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            name = getattr(func, "__name__", "").strip("_")
            if name in ("relu", "sigmoid", "softmax") or (positive and name in _POSITIVE):
                self.positive.append(found)
            # What is changed in place is the layer's answer no more.
            self._answers = [one for one in self._answers if one[0] is not found]
            for source in sources:
                if name in _SHAPES:
                    self._answers.append((found, source))
                else:
                    self.after[source].add(name)
        return found
