"""The malicious server: sends weights that an attack made, reads the replies, and trains on as if nothing were."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from adversaries import seats
from fedattack.errors import ConfigError
from fedattack.observation import EVERYONE, Candidates, Observation, Scenario
from fedattack.rng import adversary_seed
from strategies.eavesdropper import Eavesdropper

log = logging.getLogger("fedattack.strategies")


class MaliciousServer(Eavesdropper):
    """An :class:`~strategies.Eavesdropper` that in chosen rounds sends an attack's weights instead of its model.

    A gradient at those weights says nothing about the global model, so that an armed round is observed and not
    aggregated, unless the attack says so: the global model, and whatever the wrapped strategy keeps, stay as they
    were. The attack may have each client that is drawn get weights of its own
    (:meth:`~adversaries.seats.MaliciousServer.tailor`), and may know the `candidates` that it will be asked about.

    Raises
    ------
    ConfigError
        If the attack takes another seat, or (in the round) its weights do not fit the model.
    """

    def __init__(
        self,
        strategy: Strategy,
        scenario: Scenario,
        *,
        attack: seats.MaliciousServer,
        rounds: Collection[int],
        candidates: Candidates | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(attack, seats.MaliciousServer):
            name = type(attack).__name__
            raise ConfigError(f"attack {name} changes nothing in the model: use Eavesdropper")
        super().__init__(strategy, scenario, **options)
        self.attack = attack
        self.rounds = frozenset(rounds)
        self.candidates = candidates
        self.aggregates_armed = attack.aggregates
        self.remembers = attack.adapts
        self._earlier: dict[int, list[Observation]] = defaultdict(list)

    def outgoing(self, round: int, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The attack's weights in an armed round, else None."""
        if round not in self.rounds:
            return None
        seed = adversary_seed(self.seed, "arm", round)
        turn = sum(armed < round for armed in self.rounds)
        sent = self.attack.arm(self.scenario, dict(weights), seed, self.auxiliary, self.candidates, turn)
        name = type(self.attack).__name__
        if list(sent) != list(weights):
            raise ConfigError(f"attack {name} sends other tensors than the model's")
        self._check(sent, weights)
        fate = "takes them on" if self.aggregates_armed else "skips this round"
        log.info("round %d: the weights of attack %s are sent; the global model %s", round, name, fate)
        return sent

    def tailored(self, weights: dict[str, Tensor], place: int, node: int) -> dict[str, Tensor]:
        """What the attack has one client get differently in an armed round."""
        earlier = self._earlier[EVERYONE if self.aggregated else node]
        own = self.attack.tailor(self.scenario, weights, place, earlier)
        self._check(own, weights)
        return own

    def seen(self, observation: Observation, node: int) -> None:
        """Keep what an armed round showed, for attacks that adapt to it."""
        if self.remembers and observation.round in self.rounds:
            self._earlier[node].append(observation)

    def recalls(self, round: int) -> bool:
        """Whether a later round's weights depend on what this one showed."""
        return self.remembers and round in self.rounds

    def _check(self, sent: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        name = type(self.attack).__name__
        for key, tensor in sent.items():
            if key not in weights:
                raise ConfigError(f"attack {name} sends {key!r}, which the model does not have")
            like = weights[key]
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise ConfigError(
                    f"attack {name} sends {key!r} as {tuple(tensor.shape)} {tensor.dtype}, the model's is "
                    f"{tuple(like.shape)} {like.dtype}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"attack {name} sends NaN or infinite values in {key!r}")
