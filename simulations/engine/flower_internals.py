"""Everything that touches what Flower or Ray keep to themselves, tried with flwr 1.41 and 1.42 and ray 2.55.

The rest of the project uses their public interfaces only. Where a version lacks something of it, the engines here and
a private Ray say so in one sentence (:func:`check_flower`, :func:`loopback_ray`); what needs none of it, ``flwr run``
and a cluster that is joined, goes on. Whoever raises the tried versions reads this file.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedattack.errors import ConfigError
from strategies.light_records import HeldArray

try:
    from flwr.app.metadata import Metadata
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    MISSING = [
        f"{owner.__name__}.{name}"
        for owner, names in ((TaskIdentity, ("_task_id", "_run_id", "_node_id")), (Run, ("create_empty",)))
        for name in names
        if not hasattr(owner, name)
    ]
    """What this version of Flower lacks of what the engines here use."""
except ImportError as error:
    MISSING = [error.name or str(error)]

TRIED = "1.41 and 1.42"
"""Versions of Flower that this file was written for."""

SERVER_NODE = 1
"""Node id of the server, as Flower's SuperLink has it."""

CLIENT_RAISED = 2
"""Flower's error code of a ClientApp that raised an exception."""


def check_flower() -> None:
    """ConfigError where this version of Flower lacks what the engines here are built on."""
    if MISSING:
        raise ConfigError(
            f"flwr {version('flwr')} lacks {MISSING[0]}, on which --engine ray and inline are built (tried with "
            f"{TRIED}); install one of those, or use `flwr run .`"
        )


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
def loopback_ray(dashboard: bool = False) -> Iterator[dict[str, Any]]:
    """While a private Ray starts, make it believe that this machine is 127.0.0.1, and yield arguments for ray.init.

    RuntimeError where this version of Ray cannot be made to. Ray 2.55 rewrites a loopback address to the machine's
    own and then listens on every interface, unless the two functions that find the address are replaced. Its
    processes look for theirs by way of 8.8.8.8, unless told that there is no cluster. Without a dashboard its API
    server does nothing but ask the clouds' metadata addresses which of them this is, even where usage statistics are
    off: it is not started.
    """
    import ray._private.services as services
    from ray._private.node import Node

    replaced: list[tuple[Any, str, Any]] = [
        (services, "resolve_ip_for_localhost", lambda host: host),
        (services, "get_node_ip_address", lambda *args, **kwargs: "127.0.0.1"),
        *([] if dashboard else [(Node, "start_api_server", lambda *args, **kwargs: None)]),
    ]
    if lacking := [name for owner, name, _ in replaced if not hasattr(owner, name)]:
        raise RuntimeError(
            f"ray {version('ray')} lacks {lacking[0]}, by which a private one is kept on this machine (tried with "
            "2.55)"
        )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    told = os.environ.get(_NO_CLUSTER)
    os.environ[_NO_CLUSTER] = "0"
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield {"_node_ip_address": "127.0.0.1"}
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        if told is None:
            del os.environ[_NO_CLUSTER]
        else:
            os.environ[_NO_CLUSTER] = told


_NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where it is 0, Ray's processes take the machine for 127.0.0.1 on every system, whatever the name says."""


@contextmanager
def ray_told_to(log: Callable[[str], None]) -> Iterator[None]:
    """Give the first line of what Ray has to say of its own to `log`, instead of twenty to standard output."""
    import ray._private.worker as worker

    before = getattr(worker, "print_to_stdstream", None)

    def told(data: Any, *rest: Any, **named: Any) -> None:
        for text in data.get("lines", ()):
            log(str(text).partition("\n")[0])

    if before is not None:
        worker.print_to_stdstream = told
    try:
        yield
    finally:
        if before is not None:
            worker.print_to_stdstream = before


def ray_lifelines() -> dict[str, Callable[[], bool]]:
    """What this process cannot do without: what to say when it is gone -> whether it is there.

    Of a private Ray its own processes; of a cluster the raylet of this machine, and the head, which is called now and
    then.
    """
    node = _this_node()
    if node is None:
        return {}
    if node.head:
        kinds = {"gcs_server": "Ray's control process (gcs_server) ended", "raylet": "Ray's raylet ended"}
        return {
            words: partial(_runs, process.process)
            for kind, words in kinds.items()
            for process in node.all_processes.get(kind, [])
        }
    lines: dict[str, Callable[[], bool]] = {
        f"the head of the Ray cluster, {node.gcs_address}, has not answered for {HEAD_SECONDS:.0f} s": _Head(
            node.gcs_address
        )
    }
    if (raylet := raylet_pid()) is not None:
        lines["Ray's raylet ended"] = partial(psutil.pid_exists, raylet)
    return lines


def raylet_pid() -> int | None:
    """The raylet that this process works with, None where it is not found."""
    node = _this_node()
    for one in node.all_processes.get("raylet", []) if node is not None else ():
        return int(one.process.pid)
    for process in psutil.process_iter(["name", "cmdline"]) if node is not None else ():
        told = " ".join(process.info["cmdline"] or ())
        if process.info["name"] == "raylet" and f"raylet_socket_name={node.raylet_socket_name}" in told:
            return int(process.pid)
    return None


def end_ray() -> None:
    """End the processes of a private Ray and what they started, without asking them."""
    node = _this_node()
    ended: list[psutil.Process] = []
    for processes in node.all_processes.values() if node is not None and node.head else ():
        for one in processes:
            with suppress(psutil.Error):
                first = psutil.Process(one.process.pid)
                ended += [*first.children(recursive=True), first]
    for one in reversed(ended):  # who starts others first
        with suppress(psutil.Error):
            one.kill()


def _this_node() -> Any:
    import ray

    return ray._private.worker._global_node


def _runs(process: Any) -> bool:
    return bool(process.poll() is None)


HEAD_SECONDS = 20.0
"""How long the head of a cluster may not answer: a network may be away for a moment."""
_CALL_SECONDS = 2.0


class _Head:
    """Whether the head of a cluster answers."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._place = host.strip("[]"), int(port)
        self._seen = self._called = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._called >= _CALL_SECONDS:
            self._called = now
            with suppress(OSError):
                socket.create_connection(self._place, timeout=_CALL_SECONDS).close()
                self._seen = time.monotonic()
        return time.monotonic() - self._seen < HEAD_SECONDS
