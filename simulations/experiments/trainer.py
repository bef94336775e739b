"""How a mechanism reaches the clients, and the data where one client is the server."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from fedattack.config import Config
from fedattack.data import World
from fedattack.errors import NotApplicable, RunFailed
from fedattack.observation import Observation
from fedattack.unlearning import (
    Central,
    ClientUpdate,
    Cost,
    History,
    Weights,
)
from fedattack.unlearning.mechanism import Excluded
from simulations.client_app import Workplace, exclusion_settings, share_of
from simulations.engine.federation import (
    ask,
    run_federation,
)
from simulations.engine.local_grid import LocalGrid
from strategies.messages import FORGETTING, METRICS, OBJECTIVE, SHARE


class FederationTrainer:
    """How a mechanism reaches the clients of an open grid (:class:`fedattack.unlearning.Trainer`)."""

    def __init__(
        self, config: Config, world: World, grid: LocalGrid | None, place: Workplace | None = None
    ) -> None:
        self.config, self.world, self.grid = config, world, grid
        self.place = place or Workplace.of(config, world)
        self.cost = Cost()

    def train(
        self,
        excluded: Excluded,
        weights: Weights,
        first_round: int,
        history: History | None = None,
        **kept: Any,
    ) -> Weights:
        """Train the rounds from `first_round` up to the request; `history` keeps of them what it is for.

        Without a `history` the server forgets, and says so.
        """
        if history is None:
            kept["told"] = {FORGETTING: True}
        else:
            kept |= {"on_weights": history.keep_weights, "on_observation": history.keep_update}
            kept["observe"] = lambda round, _: history.wants_updates(round)
            kept["on_round"] = lambda r: history.note_round(r.round, r.clients, r.aggregated)
        return self._run(excluded, weights, first_round, self.config.request_round, **kept)

    def go_on(self, excluded: Excluded, weights: Weights) -> Weights:
        """The rounds that follow the request."""
        last = self.config.federation.rounds
        return self._run(excluded, weights, self.config.request_round + 1, last)

    def updates(
        self,
        excluded: Excluded,
        weights: Weights,
        round: int,
        share: float = 1.0,
        clients: Collection[int] | None = None,
    ) -> Iterator[ClientUpdate]:
        """See :class:`fedattack.unlearning.Trainer`."""
        seen = self._seen(excluded, weights, round, clients, {SHARE: float(share)})
        return map(ClientUpdate.of, seen)

    def gradients(
        self,
        excluded: Excluded,
        weights: Weights,
        round: int,
        clients: Collection[int] | None = None,
        objective: str = "loss",
    ) -> Iterator[ClientUpdate]:
        """See :class:`fedattack.unlearning.Trainer`."""
        seen = self._seen(excluded, weights, round, clients, {OBJECTIVE: objective})
        return (ClientUpdate(o.client, o.update.dense(), o.buffers, o.num_examples) for o in seen)

    def _seen(
        self,
        excluded: Excluded,
        weights: Weights,
        round: int,
        clients: Collection[int] | None,
        told: dict[str, Any],
    ) -> list[Observation]:
        seen: list[Observation] = []
        everything = {
            client: len(self.place.partitions[client]) == len(excluded.get(client, ()))
            for client in (range(len(self.place.partitions)) if clients is None else clients)
        }
        left = [client for client, gone in everything.items() if not gone]
        if not left:
            return []
        if clients is not None or len(left) < len(everything):
            self._run(excluded, weights, round, round, seen, clients=left, told=told)
        else:
            self._run(excluded, weights, round, round, seen, told=told)
        return seen

    def evaluate(
        self,
        weights: Weights,
        clients: Collection[int],
        excluded: Mapping[int, Collection[int]] | None = None,
    ) -> dict[int, dict[str, float]]:
        """The clients' figures of `weights` on their samples, without the `excluded` positions."""
        assert self.grid is not None
        own = exclusion_settings(excluded or {})
        answers = ask(self.grid, "evaluate", weights, clients, own=own)
        return {client: dict(reply.content[METRICS]) for client, reply in answers}

    def central(self) -> Central:
        """The only client's data, with what it planted."""
        if len(self.place.partitions) != 1:
            raise NotApplicable(
                f"mechanism {self.config.unlearning.mechanism!r} needs the data itself, and "
                f"{len(self.place.partitions)} clients hold it; use one (--scenario central)"
            )
        samples = self.place.samples(0, np.arange(len(self.place.partitions[0])))
        scenario, seed, rounds = self.place.scenario, self.config.seed, self.config.request_round
        return Central(scenario, *samples, seed, rounds, self.config.unlearning.draws, self.cost)

    def _run(
        self,
        excluded: Excluded,
        weights: Weights,
        first: int,
        last: int,
        seen: list[Observation] | None = None,
        told: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> Weights:
        if self.grid is None:
            raise RunFailed("a mechanism asked clients to work before anybody asked to be forgotten")
        federation = self.config.federation.model_copy(update={"evaluate": False, "rounds": last})
        if seen is not None:
            how["on_observation"], told = seen.append, {**(told or {}), FORGETTING: True}
        result = run_federation(
            self.config.model_copy(update={"federation": federation}),
            self.world,
            initial=weights,
            first_round=first,
            excluded=excluded,
            grid=self.grid,
            told=told,
            **how,
        )
        training, whole = self.config.training, OBJECTIVE in (told or {})
        sizes = [len(ids) for ids in self.place.partitions]
        share = float((told or {}).get(SHARE, 1.0))
        steps = [1 if whole else share_of(share, training.steps(n)) for n in sizes]
        used = [n if whole or not training.batch_size else min(training.batch_size, n) for n in sizes]
        worked = [client for record in result.rounds for client in record.clients]
        passed = sum(steps[client] * used[client] for client in worked)
        self.cost.gradients += passed / max(1, sum(sizes))
        self.cost.rounds += len(result.rounds)
        self.cost.client_steps += sum(steps[client] for client in worked)
        self.cost.bytes += sum(record.wire_bytes + record.buffer_bytes for record in result.rounds)
        return result.weights
