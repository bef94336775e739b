"""Flower's grid over long-lived Ray actors."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import Message

from fedattack.config import Config, EngineConfig
from fedattack.errors import BadRequest, RunFailed
from simulations.client_app import Workplace, open_workplace
from simulations.engine import flower_internals as internals
from simulations.engine.flower_internals import Answer, Plain, from_plain, plain_answer, reply_of, to_plain
from simulations.engine.local_grid import FIRST_NODE, Contexts, LocalGrid, _answer, _limit, _load_app
from simulations.engine.ray_session import _reason, _resources

log = logging.getLogger("fedattack.grid")
_RETRIES = 3
_START_SECONDS = 180.0
"""A process that imports torch and Flower takes seconds, and minutes where many start on a busy machine."""
_ROOM_SECONDS = 5.0


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

    def work(
        self, orders: Sequence[tuple[int, int, str, str]], stateful: bool, *contents: Plain
    ) -> list[Any] | tuple[Any, ...]:
        """Have clients answer; where `stateful`, also return what each keeps, as an object of its own.

        An order is (client, index into `contents`, message type, message id).
        """
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
        super().__init__(len(place.partitions))
        import ray

        self._ray = ray
        engine = place.config.engine
        self._engine = engine
        self._stateful = place.stateful
        self._states: dict[int, Any] = {}
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
            orders = []
            for about, content in ((messages[n].metadata, id(messages[n].content)) for n in numbers):
                client = self.client_of(about.dst_node_id)
                orders.append((client, used.index(content), about.message_type, about.message_id))
            returns = 1 + len(numbers) if self._stateful else 1
            call = self._actors[slot].work.options(num_returns=returns)
            references = call.remote(orders, self._stateful, *(contents[key] for key in used))
            first, *states = references if self._stateful else [references]
            pending[first] = (slot, numbers, states, attempt)

        for slot, numbers in batches.items():
            submit(slot, numbers, 1)
        answers: dict[int, Answer] = {}
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
                why = _reason(error)
                log.warning("a Ray actor was lost (%s); its %d clients are run again", why, len(numbers))
                self._replace(slot)
                submit(slot, numbers, attempt + 1)
                continue
            except ray.exceptions.RayTaskError as error:
                raise RunFailed(f"a Ray actor failed: {_reason(error)}") from error
            for number, answer in zip(numbers, received, strict=True):
                answers[number] = answer
            for number, state in zip(numbers, states, strict=bool(states)):
                self._states[self.client_of(messages[number].metadata.dst_node_id)] = state
        return [reply_of(message, answers[number]) for number, message in enumerate(messages)]

    def _replace(self, slot: int) -> None:
        """A new actor in the place of a lost one, or, where the cluster has no room for it, one that is left."""
        ray = self._ray
        lost = self._actors[slot]
        chosen = self._fresh()
        if chosen is None:
            others = (actor for actor in self._actors if actor is not lost and self._alive(actor))
            chosen = next(others, None)
        if chosen is None:
            raise RunFailed(
                "all Ray actors were lost and no new one could be started; the cluster has "
                f"{_resources(ray.available_resources())} left"
            )
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
        clients = sorted(self._states)
        states = self._ray.get([self._states[client] for client in clients])
        return {client: state for client, state in zip(clients, states, strict=True) if state}

    def restore_states(self, states: Mapping[int, Plain]) -> None:
        for slot, actor in enumerate(self._actors):
            mine = {c: self._ray.put(s) for c, s in states.items() if c % len(self._actors) == slot}
            self._states |= mine
            self._ray.get(actor.restore.remote(list(mine), *mine.values()))

    def reset(self) -> None:
        self._states.clear()
        for slot, actor in enumerate(self._actors):
            try:
                self._ray.get(actor.reset.remote())
            except _lost_actor_errors():
                self._replace(slot)

    def close(self) -> None:
        for actor in getattr(self, "_actors", []):
            self._ray.kill(actor)
        self._states.clear()
        self._arguments = ()


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
