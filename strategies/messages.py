"""What is said between server and clients: the names in the records, and the arrays that carry tensors.

An instruction carries one :class:`ArrayRecord` :data:`ARRAYS` (the model) and one :class:`ConfigRecord`
:data:`CONFIG` (the round). A reply carries one ArrayRecord :data:`UPDATE`, in which the packed update lies under
:data:`PACKED` and BatchNorm buffers under their own names, and one MetricRecord :data:`METRICS`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedattack.errors import PayloadError

ARRAYS = "arrays"
CONFIG = "config"
UPDATE = "update"
METRICS = "metrics"
PACKED = "update"

ROUND = "server-round"
EXCLUDED = "excluded-{client}"
"""Positions of its partition that client `client` no longer trains on; absent for none."""

NUM_EXAMPLES = "num-examples"
TRAIN_LOSS = "train_loss"
PARTITION = "partition-id"

DROPPED_OUT = 1001
"""Error code of a client that was drawn and does not answer."""

OVERSIZED = 1002
"""Error code that the grid puts in the place of a reply longer than any honest one."""

_NUMPY = "numpy.ndarray"
_MAX_HEADER = 4096


class HeldArray(Array):
    """A Flower array that holds its ndarray and writes the bytes only if somebody asks for them.

    Flower's own :class:`Array` writes and parses the npy format at each step; inside one process that costs more than
    the arithmetic.
    """

    def __init__(self, ndarray: NDArray[Any]) -> None:
        self.__dict__.update(_held=ndarray, _written=None)

    @property
    def dtype(self) -> str:
        """Name of the data type."""
        return str(self._value().dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self._value().shape)

    @property
    def stype(self) -> str:
        """Flower's name for the npy format, which `data` is in."""
        return _NUMPY

    @property
    def data(self) -> bytes:
        """The array in npy format."""
        if self.__dict__["_written"] is None:
            buffer = io.BytesIO()
            np.save(buffer, self._value(), allow_pickle=False)
            self.__dict__["_written"] = buffer.getvalue()
        written: bytes = self.__dict__["_written"]
        return written

    def _value(self) -> NDArray[Any]:
        value: NDArray[Any] = self.__dict__["_held"]
        return value

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
        """Flower's wire format."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()


class SteppedArray(HeldArray):
    """``base + scale * step`` computed when it is asked for, so that a thousand sparse replies stay sparse.

    Parameters
    ----------
    base : ndarray
        float32, the layer that was sent out; shared, never written to.
    values : ndarray
        float32, shape (k,) or (base.size,).
    positions : ndarray or None
        int64, shape (k,): flat positions in the layer; None when every entry was sent.
    scale : float
    """

    def __init__(
        self, base: NDArray[Any], values: NDArray[Any], positions: NDArray[Any] | None, scale: float
    ) -> None:
        self.__dict__.update(_base=base, _values=values, _positions=positions, _scale=scale, _written=None)

    @property
    def dtype(self) -> str:
        """Name of the data type."""
        return str(self.__dict__["_base"].dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
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
    """Mapping methods over a plain dict, in the place of those of Flower's records, which check each entry's type.

    With a thousand replies a round, the checks cost a fifth of the training. Records built here hold what was checked
    already.
    """

    def __init__(self, entries: dict[str, Any]) -> None:
        self.__dict__["_light"] = entries

    # It travels as Flower's own record, as the arrays do.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__mro__[2], (self._entries(),)

    def deflate(self) -> bytes:
        """Flower's wire format."""
        whole: bytes = type(self).__mro__[2](self._entries()).deflate()
        return whole

    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = self.__dict__["_light"]
        return entries

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
        """The ArrayRecords among them; writing here writes there."""
        return _Part(self._entries(), ArrayRecord)

    @property
    def metric_records(self) -> Any:
        """The MetricRecords among them; writing here writes there."""
        return _Part(self._entries(), MetricRecord)

    @property
    def config_records(self) -> Any:
        """The ConfigRecords among them; writing here writes there."""
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


def to_record(tensors: dict[str, Tensor]) -> ArrayRecord:
    """Name -> tensor as an ArrayRecord that shares their memory."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = HeldArray(tensor.detach().cpu().numpy())
    return record


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """An ArrayRecord from a trusted sender as name -> tensor; the caller owns the memory."""
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}


def read_dense(array: Array, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Open an array from a client, trusting nothing it declares.

    Parameters
    ----------
    array : Array
        In Flower's npy serialisation.
    shape : tuple of int
        The only accepted shape.
    dtype : str
        The only accepted data type.

    Returns
    -------
    ndarray
        A read-only view of the array's bytes, of exactly that shape and type, all finite.

    Raises
    ------
    PayloadError
        If the bytes are anything else. No memory is allocated by what the header declares.
    """
    if isinstance(array, HeldArray):
        value = array.view()
        if value.shape != shape or str(value.dtype) != dtype:
            raise PayloadError(
                f"an array of shape {value.shape} and type {value.dtype}, not {shape} and {dtype}"
            )
        _check_finite(value)
        return value
    if array.stype != _NUMPY:
        raise PayloadError(f"an array is serialised as {array.stype!r}, not {_NUMPY!r}")
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        found, fortran, kind = reader(stream, max_header_size=_MAX_HEADER)
    except (ValueError, KeyError) as error:
        raise PayloadError(f"an array is not readable as npy ({_first_line(error)})") from None
    if tuple(found) != tuple(shape) or str(kind) != dtype:
        raise PayloadError(
            f"an array of shape {tuple(found)} and type {kind}, not {tuple(shape)} and {dtype}"
        )
    body = memoryview(array.data)[stream.tell() :]
    count = math.prod(shape)
    if len(body) != count * kind.itemsize:
        raise PayloadError(f"an array declares {count * kind.itemsize} bytes and brings {len(body)}")
    value = np.frombuffer(body, dtype=kind).reshape(shape, order="F" if fortran else "C")
    _check_finite(value)
    return value


def _check_finite(value: NDArray[Any]) -> None:
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise PayloadError("an array holds NaN or infinite values")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
