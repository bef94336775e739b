"""What a Flower strategy keeps from round to round, as numbers and arrays: nothing is pickled."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from strategies.light_records import HeldArray

Arrays = dict[str, NDArray[Any]]

_CODE: tuple[type[Any], ...] = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    type,
    functools.partial,
    logging.Logger,
)
_RECORDS: dict[str, type[Any]] = {"metrics": MetricRecord, "config": ConfigRecord}


class NotCaptured(Exception):
    """A strategy keeps something that is neither numbers nor arrays; the message names it."""


def captured(strategy: Strategy) -> tuple[Any, Arrays]:
    """The strategy's attributes as a JSON-able tree and the arrays that it refers to; NotCaptured.

    Functions and classes are taken to be what a strategy of the same settings has again.
    """
    arrays: Arrays = {}
    return _taken(strategy, type(strategy).__name__, arrays), arrays


def restore(strategy: Strategy, tree: Any, arrays: Arrays) -> None:
    """Give a new strategy of the same settings what :func:`captured` took of an earlier one."""
    for name, kept in tree["attributes"].items():
        if "attributes" in kept:
            restore(getattr(strategy, name), kept, arrays)
        elif "code" not in kept:
            setattr(strategy, name, _given(kept, arrays))


def _taken(value: Any, where: str, arrays: Arrays) -> Any:
    if value is None or (
        isinstance(value, bool | int | float | str) and type(value) in (bool, int, float, str)
    ):
        return {"value": value}
    if isinstance(value, np.ndarray | np.generic):
        kept = np.array(value)
        if kept.dtype.hasobject:
            raise NotCaptured(f"{where} holds objects")
        arrays[str(len(arrays))] = kept
        return {"array" if isinstance(value, np.ndarray) else "scalar": str(len(arrays) - 1)}
    if isinstance(value, torch.Tensor):
        if value.requires_grad or value.dtype == torch.bfloat16:
            raise NotCaptured(f"{where} is a tensor that is differentiated, or of bfloat16")
        kept = value.detach().cpu().numpy().copy()
        arrays[str(len(arrays))] = kept
        return {"tensor": [str(len(arrays) - 1), str(value.device)]}
    if isinstance(value, ArrayRecord):
        found = {name: _taken(np.asarray(array.numpy()), where, arrays) for name, array in value.items()}
        return {"arrays": found}
    if isinstance(value, MetricRecord | ConfigRecord):
        kind = "metrics" if isinstance(value, MetricRecord) else "config"
        return {kind: _taken(dict(value.items()), where, arrays)}
    if type(value) is dict:
        pairs = [[_taken(k, where, arrays), _taken(v, f"{where}[{k!r}]", arrays)] for k, v in value.items()]
        return {"dict": pairs}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_taken(one, where, arrays) for one in value]}
    if isinstance(value, Strategy):
        named = {name: _taken(own, f"{where}.{name}", arrays) for name, own in vars(value).items()}
        return {"attributes": named}
    if isinstance(value, _CODE) or inspect.isroutine(value):
        return {"code": True}
    raise NotCaptured(f"{where} is a {type(value).__name__}")


def _given(kept: Any, arrays: Arrays) -> Any:
    ((kind, value),) = kept.items()
    if kind == "value":
        return value
    if kind == "array":
        return arrays[value].copy()
    if kind == "tensor":
        return torch.from_numpy(arrays[value[0]].copy()).to(value[1])
    if kind == "scalar":
        return arrays[value][()]
    if kind == "arrays":
        return ArrayRecord({name: HeldArray(_given(one, arrays)) for name, one in value.items()})
    if kind in _RECORDS:
        return _RECORDS[kind](_given(value, arrays))
    if kind == "dict":
        return {_given(k, arrays): _given(v, arrays) for k, v in value}
    found = [_given(one, arrays) for one in value]
    return tuple(found) if kind == "tuple" else found
