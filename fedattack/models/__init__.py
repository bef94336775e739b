"""Classifiers by name. `resolve` fills a :class:`ModelConfig`'s gaps, `build_model` makes the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.errors import BadRequest, ConfigError, DataError
from fedattack.models.classifiers.layers import kaiming_uniform
from fedattack.models.classifiers.precode import Bottlenecked
from fedattack.observation import Scenario
from fedattack.registry import Registry
from fedattack.rng import torch_rng
from fedattack.task import task_of, tied_names
from fedattack.training import training_mode


@runtime_checkable
class Initialised(Protocol):
    """A model that brings its published initialisation."""

    def initialise(self, generator: torch.Generator) -> None:
        """Overwrite all parameters with draws of `generator`."""


Builder = Callable[[ModelConfig], nn.Module]

MODELS: Registry[Builder] = Registry(
    "model",
    {
        "lenet-zhu": "fedattack.models.classifiers.lenet:lenet_zhu",
        "resnet18": "fedattack.models.classifiers.resnet:resnet18",
        "resnet20": "fedattack.models.classifiers.resnet:resnet20",
        "resnet20-4": "fedattack.models.classifiers.resnet:resnet20_4",
        "resnet34": "fedattack.models.classifiers.resnet:resnet34",
        "tiny-cnn": "fedattack.models.classifiers.lenet:tiny_cnn",
        "convnet": "fedattack.models.classifiers.convnet:convnet",
        "mlp": "fedattack.models.classifiers.lenet:mlp",
        "logistic": "fedattack.models.classifiers.lenet:logistic",
        "lcodec-cnn": "fedattack.models.classifiers.lcodec:lcodec_cnn",
        "imprint": "fedattack.models.armable.imprint:imprint",
        "imprint-sparse": "fedattack.models.armable.imprint:imprint_sparse",
        "loki": "fedattack.models.armable.loki:loki",
        "two-layer": "fedattack.models.armable.two_layer:two_layer",
        "lenet-two-layer": "fedattack.models.armable.two_layer:lenet_two_layer",
        "wgan-gp": "fedattack.generative.nets:wgan_gp",
        "wgan-gp-mlp": "fedattack.generative.nets:wgan_gp_mlp",
    },
    group="fedattack.models",
)

_PUBLISHED_HEADS = {"lenet-zhu": 10_177}
_PUBLISHED_ACTIVATIONS = {"lenet-zhu": "sigmoid", "two-layer": "poly3", "lenet-two-layer": "poly3"}
_WIDE = ("imprint", "imprint-sparse", "two-layer", "lenet-two-layer")
_WIDTHS = {
    **dict.fromkeys(_WIDE, 1024),
    "loki": 256,
    "mlp": 64,
    "resnet20-4": 64,
    "convnet": 64,
    "wgan-gp": 64,
    "wgan-gp-mlp": 256,
}
_HCGLA_RESNETS = {"resnet18", "resnet34"}
_FIXED_WIDTH = {"lenet-zhu", "resnet18", "resnet20", "resnet34", "tiny-cnn", "logistic", "lcodec-cnn"}


def resolve(model: ModelConfig, channels: int, image_size: int, classes: int) -> ModelConfig:
    """Fill what the configuration leaves open of `classes`, `channels`, `image_size`, `activation` and `width`.

    Raises ConfigError if the model is unknown, its head is narrower than the data's label space, or it has no free
    width or kernel sets.
    """
    MODELS.get(model.name)
    if model.width is not None and model.name in _FIXED_WIDTH:
        raise ConfigError(
            f"setting 'model.width' = {model.width}: model {model.name!r} has no free width; "
            f"{', '.join(sorted(_WIDTHS))} have"
        )
    if model.kernel_sets is not None and model.name in (_FIXED_WIDTH | _WIDTHS.keys()) - {"loki"}:
        raise ConfigError(
            f"setting 'model.kernel_sets' = {model.kernel_sets}: model {model.name!r} has no kernel sets; loki has"
        )
    activation = model.activation or _PUBLISHED_ACTIVATIONS.get(model.name, "relu")
    published_head = 500 if model.name in _HCGLA_RESNETS and activation == "sigmoid" else None
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
    """The module of a resolved configuration, in torch's default initialisation (see :func:`initial_weights`).

    Layers whose width is found at their first use are shown one blank image.
    """
    module = MODELS.get(model.name)(model)
    if any(isinstance(part, nn.modules.lazy.LazyModuleMixin) for part in module.modules()):
        channels, side, _ = model.resolved
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, side, side))
        module.train()
    return module if model.bottleneck is None else Bottlenecked(module, model.bottleneck)


def initial_weights(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """First global weights: read from `model.weights` (DataError if they do not fit), or drawn from (seed, "model").

    A model may bring its published initialisation as a method ``initialise(generator)``; others get Kaiming-uniform
    weights and zero biases. A state dict, float32 on the CPU (integer buffers keep their type).
    """
    module = build_model(model)
    if model.weights is not None:
        return read_weights(model.weights, module)
    generator = torch_rng(seed, "model")
    if isinstance(module, Initialised):
        with torch.no_grad():
            module.initialise(generator)
    else:
        kaiming_uniform(module, generator)
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def dry_run(batch: int, scenario: Scenario, seed: int) -> list[str]:
    """Train the scenario's model on one batch of noise, in vain, and look at what comes out.

    Answers what a person should know: which parameters are frozen, and which are one under several names. Raises
    BadRequest, in one sentence, where something stands in the way of training it.
    """
    task, model, shape = task_of(scenario), scenario.model, scenario.image_shape
    refusal, answer = f"setting 'model.name' = {model.name!r}:", (batch, *task.output(model))
    try:
        weights = initial_weights(model, seed)
        module = build_model(model)
        for name, tensor in weights.items():
            if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype != torch.float32):
                raise ConfigError(f"{refusal} {name!r} is of type {tensor.dtype}; only float32 is trained")
        module.load_state_dict(weights)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ConfigError(f"{refusal} it has no parameter that can be trained")
        images = torch.rand(batch, *shape, generator=torch_rng(seed, "dry run"))
        labels = torch.zeros(batch, dtype=torch.int64)
        with torch.random.fork_rng(devices=[]):
            training_mode(module, scenario.training.batch_norm)
            _check_answer(refusal, module(images), answer)
            loss, gradient = task.step(scenario, torch_rng(seed, "dry run"))(module, images, labels)
            if not all(bool(part.isfinite().all()) for part in (loss, *gradient)):
                raise ConfigError(
                    f"{refusal} its gradient holds NaN or infinite values on a batch of {batch}"
                )
            with torch.no_grad():
                _check_answer(refusal, module.eval()(images), answer)
        states = weights, module.state_dict()
        before, after = ({n: (t.shape, t.dtype) for n, t in state.items()} for state in states)
        if before != after:
            raise ConfigError(f"{refusal} its state dict changes names, shapes or types when it is used")
    except BadRequest:
        raise
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ConfigError(
            f"{refusal} cannot be trained on {batch} images of shape {shape}: {type(error).__name__}: {text}"
        ) from error
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [" = ".join(same) for same in names.values() if len(same) > 1]
    return [
        f"model {model.name!r}: {text}"
        for text, found in (
            (f"{len(frozen)} of {len(names)} parameters are frozen ({', '.join(frozen[:3])})", frozen),
            (f"one parameter under several names ({'; '.join(tied[:3])})", tied),
        )
        if found
    ]


def _check_answer(refusal: str, found: object, wanted: tuple[int, ...]) -> None:
    """Refuse what is no finite tensor of the shape `wanted`, the batch first."""
    batch = wanted[0]
    if not isinstance(found, Tensor) or found.shape != wanted:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ConfigError(f"{refusal} answers {what} to a batch of {batch}; logits {wanted} are needed")
    if not bool(found.isfinite().all()):
        raise ConfigError(f"{refusal} answers NaN or infinite values to a batch of {batch} images in [0, 1]")


def read_weights(path: str, module: nn.Module, setting: str = "model.weights") -> dict[str, Tensor]:
    """The module's state dict from a safetensors file, which `setting` names; DataError where it does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except FileNotFoundError:
        raise DataError(f"setting {setting!r} = {path!r}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"setting {setting!r} = {path!r}: not a readable safetensors file ({error})"
        ) from None
    state |= {name: state[kept] for name, kept in tied_names(module).items() if kept in state}
    wanted = module.state_dict()
    if state.keys() != wanted.keys() or any(state[n].shape != wanted[n].shape for n in wanted):
        raise DataError(f"setting {setting!r} = {path!r}: tensors do not fit the model")
    if not all(torch.isfinite(t).all() for t in state.values()):
        raise DataError(f"setting {setting!r} = {path!r}: holds NaN or infinite values")
    return {name: state[name].to(tensor.dtype, copy=True) for name, tensor in wanted.items()}


__all__ = ["MODELS", "build_model", "dry_run", "initial_weights", "read_weights", "resolve"]
