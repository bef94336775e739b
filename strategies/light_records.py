"""Records that look like Flower's and copy nothing: all that writes into its internals."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

_NUMPY = "numpy.ndarray"


class HeldArray(Array):
    """A Flower array that holds its ndarray and writes the bytes only if somebody asks for them.

    Flower's own writes and parses npy at each step; inside one process that costs more than the arithmetic.
    """

    def __init__(self, ndarray: NDArray[Any]) -> None:
        self.__dict__.update(_held=ndarray, _written=None)

    @property
    def dtype(self) -> str:
        return str(self._value().dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._value().shape)

    @property
    def stype(self) -> str:
        return _NUMPY

    @property
    def data(self) -> bytes:
        if self.__dict__["_written"] is None:
            buffer = io.BytesIO()
            np.save(buffer, self._value(), allow_pickle=False)
            self.__dict__["_written"] = buffer.getvalue()
        return bytes(self.__dict__["_written"])

    def _value(self) -> NDArray[Any]:
        return np.asarray(self.__dict__["_held"])

    def view(self) -> NDArray[Any]:
        """The array itself, not to be written to."""
        return self._value()

    def numpy(self) -> NDArray[Any]:
        """A copy that the caller owns, as Flower's arrays give."""
        return self._value().copy()

    # It travels as a plain Array, by pickle or through a SuperLink: whoever opens it needs none of these classes.
    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def deflate(self) -> bytes:
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()


class SteppedArray(HeldArray):
    """``base + scale * step`` computed when it is asked for, so that a thousand sparse replies stay sparse.

    `base` is the layer that was sent out, float32, shared and never written to; `values` float32 (k,) or
    (base.size,); `positions` int64 (k,), flat in the layer, None when every entry was sent.
    """

    def __init__(
        self, base: NDArray[Any], values: NDArray[Any], positions: NDArray[Any] | None, scale: float
    ) -> None:
        self.__dict__.update(_base=base, _values=values, _positions=positions, _scale=scale, _written=None)

    @property
    def dtype(self) -> str:
        return str(self.__dict__["_base"].dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.__dict__["_base"].shape)

    def _value(self) -> NDArray[Any]:
        held = self.__dict__
        base, values, positions, scale = held["_base"], held["_values"], held["_positions"], held["_scale"]
        step = values if scale == 1.0 else values * values.dtype.type(scale)
        if positions is None:
            return np.asarray(base + step.reshape(base.shape))
        result = base.copy()
        result.reshape(-1)[positions] += step
        return np.asarray(result)

    def numpy(self) -> NDArray[Any]:
        """The sum, freshly computed: the caller owns it."""
        return self._value()


class _Light:
    """A dict's mapping methods in place of those of Flower's records: their type checks cost a fifth of training."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.__dict__["_light"] = entries

    # It travels as Flower's own record, as the arrays do.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__mro__[2], (self._entries(),)

    def deflate(self) -> bytes:
        return bytes(type(self).__mro__[2](self._entries()).deflate())

    def _entries(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.__dict__["_light"])

    def __getitem__(self, key: str) -> Any:
        return self.__dict__["_light"][key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.__dict__["_light"][key] = value

    def __delitem__(self, key: str) -> None:
        del self.__dict__["_light"][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self.__dict__["_light"])

    def __contains__(self, key: object) -> bool:
        return key in self._entries()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._entries() == dict(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._entries())

    def get(self, key: str, default: Any = None) -> Any:
        return self.__dict__["_light"].get(key, default)

    def keys(self) -> Any:
        return self.__dict__["_light"].keys()

    def values(self) -> Any:
        return self.__dict__["_light"].values()

    def items(self) -> Any:
        return self.__dict__["_light"].items()

    def copy(self) -> Any:
        return type(self)(dict(self._entries()))


class LightArrays(_Light, ArrayRecord):
    """An ArrayRecord of arrays that need no check."""


class LightMetrics(_Light, MetricRecord):
    """A MetricRecord of numbers that need no check."""


class LightRecords(_Light, RecordDict):
    """A RecordDict of records that need no check."""

    @property
    def array_records(self) -> Any:
        return _Part(self._entries(), ArrayRecord)

    @property
    def metric_records(self) -> Any:
        return _Part(self._entries(), MetricRecord)

    @property
    def config_records(self) -> Any:
        return _Part(self._entries(), ConfigRecord)


class _Part(dict[str, Any]):
    """The entries of one type of a dict, that are written through to it."""

    def __init__(self, whole: dict[str, Any], kind: type[Any]) -> None:
        super().__init__((key, record) for key, record in whole.items() if isinstance(record, kind))
        self._whole = whole

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._whole[key] = value

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        del self._whole[key]
