"""Everything that touches what Flower or Ray keep to themselves, written for flwr 1.41 and ray 2.55.

The rest of the project uses their public interfaces only. Whoever raises the pinned versions reads this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from strategies.light_records import HeldArray

SERVER_NODE = 1
"""Node id of the server, as Flower's SuperLink has it."""

CLIENT_RAISED = 2
"""Flower's error code of a ClientApp that raised an exception."""


@contextmanager
def server_identity(run_id: int) -> Iterator[None]:
    """Make this process the server of run `run_id` for the block: without it no instruction can be built."""
    fields = ("_task_id", "_run_id", "_node_id")
    before = [getattr(TaskIdentity, field) for field in fields]
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SERVER_NODE
    try:
        yield
    finally:
        for field, value in zip(fields, before, strict=True):
            setattr(TaskIdentity, field, value)


def empty_run(run_id: int) -> Run:
    """A run that only has a number."""
    return Run.create_empty(run_id)


def received(content: RecordDict, run_id: int, node: int, message_type: str, message_id: str) -> Message:
    """An instruction as the client's side receives it."""
    metadata = Metadata(
        run_id=run_id,
        message_id=message_id,
        src_node_id=SERVER_NODE,
        dst_node_id=node,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=float(2**40),
        message_type=message_type,
    )
    return Message(content=content, metadata=metadata)


def name_message(message: Message, message_id: str) -> None:
    """Give a message the id that a SuperLink would have given it."""
    message.metadata.__dict__["_message_id"] = message_id


Plain = list[tuple[str, str, dict[str, Any]]]
"""A RecordDict as plain values: (name, kind, entries). Arrays are ndarrays or (dtype, shape, stype, bytes)."""

Answer = Plain | tuple[int, str | None]
"""A reply as it travels: records as plain values, or an error's code and reason."""

_KINDS: dict[str, type[Any]] = {"arrays": ArrayRecord, "metrics": MetricRecord, "config": ConfigRecord}


def to_plain(records: RecordDict) -> Plain:
    """A RecordDict as plain values that pickle fast; ndarrays among them travel through Ray without a copy."""
    plain: Plain = []
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            plain.append((name, "arrays", {key: _plain_array(array) for key, array in record.items()}))
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            plain.append((name, kind, dict(record.items())))
    return plain


def from_plain(plain: Plain) -> RecordDict:
    """The RecordDict again."""
    records = RecordDict()
    for name, kind, entries in plain:
        if kind == "arrays":
            arrays = ArrayRecord()
            for key, value in entries.items():
                arrays[key] = HeldArray(value) if isinstance(value, np.ndarray) else Array(*value)
            records[name] = arrays
        else:
            records[name] = _KINDS[kind](entries)
    return records


def plain_answer(reply: Message) -> Answer:
    """A reply as it travels."""
    return (reply.error.code, reply.error.reason) if reply.has_error() else to_plain(reply.content)


def reply_of(message: Message, answer: Answer) -> Message:
    """The reply to a message again."""
    content = Error(*answer) if isinstance(answer, tuple) else from_plain(answer)
    return Message(content, reply_to=message)


def _plain_array(array: Array) -> Any:
    if isinstance(array, HeldArray):
        return array.view()
    return array.dtype, tuple(array.shape), array.stype, array.data


def size_of(records: RecordDict) -> int:
    """Bytes of all arrays and byte strings in a RecordDict, without writing any of them out."""
    total = 0
    for record in records.values():
        for value in record.values():
            if isinstance(value, HeldArray):
                total += value.view().nbytes
            elif isinstance(value, Array):
                total += len(value.data)
            elif isinstance(value, bytes | str):
                total += len(value)
            elif isinstance(value, list):
                total += sum(len(one) if isinstance(one, bytes | str) else 8 for one in value)
    return total


@contextmanager
def loopback_ray() -> Iterator[dict[str, Any]]:
    """While a private Ray starts, make it believe that this machine is 127.0.0.1, and yield arguments for ray.init.

    Ray 2.55 rewrites a loopback address to the machine's own and then listens on every interface, unless the two
    functions that find the address are replaced.
    """
    import ray._private.services as services

    before = services.resolve_ip_for_localhost, services.get_node_ip_address
    services.resolve_ip_for_localhost = lambda host: host
    services.get_node_ip_address = lambda *args, **kwargs: "127.0.0.1"
    try:
        yield {"_node_ip_address": "127.0.0.1"}
    finally:
        services.resolve_ip_for_localhost, services.get_node_ip_address = before
