"""Flower's grid over long-lived Ray actors."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Message

from fedattack.config import Config, EngineConfig
from fedattack.errors import BadRequest, RunFailed, told
from simulations.client_app import Workplace, open_workplace
from simulations.engine import flower_internals as internals
from simulations.engine.flower_internals import Answer, Plain, from_plain, plain_answer, reply_of, to_plain
from simulations.engine.local_grid import FIRST_NODE, Contexts, LocalGrid, _answer, _limit, _load_app
from simulations.engine.ray_session import _reason, _resources

log = logging.getLogger("fedattack.grid")
_MOST_LOST = 30
"""Actors that a round may cost before the fault is looked for in the machine."""
_START_SECONDS = 180.0
"""A process that imports torch and Flower takes seconds, and minutes where many start on a busy machine."""
_ROOM_SECONDS = 5.0

Order = tuple[int, int, str, str]
"""(client, index into the contents, message type, message id)."""


class ClientActor:
    """Many clients in one Ray actor: settings and data arrive once, what clients keep stays here.

    `client_app` is ``"module:app"``; the rest are the fields of a :class:`~simulations.client_app.Workplace`.
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
        self._contexts = Contexts(run_id, len(partitions))
        open_workplace(run_id, Workplace(config, scenario, images, labels, tuple(partitions)))

    def ready(self) -> str:
        """The id of the node it is on, once the actor is up."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def restore(self, clients: Sequence[int], *states: Plain) -> bool:
        """Take over clients of a lost actor, or of a run that was interrupted."""
        for client, state in zip(clients, states, strict=True):
            self._contexts[client].state = from_plain(state)
        return True

    def reset(self) -> bool:
        """Forget what the clients kept."""
        self._contexts.clear()
        return True

    def work(self, orders: Sequence[Order], stateful: bool, *contents: Plain) -> list[Any] | tuple[Any, ...]:
        """Have clients answer; where `stateful`, also return what each keeps, as an object of its own."""
        records = [from_plain(content) for content in contents]
        limits = [_limit(record) for record in records]
        answers: list[Answer] = []
        states: list[Plain] = []
        for client, index, message_type, message_id in orders:
            message = internals.received(
                records[index], self._run_id, FIRST_NODE + client, message_type, message_id
            )
            context = self._contexts[client]
            answer = _answer(self._app, message, context, limits[index])
            answers.append(plain_answer(answer))
            if stateful:
                states.append(to_plain(context.state))
        return (answers, *states) if states else answers


class RayGrid(LocalGrid):
    """Clients on long-lived Ray actors: one call per actor and round, the broadcast put once, the data put once.

    Client c works on actor ``c % actors`` and what it keeps stays there; the driver owns a reference to a copy in
    Ray's store, with which another actor takes over when one is lost. Needs a Ray session (:func:`ray_session`).
    """

    def __init__(self, place: Workplace, client_app: str = "simulations.client_app:app") -> None:
        super().__init__(len(place.partitions), place.config.engine.deadline)
        import ray

        self.ray = ray
        engine = place.config.engine
        self.engine = engine
        self._stateful = place.stateful
        self.states: dict[int, Any] = {}  # what each client keeps, as references
        self.poisonous: set[int] = set()  # clients that ended an actor, or were late
        _check_resources(engine)
        share = {"num_cpus": engine.cpus_per_actor, "num_gpus": engine.gpus_per_actor}
        self._actor_class = ray.remote(**share, max_restarts=0, scheduling_strategy="SPREAD")(ClientActor)
        self._arguments: tuple[Any, ...] = (
            self.run_id,
            client_app,
            place.config,
            place.scenario,
            ray.put(place.images),
            ray.put(place.labels),
            ray.put(list(place.partitions)),
        )
        self.actors = [self._start() for _ in range(min(engine.actors, self.clients))]
        self._await(self.actors)

    def _start(self) -> Any:
        return self._actor_class.remote(*self._arguments)

    def _await(self, actors: Sequence[Any]) -> None:
        waiting = [actor.ready.remote() for actor in actors]
        ready, missing = self.ray.wait(waiting, num_returns=len(waiting), timeout=_START_SECONDS)
        if missing:
            self.close()
            raise RunFailed(
                f"{len(missing)} of {len(waiting)} Ray actors did not start in {_START_SECONDS:.0f} s; "
                f"the cluster has {_resources(self.ray.available_resources())} left"
            )
        try:
            self.ray.get(ready)
        except self.ray.exceptions.RayError as error:
            self.close()
            raise RunFailed(f"a Ray actor could not start: {_reason(error)}") from error

    def _execute(self, messages: Sequence[Message]) -> list[Message]:
        return _Round(self, messages).replies()

    def submit(self, slot: int, orders: Sequence[Order], contents: Sequence[Any]) -> list[Any]:
        """Have an actor carry out orders; the references to their answers, then to what each client keeps."""
        returns = 1 + len(orders) if self._stateful else 1
        call = self.actors[slot].work.options(num_returns=returns)
        references = call.remote(orders, self._stateful, *contents)
        return list(references) if self._stateful else [references]

    def lane(self, client: int) -> int:
        """The first of the slots that have the actor on which a client works."""
        return self.actors.index(self.actors[client % len(self.actors)])

    def replace(self, slot: int) -> None:
        """A new actor in the place of a lost one, or, where the cluster has no room for it, one that is left."""
        ray = self.ray
        lost = self.actors[slot]
        ray.kill(lost)  # one that hangs still holds its share of the cluster
        chosen = self._fresh()
        if chosen is None:
            others = (actor for actor in self.actors if actor is not lost and self._alive(actor))
            chosen = next(others, None)
        if chosen is None:
            raise RunFailed(
                "all Ray actors were lost and no new one could be started; the cluster has "
                f"{_resources(ray.available_resources())} left"
            )
        slots = [number for number, actor in enumerate(self.actors) if actor is lost]
        for number in slots:
            self.actors[number] = chosen
        moved = {c: s for c, s in self.states.items() if c % len(self.actors) in slots}
        late = self.deadline
        patience = None if late is None else _START_SECONDS + late * self.clients
        try:
            ray.get(chosen.restore.remote(list(moved), *moved.values()), timeout=patience)
        except ray.exceptions.RayError as error:
            raise RunFailed(
                "the memory of clients (error feedback) was lost together with the node that held it: "
                f"{_reason(error)}"
            ) from error

    def _fresh(self) -> Any | None:
        """A new actor that is up, or None where the cluster has no room for one."""
        ray, engine = self.ray, self.engine
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
        """Whether an actor is there; one that is at work answers later, one that is lost fails at once."""
        answer = actor.ready.remote()
        try:
            ready, _ = self.ray.wait([answer], timeout=_ROOM_SECONDS)
            return not ready or bool(self.ray.get(answer))
        except self.ray.exceptions.RayError:
            return False

    def client_states(self) -> dict[int, Plain]:
        clients = sorted(self.states)
        states = self.ray.get([self.states[client] for client in clients])
        return {client: state for client, state in zip(clients, states, strict=True) if state}

    def restore_states(self, states: Mapping[int, Plain]) -> None:
        for slot, actor in enumerate(self.actors):
            mine = {c: self.ray.put(s) for c, s in states.items() if c % len(self.actors) == slot}
            self.states |= mine
            self.ray.get(actor.restore.remote(list(mine), *mine.values()))

    def reset(self) -> None:
        self.states.clear()
        self.poisonous.clear()
        for slot, actor in enumerate(self.actors):
            try:
                self.ray.get(actor.reset.remote())
            except _lost_actor_errors():
                self.replace(slot)

    def close(self) -> None:
        for actor in getattr(self, "actors", []):
            self.ray.kill(actor)
        self.states.clear()
        self._arguments = ()


@dataclass(frozen=True)
class _Batch:
    """Messages, by number, that an actor works through in one call; Ray's references to what comes of it."""

    numbers: list[int]
    answers: Any
    states: list[Any]


class _Round:
    """The messages of a round on their way through the actors.

    Each actor is handed all of its clients at once. Where it ends, they are handed to another one by one, so that it
    is seen which of them ends it: a client that ended two actors, the second one alone, has no answer, and is from
    then on the last and alone. Under ``engine.deadline`` clients come one by one from the start.
    """

    def __init__(self, grid: RayGrid, messages: Sequence[Message]) -> None:
        self._grid, self._messages, self._ray = grid, messages, grid.ray
        self._deadline = grid.deadline
        self._contents: dict[int, Any] = {}
        self._answers: dict[int, Answer] = {}
        self._endings: Counter[int] = Counter()
        self._lanes: dict[int, deque[_Batch]] = {}  # the first batch is the one that is worked on
        self._since: dict[int, float] = {}
        self._lost = 0
        clients = [grid.client_of(message.metadata.dst_node_id) for message in messages]
        apart = [number for number, client in enumerate(clients) if client in grid.poisonous]
        together: dict[int, list[int]] = {}
        for number, message in enumerate(messages):
            if id(message.content) not in self._contents:
                self._contents[id(message.content)] = self._ray.put(to_plain(message.content))
            if number not in apart:
                together.setdefault(grid.lane(clients[number]), []).append(number)
        for lane, numbers in together.items():
            alone = self._deadline is not None
            self._add(lane, [[n] for n in numbers] if alone else [numbers])
        for number in apart:
            self._add(grid.lane(clients[number]), [[number]])

    def _add(self, lane: int, parts: Sequence[list[int]]) -> None:
        queue = self._lanes.setdefault(lane, deque())
        if not queue:
            self._since[lane] = time.monotonic()
        for numbers in parts:
            used = list(dict.fromkeys(id(self._messages[n].content) for n in numbers))
            orders = []
            for message in (self._messages[n] for n in numbers):
                about, index = message.metadata, used.index(id(message.content))
                orders.append(
                    (self._grid.client_of(about.dst_node_id), index, about.message_type, about.message_id)
                )
            contents = [self._contents[key] for key in used]
            answers, *states = self._grid.submit(lane, orders, contents)
            queue.append(_Batch(numbers, answers, states))

    def replies(self) -> list[Message]:
        """One per message, in their order."""
        while waiting := {queue[0].answers: lane for lane, queue in self._lanes.items() if queue}:
            ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=self._patience())
            if ready:
                self._take(waiting[ready[0]])
                continue
            now, limit = time.monotonic(), self._deadline or 0.0
            for lane in waiting.values():
                if now - self._since[lane] >= limit:
                    self._give_up(lane, f"no answer within {limit:g} s")
        return [reply_of(message, self._answers[number]) for number, message in enumerate(self._messages)]

    def _patience(self) -> float | None:
        """Seconds until the first of the clients at work is late."""
        if self._deadline is None:
            return None
        first = min(self._since[lane] for lane, queue in self._lanes.items() if queue)
        return max(0.0, first + self._deadline - time.monotonic())

    def _take(self, lane: int) -> None:
        """What an actor's batch has come to."""
        batch = self._lanes[lane][0]
        try:
            received = self._ray.get(batch.answers)
        except _lost_actor_errors() as error:
            self._ended(lane, _reason(error), error)
            return
        except self._ray.exceptions.RayTaskError as error:
            raise RunFailed(f"a Ray actor failed: {_reason(error)}") from error
        self._lanes[lane].popleft()
        self._since[lane] = time.monotonic()
        for number, answer in zip(batch.numbers, received, strict=True):
            self._answers[number] = answer
        for number, state in zip(batch.numbers, batch.states, strict=bool(batch.states)):
            self._grid.states[self._client(number)] = state

    def _client(self, number: int) -> int:
        return self._grid.client_of(self._messages[number].metadata.dst_node_id)

    def _ended(self, lane: int, why: str, error: Exception) -> None:
        """An actor ended: find out by whose fault, or have its clients worked on again one by one."""
        numbers = self._lanes[lane][0].numbers
        self._lost += 1
        if self._lost > _MOST_LOST:
            raise RunFailed(
                f"Ray actors were lost {self._lost} times in one round ({why}); is there enough memory for "
                f"{len(self._grid.actors)} actors?"
            ) from error
        self._endings.update(numbers)
        if len(numbers) == 1:
            client = self._client(numbers[0])
            if client in self._grid.poisonous or self._endings[numbers[0]] > 1:
                self._give_up(lane, f"its process ended while it worked alone ({why})")
                return
        log.warning("a Ray actor was lost (%s); its %d clients are run again", why, len(numbers))
        self._again(lane)

    def _give_up(self, lane: int, why: str) -> None:
        """Do without the client that an actor works on, and go on with the others on another."""
        (number,) = self._lanes[lane].popleft().numbers
        self._answers[number] = (internals.CLIENT_RAISED, told(why))
        self._grid.poisonous.add(self._client(number))
        log.warning("client %d: %s; its actor is replaced", self._client(number), why)
        self._again(lane)

    def _again(self, lane: int) -> None:
        """Replace an actor, and hand what it has not done to its successor, one by one."""
        left = [[number] for batch in self._lanes.pop(lane) for number in batch.numbers]
        self._grid.replace(lane)
        self._add(self._grid.lane(lane), left)


def _lost_actor_errors() -> tuple[type[Exception], ...]:
    from ray import exceptions

    lost = (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.NodeDiedError)
    return (*lost, exceptions.OutOfMemoryError, exceptions.WorkerCrashedError)


def _check_resources(engine: EngineConfig) -> None:
    import ray

    found = ray.cluster_resources()
    for kind, setting in (("CPU", "cpus_per_actor"), ("GPU", "gpus_per_actor")):
        share = getattr(engine, setting)
        if engine.actors * share > found.get(kind, 0.0) + 1e-9:
            raise BadRequest(
                f"settings 'engine.actors' = {engine.actors} and 'engine.{setting}' = {share:g} ask for "
                f"{engine.actors * share:g} {kind}s; the Ray cluster has {found.get(kind, 0.0):g}"
            )
