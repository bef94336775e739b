"""Attacks of the tests, named as ``rigged_seats:Class``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.membership.base import MembershipAttack
from adversaries.reconstruction.algebra.analytic import Analytic
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.seats import MaliciousClient
from fedattack.defenses import ClientDefenses, build_defenses
from fedattack.observation import Observation, Reconstruction


class Diary(MaliciousClient, MembershipAttack):
    """Trains on black images with label 0, sends the update doubled, and remembers what it saw."""

    keeps_memory = True

    def see(self, view):
        """Count the rounds, and keep their number, its seed and one weight."""
        seen = view.memory.get("seen", torch.zeros(0, 3, dtype=torch.float64))
        weight = float(next(iter(view.weights.values())).flatten()[0])
        row = torch.tensor([[view.round, view.seed % 2**40, weight]], dtype=torch.float64)
        view.memory["seen"] = torch.cat([seen, row])

    def poison(self, view, images, labels):
        """Black images of class 0."""
        return torch.zeros_like(images), torch.zeros_like(labels)

    def reply(self, view, update):
        """Twice the update."""
        return {name: 2 * tensor for name, tensor in update.items()}

    def answer(self, view, question):
        """The diary, and nothing about the question."""
        return {"scores": torch.zeros(len(question.labels), dtype=torch.float64), "seen": view.memory["seen"]}


class Failing(MembershipAttack):
    """Cannot read what it sees."""

    def watch(self, observations, target, candidates, seed, device):
        """Nothing."""
        raise ValueError("too odd to read")


class Silent(Diary):
    """Has no answer."""

    def answer(self, view, question):
        """None."""
        raise KeyError("nothing to say")


class Undeclared(Diary):
    """Keeps memory and does not say so."""

    keeps_memory = False


class Shortening(MaliciousClient, MembershipAttack):
    """Trains on fewer samples than it was given."""

    def poison(self, view, images, labels):
        """All but the first."""
        return images[1:], labels[1:]


class SeedOracle(Analytic):
    """Draws the client's noise again from what it is handed, takes it off, and divides."""

    def run(self, observations, seed, device, progress=None):
        """Attack what is left when the noise is subtracted."""
        cleaned = []
        for o in observations:
            dense = {name: torch.zeros_like(tensor) for name, tensor in o.update.dense().items()}
            defended = ClientDefenses(
                list(build_defenses(o.scenario.defense).values()), seed, o.round, o.client
            )
            noise = torch.cat([tensor.flatten() for tensor in defended.update(dense).values()])
            cleaned.append(_with_values(o, o.update.values - noise))
        return super().run(cleaned, seed, device)


def _with_values(observation, values):
    from dataclasses import replace

    return replace(observation, update=replace(observation.update, values=values))


FAULTS = {
    1: "ValueError: no such thing (rigged_attacks.py:",
    2: "answered images with 256 values that are NaN or infinite",
    3: "answered images of shape (1, 1, 8, 8); (B, 1, 16, 16) was asked for",
    4: "answered labels of shape (3,) for 1 images",
    5: "answered a NoneType, which is no Reconstruction",
}
"""Client -> what becomes of its answer; the others are answered grey."""


@dataclass
class Fussy(ReconstructionAttack):
    """Fails on some clients, each in its own way, and on two at once for want of memory."""

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        if len(observations) > 1:
            raise MemoryError
        (observation,) = observations
        client, size = observation.client, 16
        if client == 1:
            raise ValueError("no such thing\nat all")
        if client == 5:
            return [None]  # type: ignore[list-item]
        images: Tensor = torch.full((1, 1, 8, 8) if client == 3 else (1, 1, size, size), 0.5)
        labels = torch.zeros(3 if client == 4 else 1, dtype=torch.int64)
        return [Reconstruction(images * torch.nan if client == 2 else images, labels, 0.0)]


@dataclass
class Hopeless(Fussy):
    """Fails on everybody."""

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        raise RuntimeError("out of luck")
