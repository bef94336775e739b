"""What a reconstruction attack is: it rebuilds a client's private images from its update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adversaries.base import Attack, Progress, no_progress
from adversaries.needs import Needs
from adversaries.refusals import attack_refusals
from fedattack.errors import NotApplicable
from fedattack.observation import (
    Auxiliary,
    Observation,
    Reconstruction,
    Scenario,
)

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


@dataclass
class ReconstructionAttack(Attack):
    """Rebuilds a client's private images from its update.

    Attributes
    ----------
    arms : bool
        Whether the attack needs a malicious server: then the weights of :meth:`arm` are sent in the attacked rounds.
    adapts : bool
        Whether :meth:`tailor` asks what earlier rounds showed.
    """

    family = "reconstruction"
    inverts = True
    needs: ClassVar[Needs] = Needs(sums="dense", fresh=True)
    arms: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    def arm(
        self, scenario: Scenario, weights: dict[str, Tensor], seed: int, auxiliary: Auxiliary | None
    ) -> dict[str, Tensor]:
        """What a malicious server sends instead of the global model, where :attr:`arms` is set.

        Parameters
        ----------
        weights : dict of str to Tensor
            The global state dict; not to be modified.
        seed : int
            Seeds every draw; differs from round to round.
        auxiliary : Auxiliary or None
            Public data granted to the adversary.

        Returns
        -------
        dict of str to Tensor
            The same names, shapes and types.
        """
        del scenario, seed, auxiliary
        return weights

    def tailor(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        place: int,
        earlier: Sequence[Observation],
    ) -> dict[str, Tensor]:
        """What one client is sent differently, where :attr:`arms` is set: a server may send each its own model.

        Parameters
        ----------
        weights : dict of str to Tensor
            Those of :meth:`arm`; not to be modified. They are also what an observation of a sum over clients holds.
        place : int
            Of the client among those drawn in the round, from 0, in ascending order.
        earlier : sequence of Observation
            Where :attr:`adapts` is set, what was seen of this client (of everyone, under secure aggregation) in
            earlier armed rounds, the latest last.

        Returns
        -------
        dict of str to Tensor
            The tensors that differ, of the same shapes and types; none: all clients get `weights`.
        """
        del scenario, weights, place, earlier
        return {}

    def check(self, scenario: Scenario) -> None:
        """Refuse a scenario this attack cannot apply to; see :func:`adversaries.refusals.attack_refusals`.

        Raises
        ------
        NotApplicable
        """
        if refused := attack_refusals(self, scenario):
            raise NotApplicable(refused[0])

    def needs_history(self, scenario: Scenario) -> bool:
        """Whether a client's later updates are read with its earlier ones.

        Then :meth:`run` is given all updates that the server saw of its victims up to the last attacked round.
        """
        del scenario
        return False

    @abstractmethod
    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack observations that share one round's weights, or, under :meth:`needs_history`, of several rounds.

        Parameters
        ----------
        observations : sequence of Observation
            All from the same round unless the attack needs their history; an attack is free to treat them in one
            batched optimisation.
        seed : int
            Seeds every draw of the attack.
        device : torch.device
            Where to compute.
        progress : Progress
            Told about the share done.

        Returns
        -------
        list of Reconstruction
            In the order of `observations`.
        """
