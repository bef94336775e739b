"""Flower's ``Grid`` without a SuperLink: the clients in this process, or many at a time on long-lived Ray actors.

Node ids are :data:`FIRST_NODE` + the client's number, and replies come in the order of the clients, so that nothing
about the engine can change a result.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import traceback
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from simulations.client_app import Workplace, app, close_workplace, open_workplace
from simulations.engine import flower_internals as internals
from simulations.engine.environment import cpu_threads
from simulations.engine.flower_internals import Plain, from_plain, to_plain
from strategies.messages import OVERSIZED, PARTITION

log = logging.getLogger("fedattack.grid")

FIRST_NODE = 1_000_000
"""Node id of client 0."""

_SPARE_BYTES = 1 << 20

_run_ids = itertools.count(1)


class LocalGrid(Grid):
    """Base of both grids: node ids, message ids, order, and the limit on a reply's size."""

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.run_id = next(_run_ids)
        self._run = internals.empty_run(self.run_id)
        self._message_ids = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(FIRST_NODE, FIRST_NODE + self.clients)

    def client_of(self, node: int) -> int:
        """The client's number behind a node id."""
        return node - FIRST_NODE

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the messages answered; the replies wait to be pulled."""
        instructions = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        for message in instructions:
            if not 0 <= self.client_of(message.metadata.dst_node_id) < self.clients:
                raise ValueError(f"no node has the id {message.metadata.dst_node_id}")
            internals.name_message(message, str(next(self._message_ids)))
        for message, reply in zip(instructions, self._execute(instructions), strict=True):
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in instructions]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Have the messages answered, in the order of the clients.

        Flower's `timeout` is not used: clients cannot be silent here, and a deadline would make the result depend
        on the machine.
        """
        return self.pull_messages(self.push_messages(messages))

    @abstractmethod
    def _execute(self, messages: Sequence[Message]) -> list[Message]:
        """One reply per message, in their order."""

    @abstractmethod
    def client_states(self) -> dict[int, Plain]:
        """What each client keeps (its compressor's memory); clients that keep nothing are absent."""

    @abstractmethod
    def restore_states(self, states: Mapping[int, Plain]) -> None:
        """Give clients what they kept."""

    @abstractmethod
    def reset(self) -> None:
        """Have all clients forget what they kept."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything the grid holds."""


def _answer(client_app: ClientApp, message: Message, context: Context, limit: int) -> Message:
    """What a client answers, or an error with its reason where it raised one or answers without measure."""
    try:
        reply = client_app(message, context)
    except Exception as error:
        log.debug("client %s raised\n%s", context.node_config[PARTITION], traceback.format_exc())
        return Message(Error(internals.CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
    size = 0 if reply.has_error() else internals.size_of(reply.content)
    if size > limit:
        reason = f"reply has {size} bytes, no honest one has more than {limit}"
        return Message(Error(OVERSIZED, reason), reply_to=message)
    return reply


def _limit(content: RecordDict) -> int:
    """Longest reply that is let through: four times the model, which no compressor reaches, and a little."""
    return 4 * internals.size_of(content) + _SPARE_BYTES


class Contexts(dict[int, Context]):
    """What the clients of one process keep, by number; a client has its own from the first look on."""

    def __init__(self, run_id: int, clients: int) -> None:
        super().__init__()
        self.run_id, self.clients = run_id, clients

    def __missing__(self, client: int) -> Context:
        node = {PARTITION: client, "num-partitions": self.clients}
        self[client] = Context(self.run_id, FIRST_NODE + client, node, RecordDict(), {})
        return self[client]


def _load_app(target: str) -> ClientApp:
    module, _, name = target.partition(":")
    loaded = getattr(importlib.import_module(module), name)
    assert isinstance(loaded, ClientApp)
    return loaded


class InlineGrid(LocalGrid):
    """All clients in this process, one after another: for tests, notebooks and breakpoints."""

    def __init__(self, place: Workplace, client_app: ClientApp = app) -> None:
        super().__init__(len(place.partitions))
        self._app = client_app
        self._contexts = Contexts(self.run_id, self.clients)
        open_workplace(self.run_id, place)

    def _execute(self, messages: Sequence[Message]) -> list[Message]:
        limits: dict[int, int] = {}
        replies: list[Message] = []
        with cpu_threads(1):
            for message in messages:
                content = message.content
                if id(content) not in limits:
                    limits[id(content)] = _limit(content)
                context = self._contexts[self.client_of(message.metadata.dst_node_id)]
                replies.append(_answer(self._app, message, context, limits[id(content)]))
        return replies

    def client_states(self) -> dict[int, Plain]:
        return {client: to_plain(c.state) for client, c in sorted(self._contexts.items()) if len(c.state)}

    def restore_states(self, states: Mapping[int, Plain]) -> None:
        for client, state in states.items():
            self._contexts[client].state = from_plain(state)

    def reset(self) -> None:
        self._contexts.clear()

    def close(self) -> None:
        close_workplace(self.run_id)
