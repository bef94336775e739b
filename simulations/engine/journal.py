"""The journal of a federation: what a killed run needs to go on where it was, and end in the same bits.

After every round the global model and what the strategy keeps are written down, and the older ones let go; of the
clients' replies those stay that somebody looks at again, as they came. Where a strategy's state cannot be written
down all replies stay, and are put through the strategy again.

Files are safetensors and JSON with a seal (:mod:`fedattack.sealed`), written beside their place and then renamed, so
that a file is whole or absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedattack import sealed
from fedattack.errors import DataError, RunFailed
from fedattack.files import write_bytes
from fedattack.reading import Unreadable, open_file
from fedattack.sealed import SEAL, Identity
from simulations.engine import strategy_state
from simulations.engine.flower_internals import Answer, Plain, from_plain, plain_answer, reply_of
from simulations.engine.forwarding import ForwardingGrid
from strategies import messages as wire
from strategies.messages import CONFIG, ROUND

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class State:
    """The end of a round: the global model, its report as JSON-able values, and what the strategy keeps.

    `strategy` is None in a journal that keeps all replies instead.
    """

    weights: dict[str, Tensor]
    report: dict[str, Any]
    strategy: tuple[Any, strategy_state.Arrays] | None


class Journal:
    """The folder of a run's journal; `identity` None: whose it is, is not asked.

    Whatever writes raises RunFailed where it cannot; whatever reads, where a file is missing, damaged, in another
    one's place, or of another run, with its path.
    """

    def __init__(self, folder: Path, identity: Identity | None = None) -> None:
        self.folder, self.identity = folder, identity

    def complete(self, first_round: int) -> int:
        """The last round without a gap since `first_round` of which all replies are here; else the one before it."""
        number = first_round
        while self._path("replies", number).is_file():
            number += 1
        return number - 1

    def latest(self, first_round: int = 1) -> int:
        """The last round whose end is written down; the one before `first_round` where there is none."""
        return max(self._numbers("state"), default=first_round - 1)

    def write_replies(self, number: int, answers: Mapping[int, Answer]) -> None:
        """Keep replies of a round, by client."""
        self._write_blobs("replies", number, answers)

    def read_replies(self, number: int) -> dict[int, Answer]:
        """The replies of a round that are kept, by client."""
        return self._read_blobs("replies", number)

    def has_replies(self, number: int) -> bool:
        """Whether any of a round are kept."""
        return self._path("replies", number).is_file()

    def size(self, number: int) -> int:
        """Bytes that a round's replies take on disk; 0 where they are not there."""
        path = self._path("replies", number)
        return path.stat().st_size if path.is_file() else 0

    def write_states(self, number: int, states: Mapping[int, Plain]) -> None:
        """Keep what the clients keep after round `number`."""
        self._write_blobs("memories", number, states)

    def read_states(self, number: int) -> dict[int, Plain]:
        """What the clients keep after round `number`."""
        found = self._read_blobs("memories", number)
        return {client: state for client, state in found.items() if isinstance(state, list)}

    def drop(self, what: str, keep: Callable[[int], bool]) -> None:
        """Remove the files "memories", "replies" or "state" of the rounds that are not to be kept."""
        for number in self._numbers(what):
            if not keep(number):
                self._path(what, number).unlink(missing_ok=True)

    def write_state(self, number: int, state: State) -> None:
        """Keep the end of a round."""
        tree, arrays = state.strategy or (None, {})
        about = {"strategy": json.dumps(tree), "report": json.dumps(state.report)}
        weights = {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in state.weights.items()}
        plain: Plain = [("weights", "arrays", weights), ("strategy", "arrays", dict(arrays))]
        self._write_blobs("state", number, {0: [*plain, ("about", "config", about)]})

    def read_state(self, number: int) -> State:
        """The end of a round."""
        plain = self._read_blobs("state", number)[0]
        assert isinstance(plain, list)
        (_, _, weights), (_, _, arrays), (_, _, about) = plain
        tree = json.loads(about["strategy"])
        record = from_plain([("weights", "arrays", weights)])["weights"]
        tensors = wire.to_tensors(record)
        return State(tensors, json.loads(about["report"]), None if tree is None else (tree, arrays))

    def has_state(self, number: int) -> bool:
        """Whether the end of a round is written down."""
        return self._path("state", number).is_file()

    def write_record(self, number: int, record: Mapping[str, Any]) -> None:
        """Keep a round's figures."""
        plain = json.loads(json.dumps(record))
        sealed.write_json(self._path("round", number), plain, f"round {number}", self.identity)

    def read_record(self, number: int) -> dict[str, Any] | None:
        """A round's figures, or None where the run was killed before they were known."""
        path = self._path("round", number)
        if not path.is_file():
            return None
        try:
            return sealed.read_json(path, f"round {number}", self.identity)
        except DataError as error:
            raise _refused(error) from None

    def missing(self, what: str, number: int, because: str) -> RunFailed:
        """The error for a file that should be here."""
        return RunFailed(
            f"the journal has no file {self._path(what, number)}, and {because}: the run cannot go on from here; "
            "start it anew in another folder"
        )

    def _path(self, what: str, number: int) -> Path:
        return self.folder / f"{what}-{number:05d}{'.json' if what == 'round' else _SUFFIX}"

    def _numbers(self, what: str) -> list[int]:
        found = (path.stem.partition("-")[2] for path in self.folder.glob(f"{what}-*"))
        return sorted(int(number) for number in found if number.removeprefix("-").isdigit())

    # A safetensors file is a length, a JSON header and the tensors' bytes. It is written here piece by piece, because
    # the library's writer needs a second copy of everything in memory and hides a full disk behind its own error.
    def _write_blobs(self, kind: str, number: int, answers: Mapping[int, Answer]) -> None:
        blobs: list[Any] = []
        header: dict[str, Any] = {}
        described: dict[str, Any] = {}
        position = 0
        for key, answer in answers.items():
            if isinstance(answer, tuple):
                described[str(key)] = {"error": list(answer)}
                continue
            records = []
            for name, record_kind, entries in answer:
                if record_kind != "arrays":
                    records.append([name, record_kind, _jsonable(entries)])
                    continue
                arrays = {}
                for array_name, value in entries.items():
                    if isinstance(value, np.ndarray):
                        blob = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
                        what: list[Any] = [str(value.dtype), list(value.shape), None]
                    else:
                        dtype, shape, stype, blob = value
                        what = [dtype, list(shape), stype]
                    arrays[array_name] = [len(blobs), *what]
                    end = position + len(blob)
                    place = {"shape": [len(blob)], "data_offsets": [position, end]}
                    header[str(len(blobs))] = {"dtype": "U8"} | place
                    position = end
                    blobs.append(blob)
                records.append([name, record_kind, arrays])
            described[str(key)] = {"records": records}
        metadata = {"answers": json.dumps(described)}
        header["__metadata__"] = metadata
        content = hashlib.sha256(_canonical(header))
        for blob in blobs:
            content.update(blob)
        entry = sealed.seal(f"{kind} of round {number}", content.hexdigest()[:32], self.identity)
        metadata[SEAL] = json.dumps(entry)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        write_bytes(self._path(kind, number), len(text).to_bytes(8, "little"), text, *blobs)

    def _read_blobs(self, kind: str, number: int) -> dict[int, Any]:
        path = self._path(kind, number)
        try:
            with open_file(path) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
                length = int.from_bytes(held[:8], "little")
                if length > len(held) - 8:
                    raise ValueError("its header is cut")
                header = json.loads(held[8 : 8 + length])
                entry = json.loads(header["__metadata__"].pop(SEAL, "null"))
                content = hashlib.sha256(_canonical(header))
                with memoryview(held) as data:
                    content.update(data[8 + length :])
                what = f"{kind} of round {number}"
                sealed.check_seal(path, entry, what, content.hexdigest()[:32], self.identity)
                described = json.loads(header.pop("__metadata__")["answers"])

                def blob(index: int) -> bytes:
                    start, end = header[str(index)]["data_offsets"]
                    return held[8 + length + start : 8 + length + end]

                return {int(key): _answer(blob, entry) for key, entry in described.items()}
        except Unreadable as error:
            if error.absent:
                raise RunFailed(f"the journal has no file {path}: the run cannot go on from here") from None
            raise _refused(f"{path} is damaged ({error.reason})") from None
        except DataError as error:
            raise _refused(error) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _refused(f"{path} is damaged ({error})") from error


def _answer(blob: Callable[[int], bytes], entry: Mapping[str, Any]) -> Answer:
    if "error" in entry:
        code, reason = entry["error"]
        return int(code), reason
    plain: Plain = []
    for name, kind, entries in entry["records"]:
        if kind == "arrays":
            arrays: dict[str, Any] = {}
            for array_name, (number, dtype, shape, stype) in entries.items():
                data = blob(number)
                arrays[array_name] = (dtype, tuple(shape), stype, data)
                if stype is None:
                    arrays[array_name] = np.frombuffer(data, np.dtype(dtype)).reshape(shape)
            plain.append((name, kind, arrays))
        else:
            plain.append((name, kind, _from_jsonable(entries)))
    return plain


def _refused(why: object) -> RunFailed:
    return RunFailed(f"the run cannot go on from its journal: {why}; start it anew in another folder")


def _canonical(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def _jsonable(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _hexed(value) for key, value in entries.items()}


def _hexed(value: Any) -> Any:
    """Bytes, and lists of them, as JSON can hold them."""
    if isinstance(value, list):
        return [_hexed(one) for one in value]
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def _from_jsonable(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _unhexed(value) for key, value in entries.items()}


def _unhexed(value: Any) -> Any:
    if isinstance(value, list):
        return [_unhexed(one) for one in value]
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value


class JournaledGrid(ForwardingGrid):
    """A grid that writes rounds down, and answers those from the journal whose replies are all there.

    `kept` says which of a round's replies stay; None: all, and rounds are answered from the journal. The inner
    grid's `client_of` tells a node's client: node ids are another run's business. `keeper` has `client_states` and
    `restore_states`; None where clients keep nothing from round to round. `done` is the last round that need not be
    run again.
    """

    def __init__(
        self,
        grid: Any,
        journal: Journal,
        done: int,
        keeper: Any | None,
        kept: Callable[[int, Mapping[int, Message]], Collection[int]] | None,
    ) -> None:
        super().__init__(grid)
        self.journal, self.keeper = journal, keeper
        self.done, self._kept = done, kept
        self._to_restore: int | None = None

    def remember(self, number: int) -> None:
        """Have the clients remember, when they are spoken to next, what they kept after a round."""
        self._to_restore = number if self.keeper is not None else None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies to `messages`, from the journal where it has them."""
        instructions = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        number = _round(instructions)
        if number is not None and self._kept is None and number <= self.done:
            return self.replayed(instructions, number)
        if self._to_restore is not None:
            assert self.keeper is not None
            self.keeper.restore_states(self.journal.read_states(self._to_restore))
            self._to_restore = None
        replies = list(self.grid.send_and_receive(instructions, timeout=timeout))
        if number is None:
            return replies
        # The memories first: where they lack, what follows from them lacks too, and the round is run again.
        if self.keeper is not None:
            self.journal.write_states(number, self.keeper.client_states())
        by_client = {self.grid.client_of(reply.metadata.src_node_id): reply for reply in replies}
        chosen = by_client if self._kept is None else self._kept(number, by_client)
        if chosen or self._kept is None:
            answers = {client: plain_answer(by_client[client]) for client in sorted(chosen)}
            self.journal.write_replies(number, answers)
        if self.keeper is not None and self._kept is None:
            self.journal.drop("memories", lambda one: one >= number)
        return replies

    def replayed(self, messages: Sequence[Message], number: int) -> list[Message]:
        """The replies of a round that are kept, as replies to these messages."""
        answers = self.journal.read_replies(number)
        drawn = {self.grid.client_of(message.metadata.dst_node_id): message for message in messages}
        if not answers.keys() <= drawn.keys() or (self._kept is None and drawn.keys() != answers.keys()):
            raise RunFailed(
                f"the journal's round {number} was answered by other clients than those drawn now: it belongs to "
                "another run"
            )
        return [reply_of(drawn[client], answer) for client, answer in sorted(answers.items())]


def state_of(strategy: Strategy, weights: dict[str, Tensor], report: Any) -> State:
    """The end of a round, to be written down; NotCaptured where the strategy keeps what cannot be."""
    return State(weights, dataclasses.asdict(report), strategy_state.captured(strategy))


def _round(messages: Sequence[Message]) -> int | None:
    """The training round that these messages start."""
    if not messages or messages[0].metadata.message_type.partition(".")[0] != "train":
        return None
    number = messages[0].content[CONFIG][ROUND]
    assert isinstance(number, int)
    return number
