"""Deletion requests as clients lay them beside their replies, and the desk at which a server takes them.

Each is one ConfigRecord named "deletion.0", "deletion.1", ... with what :data:`FIELDS` says; samples that it brings
lie in an ArrayRecord of the same name and ".samples", as "images" and "labels". A client may send them with any reply
to an instruction to train, or when the server asks all clients alike.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedattack.errors import PayloadError, shown, told
from fedattack.observation import Scenario, UnlearningRequest
from fedattack.unlearning.requests import REQUEST, Verdict, validate_request
from strategies.light_records import LightRecords
from strategies.messages import TAG, read_dense, to_record

log = logging.getLogger("fedattack.strategies")

DELETION = "deletion."
_SAMPLES = ".samples"

KINDS = ("positions", "samples", "class", "all")
"""What is to be forgotten: positions of the client's partition; samples, anybody's; its samples of a class; all."""

FIELDS: dict[str, type[Any]] = {
    "client": int,
    "kind": str,
    "positions": list,  # of int, where the kind says so
    "samples": int,  # how many are brought
    "label": int,  # of the class
    "reason": str,
    TAG: str,
}
_NEEDED = {"positions": {"positions"}, "samples": {"samples"}, "class": {"label"}, "all": set[str]()}

MAX_RECORDS = 64
"""Deletion requests that are read of one reply, and tags by which those of one client may go."""

MAX_WAITING = 256
"""Requests of one client that may wait to be served."""

MAX_REASON = 1000
"""Characters of a reason; a tag has at most 64."""


def deletion_records(requests: Sequence[tuple[str, UnlearningRequest]]) -> dict[str, Any]:
    """(tag, request) of one reply -> the records that say so, by name."""
    records: dict[str, Any] = {}
    for number, (tag, request) in enumerate(requests):
        said: dict[str, Any] = {"client": request.client, "reason": request.reason, TAG: tag}
        if request.images is not None and request.labels is not None:
            said |= {"kind": "samples", "samples": len(request.labels)}
            brought = {"images": request.images, "labels": request.labels}
            records[f"{DELETION}{number}{_SAMPLES}"] = to_record(brought)
        elif request.label is not None:
            said |= {"kind": "class", "label": request.label}
        elif request.everything:
            said["kind"] = "all"
        else:
            said |= {"kind": "positions", "positions": list(request.positions)}
        records[f"{DELETION}{number}"] = ConfigRecord(said)
    return records


def parted(content: RecordDict) -> tuple[RecordDict, dict[str, Any]]:
    """A reply without its deletion requests, and their records."""
    asked = {name: record for name, record in content.items() if name.startswith(DELETION)}
    if not asked:
        return content, {}
    return LightRecords({n: record for n, record in content.items() if n not in asked}), asked


class DeletionDesk:
    """Takes deletion requests as they arrive, rejects with a reason what no honest client sends, keeps the others.

    What waits is bounded: a client's requests of one tag together name no more samples than it registered, and all
    are no more than :data:`MAX_WAITING`; of one reply, :data:`MAX_RECORDS` are read.

    Parameters
    ----------
    scenario
        What the federation's samples are like.
    sizes
        Client -> how many samples it registered.
    """

    def __init__(self, scenario: Scenario, sizes: Mapping[int, int]) -> None:
        self.scenario, self.sizes = scenario, sizes
        self.verdicts: list[Verdict] = []
        self.closed_after: int | None = None
        self._waiting: list[tuple[str, int, UnlearningRequest]] = []
        self._named: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._count: Counter[int] = Counter()

    def take(self, round: int, sender: int, records: Mapping[str, Any]) -> None:
        """Read a reply's deletion requests; `sender` is the client that it really came from."""
        names = [name for name in records if not name.endswith(_SAMPLES)]
        stray = [
            name for name in records if name.endswith(_SAMPLES) and name.removesuffix(_SAMPLES) not in records
        ]
        for name in [*names, *stray][:MAX_RECORDS]:
            tag = ""
            try:
                tag = _text(records[name], TAG, 64)
                request = self._read(records[name], records.get(f"{name}{_SAMPLES}"), sender, tag)
            except PayloadError as error:
                self._reject(round, sender, str(error), tag)
                continue
            self._waiting.append((tag, sender, request))
            self._count[sender] += 1
            self._named[sender][tag] += _samples(request)
        if len(names) + len(stray) > MAX_RECORDS:
            more = f"{len(names) + len(stray)} deletion requests in one reply; {MAX_RECORDS} are read"
            self._reject(round, sender, more)

    def close(self, round: int) -> list[tuple[str, int, UnlearningRequest]]:
        """What waits, as (tag, client, request) in the order of arrival; nothing is taken any more."""
        self.closed_after = round
        waiting, self._waiting = self._waiting, []
        return waiting

    def _reject(self, round: int, sender: int, reason: str, tag: str = "") -> None:
        reason = told(reason.removeprefix(f"deletion request from client {sender}: "))
        log.warning("deletion request from client %d rejected: %s", sender, reason)
        self.verdicts.append(Verdict(round, sender, REQUEST, False, reason, tag=tag))

    def _read(self, record: Any, brought: Any, sender: int, tag: str) -> UnlearningRequest:
        """A request, or PayloadError; nothing is opened before its size is known."""
        size = self.sizes.get(sender)
        if self.closed_after is not None:
            raise PayloadError(f"requests were served after round {self.closed_after}; it comes too late")
        if size is None:
            raise PayloadError("the sender registered no samples")
        if self._count[sender] >= MAX_WAITING:
            raise PayloadError(f"{MAX_WAITING} requests of this client wait already; no more are taken")
        if tag not in self._named[sender] and len(self._named[sender]) >= MAX_RECORDS:
            raise PayloadError(f"{MAX_RECORDS} tags of this client's requests are known; no more are taken")
        said = _fields(record)
        kind = _text(record, "kind", 16)
        if kind not in KINDS:
            raise PayloadError(f"kind {shown(kind)}; accepted: {', '.join(KINDS)}")
        needed = {"client", "kind", *_NEEDED[kind]}
        if lacking := needed - said.keys():
            raise PayloadError(f"{', '.join(sorted(lacking))} missing; a request of kind {kind!r} has it")
        if beyond := said.keys() - needed - {"reason", TAG}:
            raise PayloadError(
                f"{', '.join(sorted(beyond))} in a request of kind {kind!r}; it names one kind of thing"
            )
        if (brought is None) == (kind == "samples"):
            raise PayloadError(
                f"{'no samples beside' if brought is None else 'samples beside'} a request of kind {kind!r}"
            )
        request = UnlearningRequest(said["client"], reason=_text(record, "reason", MAX_REASON))
        if kind == "positions":
            if len(said["positions"]) > size:
                count = len(said["positions"])
                raise PayloadError(f"{count} positions, but the client has {size} samples")
            request = dataclasses.replace(request, positions=tuple(said["positions"]))
        elif kind == "samples":
            images, labels = self._samples(said["samples"], brought, size)
            request = dataclasses.replace(request, images=images, labels=labels)
        elif kind == "class":
            request = dataclasses.replace(request, label=said["label"])
        else:
            request = dataclasses.replace(request, everything=True)
        validate_request(request, sender, size, self.scenario)
        together = self._named[sender][tag] + _samples(request)
        if together > size:
            raise PayloadError(
                f"with those that wait it asks for {together} samples, and the client has {size}"
            )
        return request

    def _samples(self, count: int, brought: Any, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and labels of a request, of the size that it declares and of the federation's kind."""
        if not 1 <= count <= size:
            raise PayloadError(f"{shown(count)} samples; accepted: 1 to {size}")
        if not isinstance(brought, ArrayRecord) or brought.keys() != {"images", "labels"}:
            raise PayloadError("samples are not an ArrayRecord of images and labels")
        images = read_dense(brought["images"], (count, *self.scenario.image_shape), "float32")
        labels = read_dense(brought["labels"], (count,), "int64")
        return torch.from_numpy(images.copy()), torch.from_numpy(labels.copy())


def _fields(record: Any) -> dict[str, Any]:
    """What a record says, where all of it is of :data:`FIELDS`."""
    if not isinstance(record, ConfigRecord):
        raise PayloadError(f"a {type(record).__name__}, not a ConfigRecord")
    if unknown := [key for key in record if key not in FIELDS]:
        raise PayloadError(f"unknown field {shown(unknown[0])}")
    said = dict(record.items())
    for key, value in said.items():
        if not isinstance(value, FIELDS[key]) or isinstance(value, bool):
            raise PayloadError(f"{key!r} is {shown(value)}, not {FIELDS[key].__name__}")
    return said


def _text(record: Any, field: str, longest: int) -> str:
    """A text of a record; empty where it is absent."""
    value = record.get(field, "") if isinstance(record, ConfigRecord) else ""
    if not isinstance(value, str) or len(value) > longest:
        what = f"of {len(value)} characters" if isinstance(value, str) else f"a {type(value).__name__}"
        raise PayloadError(f"{field!r} is {what}; accepted: a text of at most {longest} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PayloadError(f"{field!r} holds what is no text in UTF-8") from None
    return value


def _samples(request: UnlearningRequest) -> int:
    """How many samples a request names or brings."""
    return len(request.positions) if request.labels is None else len(request.labels)
