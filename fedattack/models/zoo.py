"""Networks of torchvision and timm by name: ``torchvision/resnet18``, ``timm/vit_small_patch16_224``.

Nothing is fetched: a network starts from its library's own initialisation, drawn from the run's seed, or from a file
of weights (`model.weights`). Dropout and stochastic depth are off, so that the gradient of a batch is a function of
the batch: what clients would draw for them is private, and nobody could compute their gradients again.
"""

from __future__ import annotations

import copy
import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import nn

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError
from fedattack.models.classifiers.layers import ACTIVATIONS

Builder = Callable[[ModelConfig], nn.Module]
Build = Callable[[str, ModelConfig], nn.Module]
"""Makes a library's network of a name, without its family's."""

_RATES = ("p", "drop_prob", "dropout", "attention_dropout")
"""What layers that draw random numbers call their chance."""


def torchvision_model(name: str) -> Builder:
    """The classifier `name` of torchvision, its layers and state dict as published.

    ConfigError where torchvision knows no such classifier, or where it is built: for images of other than three
    channels, which its constructors do not take, or of a size that it cannot have.
    """
    known = _torchvision_names()
    if name not in known:
        raise _unknown("torchvision", name, known)
    return partial(_built, f"torchvision/{name}", _torchvision)


def timm_model(name: str) -> Builder:
    """The classifier `name` of timm (the extra ``timm``), its layers and state dict as published.

    ConfigError where timm is not installed or knows no such classifier, or where it is built: for images of a size
    that it cannot have.
    """
    timm = _timm_library()
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    return partial(_built, f"timm/{name}", _timm)


def _unknown(family: str, name: str, known: Sequence[str]) -> ConfigError:
    """The error for a name that a library does not know: with those near it, for it knows many."""
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
    return ConfigError(
        f"setting 'model.name' = '{family}/{name}': {family} knows no such classifier; near it: "
        f"{', '.join(f'{family}/{one}' for one in near)}"
    )


@cache
def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))


def _timm_library() -> Any:
    try:
        import timm
    except ImportError:
        raise ConfigError(
            "setting 'model.name': models of timm need the library of that name; install fedattack with the extra "
            "'timm', or use --model torchvision/..."
        ) from None
    return timm


def _torchvision(name: str, config: ModelConfig) -> nn.Module:
    from torchvision import models

    channels, side, classes = config.resolved
    if channels != 3:
        raise ConfigError(
            f"setting 'model.name' = 'torchvision/{name}' takes images of 3 channels, and these have {channels}; "
            "use a model of timm, or one of fedattack's own"
        )
    sizes: dict[str, Any] = {}
    if name.startswith("vit_"):
        sizes["image_size"] = side
    elif name.startswith("maxvit"):
        sizes["input_size"] = (side, side)
    elif name in ("googlenet", "inception_v3"):
        sizes |= {"aux_logits": False, "init_weights": False}
    return models.get_model(name, weights=None, num_classes=classes, **sizes)


def _timm(name: str, config: ModelConfig) -> nn.Module:
    timm = _timm_library()
    channels, side, classes = config.resolved
    published = timm.get_pretrained_cfg(name)
    sizes = {"img_size": side} if published is not None and published.fixed_input_size else {}
    module: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=classes, in_chans=channels, **sizes
    )
    return module


def _built(name: str, build: Build, config: ModelConfig) -> nn.Module:
    """A fresh module; weights of large networks are drawn once, for drawing takes longer than copying."""
    if torch.get_default_device().type == "meta":
        return _made(name, build, config)
    return copy.deepcopy(_prototype(name, build, config))


@lru_cache(maxsize=1)
def _prototype(name: str, build: Build, config: ModelConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return _made(name, build, config)


def _made(name: str, build: Build, config: ModelConfig) -> nn.Module:
    """The module, nothing in it left to chance, with its library's initialisation as ``initialise``."""
    try:
        module = build(name.partition("/")[2], config)
    except ConfigError:
        raise
    except Exception as error:  # what a library's constructor says of an image size
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ConfigError(
            f"setting 'model.name' = {name!r} cannot be built for {config.channels} channels, 'data.image_size' = "
            f"{config.image_size} and {config.classes} classes: {type(error).__name__}: {text}"
        ) from None
    switch_off_chance(module)
    if config.activation not in (None, "other"):
        exchange_activation(module, str(config.activation))
    own = _Initialisation(name, build, config)
    module.initialise = types.MethodType(own, module)  # type: ignore[assignment]
    return module


@dataclass(frozen=True)
class _Initialisation:
    """What a library draws for a network; see :class:`fedattack.models.Initialised`."""

    name: str
    build: Build
    config: ModelConfig

    def __call__(self, module: nn.Module, generator: torch.Generator) -> None:
        """Overwrite the module's weights, from a seed drawn of `generator`."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            drawn = self.build(self.name.partition("/")[2], self.config).state_dict()
        module.load_state_dict(drawn)


def switch_off_chance(module: nn.Module) -> None:
    """Set every chance of dropout and stochastic depth in a module to zero."""
    for part in module.modules():
        kind = type(part).__name__.lower()
        if not ("drop" in kind or "stochasticdepth" in kind or "attention" in kind):
            continue
        for rate in _RATES:
            if isinstance(getattr(part, rate, None), float):
                setattr(part, rate, 0.0)


_NAMES: Mapping[type[nn.Module], str] = {kind: name for name, kind in ACTIVATIONS.items()}
_GATES = ("sigmoid", "Hardsigmoid")
"""What closes the gates of squeeze-and-excitation blocks, beside the network's activation."""


def _kind(part: nn.Module) -> str | None:
    """Name of an activation module; its class's where no setting names it; None: it is none."""
    kind = type(part)
    if kind in _NAMES:
        return _NAMES[kind]
    if kind.__name__ in ("GELU", "GELUTanh"):  # timm's own
        return "gelu"
    no_activation = kind in (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax)
    return kind.__name__ if kind.__module__ == nn.ReLU.__module__ and not no_activation else None


def _activations(module: nn.Module) -> dict[str, str]:
    """Place -> name of the activations in a module, without gates where there is anything else."""
    found = {place: kind for place, part in module.named_modules() if (kind := _kind(part)) is not None}
    return {place: kind for place, kind in found.items() if kind not in _GATES} or found


def exchange_activation(module: nn.Module, wanted: str) -> None:
    """Put the activation `wanted` in the place of the module's own, as far as these are modules."""
    for place, kind in _activations(module).items():
        if kind != wanted:
            module.set_submodule(place, ACTIVATIONS[wanted]())
