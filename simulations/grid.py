"""Flower's ``Grid`` without a SuperLink: the clients in this process, or many at a time on long-lived Ray actors.

Node ids are :data:`FIRST_NODE` + the client's number, and replies come in the order of the clients, so that nothing
about the engine can change a result.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import socket
import time
import traceback
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedattack.config import Config, EngineConfig
from fedattack.errors import BadRequest, RunFailed
from simulations import flower_internals as internals
from simulations.client_app import Workplace, app, close_workplace, open_workplace
from simulations.environment import cpu_threads
from simulations.flower_internals import Answer, Plain, from_plain, to_plain
from simulations.forwarding import ForwardingGrid
from strategies.messages import CONFIG, METRICS, OVERSIZED, PARTITION

if TYPE_CHECKING:
    from fedattack.data import World

log = logging.getLogger("fedattack.grid")

FIRST_NODE = 1_000_000
"""Node id of client 0."""

_SPARE_BYTES = 1 << 20
_RETRIES = 3
_START_SECONDS = 180.0
"""A process that imports torch and Flower takes seconds, and minutes where many start on a busy machine."""

_NODES_SECONDS = 20.0
_ROOM_SECONDS = 5.0
_CONNECT_SECONDS = 10.0

_run_ids = itertools.count(1)


class LocalGrid(Grid):
    """Base of both grids: node ids, message ids, order, and the limit on a reply's size.

    Parameters
    ----------
    clients : int
    """

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.run_id = next(_run_ids)
        self._run = internals.empty_run(self.run_id)
        self._message_ids = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new instruction."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all clients, ascending."""
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
        """The replies to these messages, once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Have the messages answered, in the order of the clients.

        `timeout` is Flower's and not used: clients cannot be silent here (an exception is an answer too, and the
        clients of a lost actor are run again), and a deadline would make the result depend on the machine.
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


def _new_context(run_id: int, client: int, clients: int) -> Context:
    return Context(
        run_id=run_id,
        node_id=FIRST_NODE + client,
        node_config={PARTITION: client, "num-partitions": clients},
        state=RecordDict(),
        run_config={},
    )


def _load_app(target: str) -> ClientApp:
    module, _, name = target.partition(":")
    loaded = getattr(importlib.import_module(module), name)
    assert isinstance(loaded, ClientApp)
    return loaded


class InlineGrid(LocalGrid):
    """All clients in this process, one after another: for tests, notebooks and breakpoints.

    Parameters
    ----------
    place : Workplace
        Settings and data of the clients.
    client_app : ClientApp
        What a client does.
    """

    def __init__(self, place: Workplace, client_app: ClientApp = app) -> None:
        super().__init__(len(place.partitions))
        self._app = client_app
        self._contexts: dict[int, Context] = {}
        open_workplace(self.run_id, place)

    def _context(self, client: int) -> Context:
        if client not in self._contexts:
            self._contexts[client] = _new_context(self.run_id, client, self.clients)
        return self._contexts[client]

    def _execute(self, messages: Sequence[Message]) -> list[Message]:
        limits: dict[int, int] = {}
        replies: list[Message] = []
        with cpu_threads(1):
            for message in messages:
                content = message.content
                if id(content) not in limits:
                    limits[id(content)] = _limit(content)
                context = self._context(self.client_of(message.metadata.dst_node_id))
                replies.append(_answer(self._app, message, context, limits[id(content)]))
        return replies

    def client_states(self) -> dict[int, Plain]:
        """What each client keeps; see :class:`LocalGrid`."""
        return {client: to_plain(c.state) for client, c in sorted(self._contexts.items()) if len(c.state)}

    def restore_states(self, states: Mapping[int, Plain]) -> None:
        """Give clients what they kept; see :class:`LocalGrid`."""
        for client, state in states.items():
            self._context(client).state = from_plain(state)

    def reset(self) -> None:
        """Have all clients forget what they kept."""
        self._contexts.clear()

    def close(self) -> None:
        """Let go of the data."""
        close_workplace(self.run_id)


class ClientActor:
    """Many clients in one Ray actor: settings and data arrive once, what clients keep stays here.

    Parameters
    ----------
    run_id, clients : int
    client_app : str
        ``"module:app"``.
    config, scenario, images, labels, *partitions
        The fields of a :class:`~simulations.client_app.Workplace`.
    """

    def __init__(
        self,
        run_id: int,
        client_app: str,
        config: Config,
        scenario: Any,
        images: Any,
        labels: Any,
        partitions: Any,
    ) -> None:
        torch.set_num_threads(1)
        self._run_id = run_id
        self._app = _load_app(client_app)
        self._clients = len(partitions)
        self._contexts: dict[int, Context] = {}
        open_workplace(run_id, Workplace(config, scenario, images, labels, tuple(partitions)))

    def ready(self) -> str:
        """The id of the node it is on, once the actor is up."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def restore(self, clients: Sequence[int], *states: Plain) -> bool:
        """Take over clients of a lost actor, or of a run that was interrupted."""
        for client, state in zip(clients, states, strict=True):
            self._context(client).state = from_plain(state)
        return True

    def reset(self) -> bool:
        """Forget what the clients kept."""
        self._contexts.clear()
        return True

    def work(
        self, orders: Sequence[tuple[int, int, str, str]], stateful: bool, *contents: Plain
    ) -> list[Any] | tuple[Any, ...]:
        """Have clients answer.

        Parameters
        ----------
        orders : sequence of (client, index into `contents`, message type, message id)
        stateful : bool
            Also return what each client keeps, as an object of its own.
        """
        records = [from_plain(content) for content in contents]
        limits = [_limit(record) for record in records]
        answers: list[Answer] = []
        states: list[Plain] = []
        for client, index, message_type, message_id in orders:
            message = internals.received(
                records[index], self._run_id, FIRST_NODE + client, message_type, message_id
            )
            context = self._context(client)
            answer = _answer(self._app, message, context, limits[index])
            answers.append(
                (answer.error.code, answer.error.reason) if answer.has_error() else to_plain(answer.content)
            )
            if stateful:
                states.append(to_plain(context.state))
        return (answers, *states) if states else answers

    def _context(self, client: int) -> Context:
        if client not in self._contexts:
            self._contexts[client] = _new_context(self._run_id, client, self._clients)
        return self._contexts[client]


class RayGrid(LocalGrid):
    """Clients on long-lived Ray actors: one call per actor and round, the broadcast put once, the data put once.

    Client c works on actor ``c % actors`` and what it keeps stays there; the driver owns a reference to a copy in
    Ray's store, with which another actor takes over when one is lost. Needs a Ray session (:func:`ray_session`).

    Parameters
    ----------
    place : Workplace
        Settings and data of the clients.
    client_app : str
        ``"module:app"`` of the ClientApp.
    """

    def __init__(self, place: Workplace, client_app: str = "simulations.client_app:app") -> None:
        super().__init__(len(place.partitions))
        import ray

        self._ray = ray
        engine = place.config.engine
        self._engine = engine
        self._stateful = place.compressor.stateful
        self._states: dict[int, Any] = {}
        _check_resources(engine)
        self._actor_class = ray.remote(
            num_cpus=engine.cpus_per_actor,
            num_gpus=engine.gpus_per_actor,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )(ClientActor)
        self._arguments: tuple[Any, ...] = (
            self.run_id,
            client_app,
            place.config,
            place.scenario,
            ray.put(place.images),
            ray.put(place.labels),
            ray.put(list(place.partitions)),
        )
        self._actors = [self._start() for _ in range(min(engine.actors, self.clients))]
        self._await(self._actors)

    def _start(self) -> Any:
        return self._actor_class.remote(*self._arguments)

    def _await(self, actors: Sequence[Any]) -> None:
        waiting = [actor.ready.remote() for actor in actors]
        ready, missing = self._ray.wait(waiting, num_returns=len(waiting), timeout=_START_SECONDS)
        if missing:
            self.close()
            raise RunFailed(
                f"{len(missing)} of {len(waiting)} Ray actors did not start in {_START_SECONDS:.0f} s; "
                f"the cluster has {_resources(self._ray.available_resources())} left"
            )
        try:
            self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            self.close()
            raise RunFailed(f"a Ray actor could not start: {_reason(error)}") from error

    def _execute(self, messages: Sequence[Message]) -> list[Message]:
        ray = self._ray
        contents: dict[int, Any] = {}
        batches: dict[int, list[int]] = {}
        for number, message in enumerate(messages):
            if id(message.content) not in contents:
                contents[id(message.content)] = ray.put(to_plain(message.content))
            slot = self.client_of(message.metadata.dst_node_id) % len(self._actors)
            batches.setdefault(slot, []).append(number)
        pending: dict[Any, tuple[int, list[int], list[Any], int]] = {}

        def submit(slot: int, numbers: list[int], attempt: int) -> None:
            used = list(dict.fromkeys(id(messages[n].content) for n in numbers))
            orders = [
                (
                    self.client_of(messages[n].metadata.dst_node_id),
                    used.index(id(messages[n].content)),
                    messages[n].metadata.message_type,
                    messages[n].metadata.message_id,
                )
                for n in numbers
            ]
            returns = 1 + len(numbers) if self._stateful else 1
            call = self._actors[slot].work.options(num_returns=returns)
            references = call.remote(orders, self._stateful, *(contents[key] for key in used))
            first, *states = references if self._stateful else [references]
            pending[first] = (slot, numbers, states, attempt)

        for slot, numbers in batches.items():
            submit(slot, numbers, 1)
        answers: list[Answer | None] = [None] * len(messages)
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            slot, numbers, states, attempt = pending.pop(done)
            try:
                received = ray.get(done)
            except _lost_actor_errors() as error:
                if attempt == _RETRIES:
                    raise RunFailed(
                        f"a Ray actor with {len(numbers)} clients was lost {_RETRIES} times in one round "
                        f"({_reason(error)}); is there enough memory for {len(self._actors)} actors?"
                    ) from error
                log.warning(
                    "a Ray actor was lost (%s); its %d clients are run again", _reason(error), len(numbers)
                )
                self._replace(slot)
                submit(slot, numbers, attempt + 1)
                continue
            except ray.exceptions.RayTaskError as error:
                raise RunFailed(f"a Ray actor failed: {_reason(error)}") from error
            for number, answer in zip(numbers, received, strict=True):
                answers[number] = answer
            for number, state in zip(numbers, states, strict=bool(states)):
                self._states[self.client_of(messages[number].metadata.dst_node_id)] = state
        return [_reply(message, answer) for message, answer in zip(messages, answers, strict=True)]

    def _replace(self, slot: int) -> None:
        """A new actor in the place of a lost one, or, where the cluster has no room for it, one that is left."""
        ray = self._ray
        lost = self._actors[slot]
        chosen = self._fresh()
        if chosen is None:
            others = [
                actor for actor in dict.fromkeys(self._actors) if actor is not lost and self._alive(actor)
            ]
            if not others:
                raise RunFailed(
                    "all Ray actors were lost and no new one could be started; the cluster has "
                    f"{_resources(ray.available_resources())} left"
                )
            chosen = others[0]
        slots = [number for number, actor in enumerate(self._actors) if actor is lost]
        for number in slots:
            self._actors[number] = chosen
        moved = {c: s for c, s in self._states.items() if c % len(self._actors) in slots}
        try:
            ray.get(chosen.restore.remote(list(moved), *moved.values()))
        except ray.exceptions.RayError as error:
            raise RunFailed(
                "the memory of clients (error feedback) was lost together with the node that held it: "
                f"{_reason(error)}"
            ) from error

    def _fresh(self) -> Any | None:
        """A new actor that is up, or None where the cluster has no room for one."""
        ray, engine = self._ray, self._engine
        deadline = time.monotonic() + _ROOM_SECONDS
        while True:
            free = ray.available_resources()
            if free.get("CPU", 0) >= engine.cpus_per_actor and free.get("GPU", 0) >= engine.gpus_per_actor:
                break
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        actor = self._start()
        ready, _ = ray.wait([actor.ready.remote()], timeout=_START_SECONDS)
        if ready and self._alive(actor):
            return actor
        ray.kill(actor)
        return None

    def _alive(self, actor: Any) -> bool:
        try:
            return bool(self._ray.get(actor.ready.remote()))
        except self._ray.exceptions.RayError:
            return False

    def client_states(self) -> dict[int, Plain]:
        """What each client keeps; see :class:`LocalGrid`."""
        clients = sorted(self._states)
        states = self._ray.get([self._states[client] for client in clients])
        return {client: state for client, state in zip(clients, states, strict=True) if state}

    def restore_states(self, states: Mapping[int, Plain]) -> None:
        """Give clients what they kept; see :class:`LocalGrid`."""
        for slot, actor in enumerate(self._actors):
            mine = {c: self._ray.put(s) for c, s in states.items() if c % len(self._actors) == slot}
            self._states |= mine
            self._ray.get(actor.restore.remote(list(mine), *mine.values()))

    def reset(self) -> None:
        """Have all clients forget what they kept."""
        self._states.clear()
        for slot, actor in enumerate(self._actors):
            try:
                self._ray.get(actor.reset.remote())
            except _lost_actor_errors():
                self._replace(slot)

    def close(self) -> None:
        """Stop the actors and let go of the data."""
        for actor in getattr(self, "_actors", []):
            self._ray.kill(actor)
        self._states.clear()
        self._arguments = ()


class PartitionedGrid(ForwardingGrid):
    """Flower's own grid, seen so that nothing random is left: one node per client, in the order of the clients.

    Under ``flwr run`` node ids are random and their order too. Each node is asked once which partition it has.

    Parameters
    ----------
    grid : Grid
        Flower's; this process must be the server of its run.
    clients : int
        Size of the federation; nodes beyond it are left alone.

    Raises
    ------
    RunFailed
        If there are fewer nodes than clients.
    """

    def __init__(self, grid: Grid, clients: int) -> None:
        super().__init__(grid)
        question = RecordDict({CONFIG: ConfigRecord()})
        nodes = _wait_for_nodes(grid, clients)
        messages = [Message(question, node, "query.whoami") for node in nodes]
        self._node_of: dict[int, int] = {}
        for reply in grid.send_and_receive(messages, timeout=_START_SECONDS):
            if reply.has_error():
                raise RunFailed(f"a node could not say which client it is: {reply.error.reason}")
            number: Any = reply.content[METRICS][PARTITION]
            if number < clients:
                self._node_of[number] = reply.metadata.src_node_id
        missing = sorted(set(range(clients)) - set(self._node_of))
        if missing:
            raise RunFailed(
                f"setting 'federation.clients' = {clients}: Flower's federation has {len(nodes)} nodes, and client "
                f"{missing[0]} is none of them; give it more with --federation-config 'num-supernodes={clients}'"
            )
        self._client_of = {node: client for client, node in self._node_of.items()}

    def client_of(self, node: int) -> int:
        """The client's number behind a node id."""
        return self._client_of[node]

    def get_node_ids(self) -> Iterable[int]:
        """Node ids in the order of the clients."""
        return [self._node_of[client] for client in sorted(self._node_of)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Have the messages answered, in the order of the clients."""
        replies = self.grid.send_and_receive(list(messages), timeout=timeout)
        return sorted(replies, key=lambda reply: self.client_of(reply.metadata.src_node_id))


def _wait_for_nodes(grid: Grid, wanted: int) -> list[int]:
    deadline = time.monotonic() + _NODES_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return nodes


def _reply(message: Message, answer: Answer | None) -> Message:
    assert answer is not None
    if isinstance(answer, tuple):
        return Message(Error(*answer), reply_to=message)
    return Message(from_plain(answer), reply_to=message)


def _lost_actor_errors() -> tuple[type[Exception], ...]:
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.ObjectLostError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
        exceptions.WorkerCrashedError,
    )


def _reason(error: BaseException) -> str:
    """One line of a Ray error; of a traceback inside it, the last line."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no reason given"]
    return f"{type(cause).__name__}: {lines[-1] if 'error raised in its creation' in lines[0] else lines[0]}"


def _resources(found: Mapping[str, float]) -> str:
    return f"{found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs"


def _check_resources(engine: EngineConfig) -> None:
    import ray

    found = ray.cluster_resources()
    for kind, setting, share in (
        ("CPU", "cpus_per_actor", engine.cpus_per_actor),
        ("GPU", "gpus_per_actor", engine.gpus_per_actor),
    ):
        if engine.actors * share > found.get(kind, 0.0) + 1e-9:
            raise BadRequest(
                f"settings 'engine.actors' = {engine.actors} and 'engine.{setting}' = {share:g} ask for "
                f"{engine.actors * share:g} {kind}s; the Ray cluster has {found.get(kind, 0.0):g}"
            )


@contextmanager
def ray_session(engine: EngineConfig) -> Iterator[None]:
    """A Ray session for the block: the one that is there, the cluster at `ray_address`, or a private local one.

    The private one listens on the loopback interface only and has logical CPUs for all actors and for one attack
    beside them.

    Raises
    ------
    BadRequest
        If there is no cluster at `ray_address`.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if engine.ray_address is not None:
        _join(engine.ray_address)
    else:
        cpus = math.ceil(engine.actors * engine.cpus_per_actor) + engine.threads
        with internals.loopback_ray() as address:
            ray.init(
                address="local",
                num_cpus=max(1, cpus),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                **address,
            )
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    """Join the Ray cluster at "host:port", or with "auto" the one that ``ray start`` left on this machine."""
    import ray

    refusal = f"setting 'engine.ray_address' = {address!r}: no Ray cluster could be joined there"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise BadRequest(f"{refusal}; expected HOST:PORT of its head node, or 'auto'")
        try:  # ray.init alone would try for many minutes
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise BadRequest(f"{refusal} ({error})") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise BadRequest(f"{refusal} ({_reason(error)})") from error


@contextmanager
def open_grid(config: Config, world: World) -> Iterator[LocalGrid]:
    """The grid of the configured engine, with the session it needs, for the block."""
    place = Workplace.of(config, world)
    if config.engine.name == "inline":
        grid: LocalGrid = InlineGrid(place)
        try:
            yield grid
        finally:
            grid.close()
        return
    with ray_session(config.engine):
        grid = RayGrid(place)
        try:
            yield grid
        finally:
            grid.close()


__all__ = [
    "FIRST_NODE",
    "InlineGrid",
    "LocalGrid",
    "PartitionedGrid",
    "RayGrid",
    "open_grid",
    "ray_session",
]
