"""JSON that any reader accepts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedattack import reading
from fedattack.errors import DataError
from fedattack.files import write_bytes


def write_json(path: Path, document: Any, private: bool = False) -> None:
    """Write strictly valid JSON (see :func:`plain`), whole or not at all; `private`: for its owner alone."""
    text = json.dumps(plain(document), indent=1, allow_nan=False)
    write_bytes(path, text.encode() + b"\n", private=private)


def read_json(path: Path) -> Any:
    """Read a JSON file; DataError where it is missing or is no JSON."""
    try:
        return reading.read_json(path)
    except reading.Unreadable as error:
        raise DataError(f"{path} is not readable JSON: {error.reason}") from None


def plain(value: Any) -> Any:
    """The same value in JSON's own types: NaN as null, infinities as "inf" and "-inf", tensors as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str | int | bool | None):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, set | frozenset):
        return sorted(plain(inner) for inner in value)
    if isinstance(value, Sequence):
        return [plain(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def number(value: Any) -> float:
    """A float back from :func:`plain`'s spelling of it."""
    return math.nan if value is None else float(value)


def flat(document: Mapping[str, Any], joint: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, their keys joined."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        found |= flat(value, joint, name + joint) if isinstance(value, Mapping) else {name: value}
    return found
