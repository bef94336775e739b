"""What a reconstruction attack is: it rebuilds a client's private images from its update."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import nn

from adversaries.base import Attack, Progress, no_progress, share_of
from adversaries.needs import Needs
from adversaries.refusals import attack_refusals
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Observation, Reconstruction, Scenario

Module = TypeVar("Module", bound=nn.Module)
Status = Literal["certified", "approximate", "failed"]

CERTIFIED = 1e-5
"""Relative residual below which an answer explains the update to float32's rounding."""

APPROXIMATE = 0.25
"""Relative residual above which it explains too little of the update to be an answer."""


def status_of(residual: float, *, vouched: bool = True) -> Status:
    """What a relative residual says of an answer; `vouched`: whether nothing else speaks against a certificate."""
    if residual <= CERTIFIED and vouched:
        return "certified"
    return "approximate" if residual <= APPROXIMATE else "failed"


def failed(method: str, observation: Observation, reason: str, **details: object) -> Reconstruction:
    """The answer where nothing could be read, and why."""
    return Reconstruction(
        images=torch.zeros(0, *observation.scenario.image_shape),
        labels=torch.zeros(0, dtype=torch.int64),
        loss=math.inf,
        label_confidence=0.0,
        method=method,
        details={"status": "failed", "reason": reason, **details, "notes": []},
    )


def armable(scenario: Scenario, kind: type[Module]) -> Module:
    """The model of a scenario, which must have the block that an attack is made for."""
    module = build_model(scenario.model)
    if not isinstance(module, kind):
        raise NotApplicable(
            f"model.name = {scenario.model.name!r} is no {kind.__name__}, which this attack needs"
        )
    return module


@dataclass
class ReconstructionAttack(Attack):
    """Rebuilds a client's private images from its update."""

    family = "reconstruction"
    inverts = True
    needs: ClassVar[Needs] = Needs(sums="dense", fresh=True)

    def check(self, scenario: Scenario) -> None:
        """Raise NotApplicable where this attack does not fit; see :func:`adversaries.refusals.attack_refusals`."""
        if refused := attack_refusals(self, scenario):
            raise NotApplicable(refused[0])

    @abstractmethod
    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack observations that share one round's weights, or, under :meth:`needs_history`, of several rounds.

        An attack is free to treat them in one batched optimisation; answers come in their order. `seed` seeds every
        draw, and `progress` is told the share done.
        """


@dataclass
class OneByOne(ReconstructionAttack):
    """Attacks one observation after the other, in float64."""

    @abstractmethod
    def one(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """Attack one observation; `progress` is told the share done of it."""

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack the observations of one round; see :meth:`ReconstructionAttack.run`."""
        if device.type == "mps":  # has no float64
            device = torch.device("cpu")
        answers = []
        for number, observation in enumerate(observations):
            low, high = number / len(observations), (number + 1) / len(observations)
            told = share_of(progress, low, high, f"client {observation.client}: ")
            answers.append(self.one(observation, seed, device, told))
        return answers
