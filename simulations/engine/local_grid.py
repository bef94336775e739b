"""Flower's ``Grid`` without a SuperLink: the clients in this process, or many at a time on long-lived Ray actors.

Node ids are :data:`FIRST_NODE` + the client's number, and replies come in the order of the clients, so that nothing
about the engine can change a result.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import signal
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedattack.errors import told
from simulations.client_app import Workplace, app, close_workplace, open_workplace
from simulations.engine import flower_internals as internals
from simulations.engine.environment import cpu_threads
from simulations.engine.flower_internals import Answer, Plain, from_plain, plain_answer, reply_of, to_plain
from simulations.engine.forked import check_fork, worked_in_copies
from strategies.light_records import HeldArray
from strategies.messages import OVERSIZED, PARTITION

log = logging.getLogger("fedattack.grid")

FIRST_NODE = 1_000_000
"""Node id of client 0."""

_SPARE_BYTES = 1 << 20

_run_ids = itertools.count(1)


class LocalGrid(Grid):
    """Base of both grids: node ids, message ids, order, and the limit on a reply's size."""

    def __init__(self, clients: int, deadline: float | None = None) -> None:
        internals.check_flower()
        self.clients = clients
        self.deadline = deadline  # seconds that a client has to answer
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

        Flower's `timeout` is not used, for it would make the result depend on the machine; ``engine.deadline`` is
        for those who want that.
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
    """What a client answers; an error with its reason where it raised one, or answers nonsense or without measure.

    Whatever a client raises is its own fault: a SystemExit too must not end who runs it.
    """
    try:
        reply = client_app(message, context)
        _check_reply(reply, message)
        if reply.has_error():
            return _refused(int(reply.error.code), reply.error.reason or "", message)
        size = internals.size_of(reply.content)
    except BaseException as error:
        client = context.node_config[PARTITION]
        log.debug("client %s raised %s", client, told(error), exc_info=True)
        return _refused(internals.CLIENT_RAISED, error, message)
    if size > limit:
        return _refused(OVERSIZED, f"reply has {size} bytes, no honest one has more than {limit}", message)
    return reply


def _refused(code: int, why: object, message: Message) -> Message:
    return Message(Error(code, told(why)), reply_to=message)


def _check_reply(reply: Any, message: Message) -> None:
    """TypeError where it is no reply to the message: later nobody need ask what kind of thing it is."""
    if not isinstance(reply, Message):
        raise TypeError(f"the client answered a {type(reply).__name__}, not a Message")
    to, about = message.metadata, reply.metadata
    if (about.src_node_id, about.reply_to_message_id) != (to.dst_node_id, to.message_id):
        raise TypeError("the client answered another message than it was sent")
    if reply.has_error():
        return
    for name, record in reply.content.items():
        kinds = (ArrayRecord, MetricRecord, ConfigRecord)
        if not isinstance(name, str) or not isinstance(record, kinds):
            raise TypeError(f"the client answered a record that is a {type(record).__name__}")
        for key, value in record.items() if isinstance(record, ArrayRecord) else ():
            if not isinstance(key, str) or not isinstance(value, Array):
                raise TypeError(f"the client answered an array that is a {type(value).__name__}")
            if isinstance(value, HeldArray) and value.view().dtype.hasobject:
                raise TypeError(f"the client answered an array {key!r} of objects")


class Interruptions:
    """Tells a Ctrl-C of the user, which ends the run, from a KeyboardInterrupt that a client raises.

    Within the block, :meth:`check` raises the user's, also where a client has caught it.
    """

    def __init__(self) -> None:
        self._came = False

    def __enter__(self) -> Interruptions:
        before = self._before = signal.getsignal(signal.SIGINT)
        self._ours = callable(before) and threading.current_thread() is threading.main_thread()

        def interrupted(number: int, frame: Any) -> None:
            self._came = True
            assert callable(before)
            before(number, frame)

        if self._ours:
            signal.signal(signal.SIGINT, interrupted)
        return self

    def check(self) -> None:
        """Raise KeyboardInterrupt if the user has asked for it."""
        if self._came:
            raise KeyboardInterrupt

    def __exit__(self, *raised: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)


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
    """All clients in this process, one after another: for tests, notebooks and breakpoints.

    With a `deadline`, in seconds, they answer in a forked copy of this process, which is given up with the client
    that is late in it or ends it; what the others answered is kept. ConfigError where a process cannot be copied.
    """

    def __init__(self, place: Workplace, client_app: ClientApp = app, deadline: float | None = None) -> None:
        super().__init__(len(place.partitions), deadline)
        self._app = client_app
        self._contexts = Contexts(self.run_id, self.clients)
        if deadline is not None:
            check_fork(place.device)
        open_workplace(self.run_id, place)

    def _execute(self, messages: Sequence[Message]) -> list[Message]:
        limits: dict[int, int] = {}
        for content in (message.content for message in messages):
            if id(content) not in limits:
                limits[id(content)] = _limit(content)

        def answer(message: Message) -> Message:
            context = self._contexts[self.client_of(message.metadata.dst_node_id)]
            return _answer(self._app, message, context, limits[id(message.content)])

        with cpu_threads(1), Interruptions() as user:
            if self.deadline is not None:
                return self._in_copies(messages, answer, self.deadline, user)
            replies: list[Message] = []
            for message in messages:
                replies.append(answer(message))
                user.check()
            return replies

    def _in_copies(
        self,
        messages: Sequence[Message],
        answer: Callable[[Message], Message],
        deadline: float,
        user: Interruptions,
    ) -> list[Message]:
        def work(number: int) -> tuple[Answer, Plain]:
            message = messages[number]
            reply = plain_answer(answer(message))
            return reply, to_plain(self._contexts[self.client_of(message.metadata.dst_node_id)].state)

        replies: list[Message] = []
        for number, done in enumerate(worked_in_copies(work, len(messages), deadline)):
            user.check()
            message = messages[number]
            if isinstance(done, str):
                replies.append(_refused(internals.CLIENT_RAISED, done, message))
                continue
            reply, state = done
            self._contexts[self.client_of(message.metadata.dst_node_id)].state = from_plain(state)
            replies.append(reply_of(message, reply))
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
