"""An update as a person has it (gradients, weight changes, two state dicts) and the model it belongs to."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedattack.errors import ConfigError
from fedattack.observation import Update, UpdateKind
from fedattack.task import tied_names

ACCEPTED = (
    "a list in the order of model.parameters(), a dict by parameter name (None: frozen), or the module or state dict "
    "after training"
)


@dataclass(frozen=True)
class Read:
    """What was read.

    `module`: a copy of the model as it was sent out, float32 on the CPU; what has no update is frozen. `buffers`: its
    BatchNorm statistics after training, where they came along.
    """

    module: nn.Module
    update: Update
    buffers: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def as_tensor(value: Any, what: str) -> Tensor:
    """A dense tensor on the CPU; ConfigError, which names `what`, if it is none or holds NaN or infinite values."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        tensor = (tensor if tensor.layout == torch.strided else tensor.to_dense()).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} is no array of numbers ({type(value).__name__}: {error})") from None
    if tensor.is_complex():
        raise ConfigError(f"{what} is of type {tensor.dtype}; real numbers are accepted")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        raise ConfigError(f"{what} holds {count} NaN or infinite of {tensor.numel():,} values")
    return tensor


def sent_out(model: nn.Module, weights: Mapping[str, Any] | None) -> nn.Module:
    """A copy of the model, float32 on the CPU, with the weights that were sent out where they are given."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    try:
        module = copy.deepcopy(model).float().cpu()
    except Exception as error:
        raise ConfigError(
            f"the model {type(model).__name__} cannot be copied ({error}); detach what it keeps of earlier calls"
        ) from error
    if weights is None:
        broken = [
            name
            for name, tensor in module.state_dict().items()
            if tensor.is_floating_point() and not bool(tensor.isfinite().all())
        ]
        if broken:
            raise ConfigError(f"weight {broken[0]!r} of the model holds NaN or infinite values")
        return module
    state, _ = _by_name(module, weights, "weights", buffers=True)
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys() - tied_names(module).keys())
    if missing:
        raise ConfigError(
            f"weights lack {missing[0]!r}{_and_more(missing)}; give all of the model's state dict"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in state:
                tensor.copy_(state[name])
    return module


def read_update(
    model: nn.Module,
    update: Any,
    kind: UpdateKind,
    weights: Mapping[str, Any] | None = None,
) -> Read:
    """The update of a model as it was sent out, checked against the model.

    Parameters
    ----------
    update
        :data:`ACCEPTED`. Values are gradients or weight changes, as `kind` says, but for a module or a complete
        state dict called after training, whose difference from `model` is taken (:class:`After`).
    weights
        State dict that was sent out; None: the model's own.

    Raises
    ------
    ConfigError
        In one sentence: what is missing, has another shape, is unknown, or not finite.
    """
    module = sent_out(model, weights)
    notes: list[str] = []
    if isinstance(update, nn.Module):
        while isinstance(update, nn.DataParallel | nn.parallel.DistributedDataParallel):
            update = update.module
        update = After(update.state_dict())
    after = isinstance(update, After)
    if after and kind != "delta":
        raise ConfigError(
            "an update given as the model after training is a weight change; use protocol='delta'"
        )
    parameters = dict(module.named_parameters())
    if after:
        state, notes_ = _by_name(module, update.state, "the model after training", buffers=True)
        own = module.state_dict()
        found: dict[str, Tensor | None] = {
            name: state[name].double() - own[name].double() for name in parameters if name in state
        }
        buffers = {
            n: state[n].float() for n, b in module.named_buffers() if n in state and b.is_floating_point()
        }
        for name, parameter in parameters.items():
            if not parameter.requires_grad and found.get(name) is not None:
                if bool(found[name].any()):  # type: ignore[union-attr]
                    raise ConfigError(f"parameter {name!r} is frozen (requires_grad False), and it changed")
                found[name] = None
    elif isinstance(update, Mapping):
        state, notes_ = _by_name(module, update, "the update", buffers=kind == "delta")
        found = {name: state.get(name) for name in parameters if name in state or name in update}
        changed = {n: b for n, b in module.named_buffers() if n in state and b.is_floating_point()}
        buffers = {name: buffer + state[name].float() for name, buffer in changed.items()}
    elif isinstance(update, Sequence | np.ndarray) and not isinstance(update, str):
        found, notes_ = _in_order(parameters, list(update)), []
        buffers = {}
    else:
        raise ConfigError(f"the update is a {type(update).__name__}; accepted: {ACCEPTED}")
    notes += notes_
    missing = [
        name for name, parameter in parameters.items() if parameter.requires_grad and name not in found
    ]
    if missing:
        raise ConfigError(
            f"the update lacks {missing[0]!r}{_and_more(missing)}; give every parameter, None where it is frozen"
        )
    values: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        value = found.get(name)
        parameter.requires_grad_(value is not None)
        if value is not None:
            values[name] = _fitting(value, parameter, f"the update of {name!r}")
    frozen = [name for name in parameters if name not in values]
    if not values:
        raise ConfigError("the update holds nothing: every parameter is None or frozen")
    if not any(bool(value.any()) for value in values.values()):
        raise ConfigError("the update holds nothing but zeros, in which there is nothing of an image")
    if frozen:
        notes.append(
            f"{len(frozen)} of {len(parameters)} parameters have no update ({', '.join(frozen[:3])})"
        )
    flat = torch.cat([value.flatten() for value in values.values()])
    shapes = tuple(tuple(value.shape) for value in values.values())
    return Read(module, Update(tuple(values), shapes, None, flat, kind), buffers, tuple(notes))


@dataclass(frozen=True)
class After:
    """A state dict after training, from which the sent one is to be taken off."""

    state: Mapping[str, Any]


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _fitting(value: Any, parameter: Tensor, what: str) -> Tensor:
    tensor = as_tensor(value, what)
    if tensor.shape != parameter.shape:
        raise ConfigError(
            f"{what} has shape {tuple(tensor.shape)}; the model's parameter has {tuple(parameter.shape)}"
        )
    large = tensor.double().abs().max() if tensor.numel() else torch.zeros(())
    if float(large) > torch.finfo(torch.float32).max:
        raise ConfigError(f"{what} reaches {float(large):g}, beyond float32")
    return tensor.float()


def _in_order(parameters: Mapping[str, nn.Parameter], update: list[Any]) -> dict[str, Any]:
    """Values by name of a list over all parameters, or over those that are trained."""
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    for names in (list(parameters), trained):
        if len(update) == len(names):
            return dict(zip(names, update, strict=True))
    raise ConfigError(
        f"the update is a list of {len(update)}; the model has {len(parameters)} parameters, {len(trained)} of them "
        "trained"
    )


def _by_name(
    module: nn.Module, given: Mapping[str, Any], what: str, *, buffers: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the names that the model has, of a dict that may be wrapped (DataParallel); None is left out."""
    if odd := [name for name in given if not isinstance(name, str)]:
        raise ConfigError(f"{what}: {odd[0]!r} is no name of a parameter")
    notes: list[str] = []
    known = module.state_dict()
    renamed = dict(given)
    if given and all(name.startswith("module.") for name in given) and not given.keys() & known.keys():
        renamed = {name.removeprefix("module."): value for name, value in given.items()}
        notes.append(f"{what}: 'module.' is taken off the names (DataParallel)")
    tied = tied_names(module)
    parameters = dict(module.named_parameters())
    state: dict[str, Tensor] = {}
    for name, value in renamed.items():
        kept = tied.get(name, name)
        if kept not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{what} has {name!r}, which the model has not{hint}")
        if value is None or (kept not in parameters and not buffers):
            continue
        state[kept] = as_tensor(value, f"{what}: {name!r}")
        if state[kept].shape != known[kept].shape:
            raise ConfigError(
                f"{what}: {name!r} has shape {tuple(state[kept].shape)}; the model's has {tuple(known[kept].shape)}"
            )
    return state, notes
