"""Clients' updates, read from the journal in which the run has written them down already."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, MetricRecord

from fedattack.compression import decode
from fedattack.compression.carrier import from_array
from fedattack.errors import PayloadError, RunFailed
from fedattack.models import build_model
from fedattack.observation import Observation, Scenario, UpdateKind
from fedattack.task import trained_parameters
from simulations.engine.flower_internals import from_plain
from simulations.engine.journal import Journal
from strategies import messages as wire


@dataclass(frozen=True)
class JournaledReplies:
    """What :class:`fedattack.unlearning.History` reads in the place of files of its own; packed replies only."""

    journal: Journal
    scenario: Scenario

    def observed(self, round: int, clients: Collection[int]) -> Iterator[Observation]:
        """What these clients sent in a round, ascending; RunFailed where the journal has not, or not all, of it."""
        trained = trained_parameters(build_model(self.scenario.model))
        shapes = [tuple(parameter.shape) for parameter in trained.values()]
        kind: UpdateKind = "gradient" if self.scenario.training.protocol == "fedsgd" else "delta"
        answers = self.journal.read_replies(round)
        for client in sorted(clients):
            answer = answers.get(client, (0, None))
            records = [] if isinstance(answer, tuple) else list(from_plain(answer).values())
            arrays = next((one for one in records if isinstance(one, ArrayRecord)), None)
            told = next((one for one in records if isinstance(one, MetricRecord)), None)
            if arrays is None or told is None or wire.PACKED not in arrays:
                raise RunFailed(
                    f"cannot forget: the journal {str(self.journal.folder)!r} has no packed update of client "
                    f"{client} in round {round}"
                )
            agreed = self.scenario.compression
            try:
                packed = from_array(arrays[wire.PACKED])
                update = decode(packed, tuple(trained), shapes, kind, agreed, round=round)
            except PayloadError as error:
                raise RunFailed(
                    f"cannot forget: the update of client {client} in round {round}: {error}"
                ) from error
            buffers = {n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items() if n != wire.PACKED}
            examples = told[wire.NUM_EXAMPLES]
            assert isinstance(examples, int)
            yield Observation(
                round, client, self.scenario, {}, update, examples, wire_bytes=len(packed), buffers=buffers
            )

    def bytes(self, round: int) -> int:
        """What a round's replies take on disk."""
        return self.journal.size(round)
