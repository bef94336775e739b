"""Classifiers by name. `resolve` fills a :class:`ModelConfig`'s gaps, `build_model` makes the module."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig, TrainingConfig
from fedattack.errors import BadRequest, ConfigError, DataError, RunFailed
from fedattack.models.classifiers.layers import kaiming_uniform
from fedattack.models.classifiers.precode import Bottlenecked
from fedattack.models.live import Live, called, seeded, traits
from fedattack.models.normalise import attach
from fedattack.models.registry import MODELS
from fedattack.models.weights import read_state
from fedattack.observation import Scenario
from fedattack.rng import torch_rng
from fedattack.task import task_of, tied_names
from fedattack.training import (
    HOPELESS_LOSS,
    load_weights,
    local_update,
    training_mode,
    weight_step,
)


@runtime_checkable
class Initialised(Protocol):
    """A model that brings its published initialisation."""

    def initialise(self, generator: torch.Generator) -> None:
        """Overwrite all parameters with draws of `generator`."""


_BUILT_IN = frozenset(MODELS.names())

_PUBLISHED_HEADS = {"lenet-zhu": 10_177}
_PUBLISHED_ACTIVATIONS = {"lenet-zhu": "sigmoid", "two-layer": "poly3", "lenet-two-layer": "poly3"}
_WIDE = ("imprint", "imprint-sparse", "two-layer", "lenet-two-layer")
_WIDTHS = {
    **dict.fromkeys(_WIDE, 1024),
    "loki": 256,
    "mlp": 64,
    "resnet20-4": 64,
    "convnet": 64,
    "cnn-mcmahan": 512,
    "wgan-gp": 64,
    "wgan-gp-mlp": 256,
}
_COPIES = 6
"""Of a model at once, about: the server's, the client's, gradients, an update and its wire format."""

_LARGE = 50_000_000
"""Parameters from which on a model's size is said."""

_NOISE = 4
"""Images of noise on which training is tried."""

_MOST_STEPS = 5
"""Steps in which training is tried."""

_FAR_FROM_A_GUESS = 50.0
"""A cross-entropy that no reasonable first weights have, whatever the number of classes."""

_HCGLA_RESNETS = {"resnet18", "resnet34"}
_FIXED_WIDTH = {
    "lenet-zhu",
    "resnet18",
    "resnet20",
    "resnet34",
    "tiny-cnn",
    "cnn-flower",
    "logistic",
    "lcodec-cnn",
}


def resolve(model: ModelConfig, channels: int, image_size: int, classes: int) -> ModelConfig:
    """Fill what the configuration leaves open of `classes`, `channels`, `image_size`, `activation` and `width`.

    Of a model that is not built in, activation and head are found by trying it. Raises ConfigError if the model is
    unknown, its head is narrower than the data's label space, it has no free width or kernel sets, or a mean or
    deviation does not fit the channels.
    """
    builder = MODELS.get(model.name)
    library = MODELS.family(model.name) is not None
    foreign = library or isinstance(builder, Live | nn.Module) or ":" in model.name
    if model.activation == "other" and not foreign:
        raise ConfigError(
            f"setting 'model.activation' = 'other': model {model.name!r} is made with one of sigmoid, relu, tanh, "
            "gelu, softplus, poly3"
        )
    model = _normalised(model, model.channels or channels)
    if model.width is not None and (model.name in _FIXED_WIDTH or library):
        raise ConfigError(
            f"setting 'model.width' = {model.width}: model {model.name!r} has no free width; "
            f"{', '.join(sorted(_WIDTHS))} have"
        )
    others = (_FIXED_WIDTH | _WIDTHS.keys()) - {"loki"}
    if model.kernel_sets is not None and (model.name in others or library):
        raise ConfigError(
            f"setting 'model.kernel_sets' = {model.kernel_sets}: model {model.name!r} has no kernel sets; loki has"
        )
    published = "other" if library else _PUBLISHED_ACTIVATIONS.get(model.name, "relu")
    activation = model.activation or published
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
    if foreign:
        resolved = _tried(resolved, model)
        head = resolved.resolved[2]
    if head < classes:
        raise ConfigError(f"setting 'model.classes' = {head}: the data set has {classes} classes")
    return resolved


def _normalised(model: ModelConfig, channels: int) -> ModelConfig:
    """The model with a mean and a deviation for each channel, where it has one for all."""
    changed: dict[str, tuple[float, ...]] = {}
    for name, low in (("mean", 0.0), ("std", 1e-6)):
        values = getattr(model, name)
        if values is None:
            continue
        if len(values) not in (1, channels) or not all(low <= value <= 1 for value in values):
            raise ConfigError(
                f"setting 'data.{name}' = {', '.join(f'{value:g}' for value in values)}: images have {channels} "
                f"channel(s) in [0, 1]; accepted: 1 or {channels} numbers from {low:g} to 1"
            )
        if model.name.startswith("wgan-gp"):
            raise ConfigError(
                f"setting 'data.{name}': model {model.name!r} makes images as they are; leave it open"
            )
        changed[name] = values * (channels // len(values))
    return model.model_copy(update=changed) if changed else model


def parameter_count(model: ModelConfig) -> int:
    """Numbers that a resolved model has; nothing is computed, and of a built-in one nothing is taken in memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if model.name in _BUILT_IN else "cpu"):
        return sum(parameter.numel() for parameter in called(MODELS.get(model.name), model).parameters())


def check_size(model: ModelConfig, as_stored: bool) -> str:
    """What to know of a model that is larger than its images need; "" where it is not.

    `as_stored`: whether the images have the size in which their source has them, and nobody chose it. ConfigError,
    with sizes that would do, where training it needs more memory than is free.
    """
    if model.name not in _BUILT_IN:
        return ""
    channels, side, _ = model.resolved
    count, free = parameter_count(model), psutil.virtual_memory().available
    needed = 4 * count * _COPIES
    if count < _LARGE and needed < free:
        return ""
    smaller = [
        (size, parameter_count(model.model_copy(update={"image_size": size})))
        for size in (32, 64, 128)
        if size < side
    ]
    fitting = [f"{size} ({n:,})" for size, n in smaller if n < count and 4 * n * _COPIES < free]
    chosen = "as they are stored, " if as_stored else ""
    what = (
        f"model {model.name!r} has {count:,} parameters for images of {channels} x {side} x {side} ({chosen}"
        f"{4 * count / 2**30:.1f} GiB a copy)"
    )
    advice = f"; --image-size {' or '.join(fitting)} makes it smaller" if fitting else ""
    if needed > free:
        raise ConfigError(
            f"setting 'data.image_size' = {None if as_stored else side}: {what}, training it takes about "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free{advice or '; use a smaller model'}"
        )
    return what + advice


def _tried(resolved: ModelConfig, asked: ModelConfig) -> ModelConfig:
    """What trying a model tells of its activation and its head; ConfigError where it takes no such images."""
    channels, side, _ = resolved.resolved
    # A library's network may be too large for this machine, and its shapes are enough.
    library = MODELS.family(resolved.name) is not None
    with torch.random.fork_rng(devices=[]), torch.device("meta") if library else nullcontext():
        module = build_model(resolved)
    try:
        found, answer = traits(module, (channels, side, side))
    except Exception as error:
        refusal = f"setting 'model.name' = {resolved.name!r}:"
        raise ConfigError(f"{refusal} cannot be run on {_why((channels, side, side), error)}") from error
    if library and asked.activation not in (None, found) and found != "other":
        raise ConfigError(
            f"setting 'model.activation' = {asked.activation!r}: that of model {asked.name!r} ({found}) is no module "
            "that could be exchanged; leave it open"
        )
    update: dict[str, object] = {} if asked.activation else {"activation": found}
    if asked.classes is None and len(answer) == 1:
        update["classes"] = answer[0]
    return resolved.model_copy(update=update)


def build_model(model: ModelConfig) -> nn.Module:
    """The module of a resolved configuration, in torch's default initialisation (see :func:`initial_weights`).

    It normalises images itself where the configuration has a mean or a deviation. Layers whose width is found at
    their first use are shown one blank image. ConfigError where a plug-in makes no module.
    """
    module = called(MODELS.get(model.name), model)
    if any(isinstance(part, nn.modules.lazy.LazyModuleMixin) for part in module.modules()):
        channels, side, _ = model.resolved
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, side, side))
        module.train()
    return attach(module if model.bottleneck is None else Bottlenecked(module, model.bottleneck), model)


def initial_weights(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """First global weights: read from `model.weights` (DataError if they do not fit), or drawn from (seed, "model").

    A model may bring its published initialisation as a method ``initialise(generator)``; others, and all where
    `model.initialisation` says so, get Kaiming-uniform weights and zero biases; a live one keeps its own weights. A
    state dict, float32 on the CPU (integer buffers keep their type).
    """
    module = seeded(lambda: build_model(model), seed)
    if model.weights is not None:
        return read_weights(model.weights, module)
    generator = torch_rng(seed, "model")
    if isinstance(MODELS.get(model.name), Live | nn.Module):
        if isinstance(module, Bottlenecked):
            kaiming_uniform(module.encoder, generator)
            kaiming_uniform(module.decoder, generator)
    elif isinstance(module, Initialised) and model.initialisation == "published":
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
        raise ConfigError(f"{refusal} cannot be trained on {batch} {_why(shape, error)}") from error
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [" = ".join(same) for same in names.values() if len(same) > 1]
    said = "" if model.weights is None else read_state(model.weights, "model.weights", module.state_dict())[1]
    return [said] * bool(said) + [
        f"model {model.name!r}: {text}"
        for text, found in (
            (f"{len(frozen)} of {len(names)} parameters are frozen ({', '.join(frozen[:3])})", frozen),
            (f"one parameter under several names ({'; '.join(tied[:3])})", tied),
        )
        if found
    ]


def hopeless(scenario: Scenario, seed: int, trains: bool = True) -> str:
    """Why the classifier of a scenario cannot be trained from its first weights, and what could; "" where it can.

    Known by trying, on four images of noise, two of the agreed steps, and three more where the loss is still far from
    that of a guess: no loss may reach :data:`fedattack.training.HOPELESS_LOSS`, and the model must not come to answer
    the same to all images (dead ReLUs). `trains`: whether anything hangs on it; if not, a model is tried only whose
    first loss is far from a guess.
    """
    if task_of(scenario).kind != "classify" or parameter_count(scenario.model) > _LARGE:
        return ""
    model, training = scenario.model, scenario.training
    if not (what := _tried_to_train(model, training, seed, trains)):
        return ""
    drawn = model.weights is None and model.initialisation == "published"
    other = model.model_copy(update={"initialisation": "kaiming"})
    better = drawn and not _tried_to_train(other, training, seed, True)
    offer = "model.initialisation = kaiming, another model (cnn-mcmahan, tiny-cnn) or " if better else ""
    return (
        f"model {model.name!r} ({model.activation}) cannot be trained from its "
        f"{'published initialisation' if better else 'first weights'} at a step of {_step(training):g}: {what}; what "
        f"is found on it says little about trained models; accepted: {offer}a smaller step"
    )


def _step(training: TrainingConfig) -> float:
    """By what a gradient is multiplied, of the server's or the client's optimiser."""
    return -weight_step(training, "gradient") if training.protocol == "fedsgd" else training.learning_rate


@lru_cache(maxsize=32)
def _tried_to_train(model: ModelConfig, training: TrainingConfig, seed: int, trains: bool) -> str:
    """What goes wrong in a few plain steps on noise; "" where nothing does."""
    channels, side, classes = model.resolved
    images = torch.rand(_NOISE, channels, side, side, generator=torch_rng(seed, "dry run"))
    labels = torch.arange(_NOISE) % classes
    plain = {"protocol": "fedavg", "learning_rate": _step(training), "local_steps": 1, "local_epochs": None}
    agreed = training.model_copy(update=plain | {"momentum": 0.0, "weight_decay": 0.0})
    module, weights, losses = build_model(model), initial_weights(model, seed), list[float]()
    with torch.random.fork_rng(devices=[]):
        for number in range(_MOST_STEPS + 1):
            try:
                found = local_update(module, weights, images, labels, [np.arange(_NOISE)], agreed)
                losses.append(found.loss)
            except RunFailed:
                losses.append(math.inf)
            if losses[-1] >= HOPELESS_LOSS:
                return f"on noise its loss goes {', '.join(f'{loss:.3g}' for loss in losses)}"
            enough = 0 if not trains else _MOST_STEPS if max(losses) > _FAR_FROM_A_GUESS else 2
            if number == enough and max(losses) <= _FAR_FROM_A_GUESS:
                return ""
            weights = {n: w + found.update[n] if n in found.update else w for n, w in weights.items()}
        load_weights(module, weights)
        with torch.no_grad():
            logits = training_mode(module, training.batch_norm)(images)
    same = bool((logits == logits[0]).all())
    return f"after {_MOST_STEPS} steps on noise it answers the same to every image" if same else ""


def _why(shape: tuple[int, ...], error: Exception) -> str:
    """What a model said of images."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"images of shape {shape}: {type(error).__name__}: {text}"


def _check_answer(refusal: str, found: object, wanted: tuple[int, ...]) -> None:
    """Refuse what is no finite tensor of the shape `wanted`, the batch first."""
    batch = wanted[0]
    if not isinstance(found, Tensor) or found.shape != wanted:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ConfigError(f"{refusal} answers {what} to a batch of {batch}; logits {wanted} are needed")
    if not bool(found.isfinite().all()):
        raise ConfigError(f"{refusal} answers NaN or infinite values to a batch of {batch} images in [0, 1]")


def read_weights(path: str, module: nn.Module, setting: str = "model.weights") -> dict[str, Tensor]:
    """The module's state dict from a file (:func:`~fedattack.models.weights.read_state`), which `setting` names.

    Numbers of any type become those of the module. DataError where it does not fit.
    """
    wanted = module.state_dict()
    state, _ = read_state(path, setting, wanted)
    state |= {name: state[kept] for name, kept in tied_names(module).items() if kept in state}
    refusal = f"setting {setting!r} = {path!r}:"
    for name in [*wanted, *state]:
        shapes = [tuple(held[name].shape) if name in held else "nothing" for held in (state, wanted)]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"{refusal} tensors do not fit the model: {name!r} is {shapes[0]} there, and {shapes[1]} in the model"
            )
    found = {name: state[name].to(tensor.dtype, copy=True) for name, tensor in wanted.items()}
    if not all(torch.isfinite(tensor).all() for tensor in found.values()):
        raise DataError(f"{refusal} holds NaN or infinite values")
    return found


__all__ = ["MODELS", "build_model", "dry_run", "hopeless", "initial_weights", "read_weights", "resolve"]
