"""The journal of a federation: every round's replies as they came, so that a killed run goes on where it was.

Replaying replies through the same strategy restores whatever the strategy keeps inside, without saving any of it.
Files are safetensors and JSON, written beside their place and then renamed, so that a file is whole or absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from safetensors import SafetensorError, safe_open

from fedattack.errors import RunFailed
from fedattack.files import write_bytes
from simulations.engine.flower_internals import Answer, Plain, plain_answer, reply_of
from simulations.engine.forwarding import ForwardingGrid
from strategies.messages import CONFIG, ROUND


class Journal:
    """A folder with a file of replies per round, what the clients keep after the latest, and the rounds' records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def complete(self, first_round: int) -> int:
        """The last round without a gap since `first_round`; ``first_round - 1`` where there is none."""
        number = first_round
        while self._replies(number).is_file():
            number += 1
        return number - 1

    def write_replies(self, number: int, answers: Mapping[int, Answer]) -> None:
        """Keep a round's replies, by client."""
        self._write_blobs(self._replies(number), answers)

    def read_replies(self, number: int) -> dict[int, Answer]:
        """A round's replies, by client."""
        return self._read_blobs(self._replies(number))

    def size(self, number: int) -> int:
        """Bytes that a round's replies take on disk; 0 where they are not there."""
        path = self._replies(number)
        return path.stat().st_size if path.is_file() else 0

    def write_states(self, number: int, states: Mapping[int, Plain]) -> None:
        """Keep what the clients keep after round `number`."""
        self._write_blobs(self._states(number), states)

    def read_states(self, number: int) -> dict[int, Plain]:
        """What the clients keep after round `number`."""
        found = self._read_blobs(self._states(number))
        return {client: state for client, state in found.items() if isinstance(state, list)}

    def drop_states(self, before: int) -> None:
        """Forget what the clients kept before round `before`: it will not be asked for any more."""
        for path in self.folder.glob("memories-*.safetensors"):
            number = path.stem.partition("-")[2]
            if number.isdigit() and int(number) < before:
                path.unlink(missing_ok=True)

    def write_record(self, number: int, record: Mapping[str, Any]) -> None:
        """Keep a round's figures."""
        write_bytes(self.folder / f"round-{number:05d}.json", json.dumps(record).encode())

    def read_record(self, number: int) -> dict[str, Any] | None:
        """A round's figures, or None where the run was killed before they were known."""
        path = self.folder / f"round-{number:05d}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        return dict(found)

    def _replies(self, number: int) -> Path:
        return self.folder / f"replies-{number:05d}.safetensors"

    def _states(self, number: int) -> Path:
        return self.folder / f"memories-{number:05d}.safetensors"

    # A safetensors file is a length, a JSON header and the tensors' bytes. It is written here piece by piece, because
    # the library's writer needs a second copy of everything in memory and hides a full disk behind its own error.
    def _write_blobs(self, path: Path, answers: Mapping[int, Answer]) -> None:
        blobs: list[Any] = []
        header: dict[str, Any] = {}
        described: dict[str, Any] = {}
        position = 0
        for key, answer in answers.items():
            if isinstance(answer, tuple):
                described[str(key)] = {"error": list(answer)}
                continue
            records = []
            for name, kind, entries in answer:
                if kind != "arrays":
                    records.append([name, kind, _jsonable(entries)])
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
                records.append([name, kind, arrays])
            described[str(key)] = {"records": records}
        header["__metadata__"] = {"answers": json.dumps(described)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        write_bytes(path, len(text).to_bytes(8, "little"), text, *blobs)

    def _read_blobs(self, path: Path) -> dict[int, Any]:
        try:
            with safe_open(path, framework="numpy") as file:
                described = json.loads(file.metadata()["answers"])
                return {int(key): self._answer(file, entry) for key, entry in described.items()}
        except FileNotFoundError:
            raise RunFailed(f"the journal has no file {path}: the run cannot go on from here") from None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error

    @staticmethod
    def _answer(file: Any, entry: Mapping[str, Any]) -> Answer:
        if "error" in entry:
            code, reason = entry["error"]
            return int(code), reason
        plain: Plain = []
        for name, kind, entries in entry["records"]:
            if kind == "arrays":
                arrays: dict[str, Any] = {}
                for array_name, (number, dtype, shape, stype) in entries.items():
                    data = file.get_tensor(str(number)).tobytes()
                    arrays[array_name] = (dtype, tuple(shape), stype, data)
                    if stype is None:
                        arrays[array_name] = np.frombuffer(data, np.dtype(dtype)).reshape(shape)
                plain.append((name, kind, arrays))
            else:
                plain.append((name, kind, _from_jsonable(entries)))
        return plain


def _damaged(path: Path, error: Exception) -> RunFailed:
    what = f"is damaged ({error}); delete it to run that round again"
    return RunFailed(f"the journal file {str(path)!r} {what}")


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
    """A grid that answers complete rounds from the journal and writes down the others.

    The inner grid's `client_of` tells a node's client: node ids are another run's business. `keeper` has
    `client_states` and `restore_states`; None where clients keep nothing from round to round.
    """

    def __init__(self, grid: Any, journal: Journal, first_round: int, keeper: Any | None) -> None:
        super().__init__(grid)
        self.journal = journal
        self.keeper = keeper
        self.replayed = journal.complete(first_round)
        self._to_restore = keeper is not None and self.replayed >= first_round

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies to `messages`, from the journal where it has them."""
        instructions = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        number = _round(instructions)
        if number is not None and number <= self.replayed:
            return self._replay(instructions, number)
        if self._to_restore:
            assert self.keeper is not None
            self.keeper.restore_states(self.journal.read_states(self.replayed))
            self._to_restore = False
        replies = list(self.grid.send_and_receive(instructions, timeout=timeout))
        if number is None:
            return replies
        # The states first: where they lack, their round's replies lack too, and the round is run again.
        if self.keeper is not None:
            self.journal.write_states(number, self.keeper.client_states())
        answers = {self.grid.client_of(reply.metadata.src_node_id): plain_answer(reply) for reply in replies}
        self.journal.write_replies(number, answers)
        if self.keeper is not None:
            self.journal.drop_states(before=number)
        return replies

    def _replay(self, messages: Sequence[Message], number: int) -> list[Message]:
        answers = self.journal.read_replies(number)
        drawn = {self.grid.client_of(message.metadata.dst_node_id): message for message in messages}
        if drawn.keys() != answers.keys():
            raise RunFailed(
                f"the journal's round {number} was answered by other clients than those drawn now: it belongs to "
                "another run"
            )
        return [reply_of(message, answers[client]) for client, message in sorted(drawn.items())]


def _round(messages: Sequence[Message]) -> int | None:
    """The training round that these messages start."""
    if not messages or messages[0].metadata.message_type.partition(".")[0] != "train":
        return None
    number = messages[0].content[CONFIG][ROUND]
    assert isinstance(number, int)
    return number
