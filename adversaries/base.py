"""What an attack is: a small object with its hyper-parameters as dataclass fields, a `check` and a `run`.

A new attack is one file with a dataclass below one of the three family bases, one line in
:data:`adversaries.ATTACKS`, and one test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedattack.observation import (
    Auxiliary,
    Candidates,
    MembershipScores,
    Observation,
    Reconstruction,
    Scenario,
    UnlearningRequest,
)
from fedattack.registry import build_plugin, plugin_options

Progress = Callable[[float, str], None]
"""Called with (share done in [0, 1], short text); free to ignore."""


def no_progress(share: float, text: str) -> None:
    """A :data:`Progress` that shows nothing."""


@dataclass
class Attack(ABC):
    """Base of every attack.

    Attributes
    ----------
    family : str
        "reconstruction", "membership" or "unlearning".
    seat : str
        Who runs it: "server" or "client".
    needs : str
        One line for a person: what it must see or be granted.
    """

    family: ClassVar[Literal["reconstruction", "membership", "unlearning"]]
    seat: ClassVar[Literal["server", "client"]] = "server"
    needs: ClassVar[str] = ""

    def check(self, scenario: Scenario) -> None:
        """Refuse a scenario this attack cannot apply to, before anything starts.

        Raises
        ------
        NotApplicable
            In one sentence: what stands in the way and what would help.
        """
        del scenario


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
    arms: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    def arm(
        self, scenario: Scenario, weights: dict[str, Tensor], seed: int, auxiliary: Auxiliary | None
    ) -> dict[str, Tensor]:
        """What a malicious server sends instead of the global model, where :attr:`arms` is set.

        Parameters
        ----------
        scenario : Scenario
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
        scenario : Scenario
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


@dataclass
class MembershipAttack(Attack):
    """Tells which candidate samples a client trained on.

    Attributes
    ----------
    clients_needed : int
        Clients that must answer in one round, the target included.
    """

    family = "membership"
    clients_needed: ClassVar[int] = 1

    @abstractmethod
    def run(
        self,
        observations: Sequence[Observation],
        target: int,
        candidates: Candidates,
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> MembershipScores:
        """Score `candidates` for membership in the data of client `target`.

        Parameters
        ----------
        observations : sequence of Observation
            Everything the seat saw: all clients, all rounds.
        target : int
            `Observation.client` of the client asked about.
        candidates : Candidates
            One fixed list for the whole run.
        """


@dataclass
class UnlearningAttack(Attack):
    """A client that chooses which of its own samples the server must forget."""

    family = "unlearning"
    seat = "client"

    @abstractmethod
    def choose(
        self, client: int, model: nn.Module, images: Tensor, labels: Tensor, requests: int, seed: int
    ) -> UnlearningRequest:
        """Choose `requests` positions of the client's own samples.

        Parameters
        ----------
        client : int
            The requesting client.
        model : nn.Module
            The current global model, as every client has it.
        images, labels : Tensor
            The client's own partition: float32 (N, C, H, W) in [0, 1] and int64 (N,).
        requests : int
            How many samples to ask for, at most N.
        """


def build_attack(
    cls: type[Attack], name: str, options: Mapping[str, Any], shared: Mapping[str, Any]
) -> Attack:
    """Build an attack from its own options and from those shared by all selected attacks.

    Raises
    ------
    ConfigError
        If one of its own options is unknown or malformed. Shared options that it lacks are passed over; the caller
        sees to it that each is known to at least one attack.
    """
    return build_plugin(cls, name, options, shared)


def attack_options(cls: type[Attack]) -> dict[str, Any]:
    """Parameter -> default of an attack, for `fedattack list` and the docs."""
    return plugin_options(cls)
