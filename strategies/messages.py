"""What is said between server and clients: the names in the records, and the arrays that carry tensors.

An instruction carries one :class:`ArrayRecord` :data:`ARRAYS` (the model) and one :class:`ConfigRecord`
:data:`CONFIG` (the round); a malicious client's also a :data:`QUESTION_OF` each attack that asks early. A reply
carries one ArrayRecord :data:`UPDATE`, in which the packed update lies under :data:`PACKED` and BatchNorm buffers
under their own names, and one MetricRecord :data:`METRICS`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message
from numpy.typing import NDArray
from torch import Tensor

from fedattack import npy
from fedattack.errors import PayloadError, told
from strategies.light_records import _NUMPY, HeldArray

ARRAYS = "arrays"
CONFIG = "config"
UPDATE = "update"
METRICS = "metrics"
QUESTION = "question"
QUESTION_OF = "question of {tag}"
PACKED = "update"

ROUND = "server-round"
EXCLUDED = "excluded"
"""Positions of its partition that the client that is told so no longer trains on; absent for none."""

SHARE = "share-of-steps"
"""What share of its local steps a client takes, at least one; absent for all."""

OBJECTIVE = "objective"
"""Where one gradient over all of the client's samples is asked for instead of a round: of "loss" or "forget"."""

FORGETTING = "forgetting"
"""Whether the round is one in which the server forgets; absent in training."""

TIMES = "times"
"""How many deletion requests have been answered before this invitation."""

NUM_EXAMPLES = "num-examples"
TRAIN_LOSS = "train_loss"
PARTITION = "partition-id"

TAG = "tag"
"""The name that an attack's questions and requests go by."""

DROPPED_OUT = 1001
"""Error code of a client that was drawn and does not answer."""

OVERSIZED = 1002
"""Error code that the grid puts in the place of a reply longer than any honest one."""


def reason_of(reply: Message) -> str:
    """Why a client did not answer, of a reply that is an error; in a line, whatever it says."""
    return told(reply.error.reason or "") or "no reason given"


def tag_of(seed: int, attack: str) -> str:
    """The name that an attack goes by in the messages of a run."""
    return hashlib.blake2b(f"{seed} {attack}".encode(), digest_size=8).hexdigest()


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

    Read-only, of exactly that shape and type, all finite; PayloadError where the bytes are anything else. No memory
    is allocated by what the header declares.
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
    try:
        header = npy.read_header(memoryview(array.data))
    except (ValueError, TypeError) as error:
        raise PayloadError(f"an array is not readable as npy: {error}") from None
    if header.shape != tuple(shape) or str(header.dtype) != dtype:
        raise PayloadError(
            f"an array of shape {header.shape} and type {header.dtype}, not {tuple(shape)} and {dtype}"
        )
    body = memoryview(array.data)[header.offset :]
    if len(body) != header.nbytes:
        raise PayloadError(f"an array declares {header.nbytes} bytes and brings {len(body)}")
    value = np.frombuffer(body, header.dtype).reshape(shape, order="F" if header.fortran else "C")
    _check_finite(value)
    return value


def _check_finite(value: NDArray[Any]) -> None:
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise PayloadError("an array holds NaN or infinite values")
