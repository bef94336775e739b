"""What a gate is, and what a server has before it when it decides about a deletion."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedattack.models import build_model
from fedattack.observation import Auxiliary, Scenario
from fedattack.training import sample_losses
from fedattack.unlearning.history import Weights
from fedattack.unlearning.mechanism import Excluded, Mechanism
from fedattack.unlearning.requests import Deletion, Registered, Verdict


@dataclass
class Desk:
    """What a server has before it when it decides, and nothing else.

    Parameters
    ----------
    round : int
        After which it decides.
    weights : dict of str to Tensor
        The global model as it is.
    forgotten : mapping of int to frozenset of int
        Client -> positions that are forgotten already.
    sizes : sequence of int
        How many samples each client registered, by number.
    registered : callable
        Client -> what it registered of them.
    mean_loss : callable
        (client, positions) -> the mean loss of the global model on the client's samples without those, as the client
        says; None where it has no other.
    control : callable
        Deletions -> the model if as many random samples of the same clients were forgotten instead.
    auxiliary : Auxiliary, optional
        Public images of the server.
    granted : dict of int to int
        Client -> how many samples were granted to it before.
    """

    round: int
    scenario: Scenario
    weights: Weights
    forgotten: Excluded
    sizes: Sequence[int]
    registered: Callable[[int], Registered]
    mean_loss: Callable[[int, Collection[int]], float | None]
    control: Callable[[Sequence[Deletion]], Weights]
    auxiliary: Auxiliary | None = None
    granted: dict[int, int] = field(default_factory=dict)

    def losses(self, weights: Weights, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of each of some samples that the server has, float64 (n,)."""
        return sample_losses(build_model(self.scenario.model).eval(), weights, images, labels)

    def mean_loss_of(self, client: int, positions: Collection[int]) -> float | None:
        """The mean loss of the client's samples at `positions`, from what it says of all and of the others.

        None where there are no others.
        """
        gone = set(self.forgotten.get(client, ()))
        chosen = set(positions) - gone
        every, rest = self.mean_loss(client, gone), self.mean_loss(client, gone | chosen)
        count = self.sizes[client] - len(gone)
        if every is None or rest is None or not chosen:
            return None
        return (count * every - (count - len(chosen)) * rest) / len(chosen)

    def verdict(self, deletion: Deletion, gate: str, reason: str | None) -> Verdict:
        """A gate's answer as a record."""
        return Verdict(self.round, deletion.client, gate, reason is None, reason or "", deletion.samples)


@dataclass
class Gate:
    """Base of every gate: a dataclass whose fields are its settings, ``gates.NAME.FIELD``."""

    def check(self, name: str, mechanism: Mechanism, auxiliary: Auxiliary | None) -> None:
        """Refuse (NotApplicable), before the first round, a run in which it cannot decide anything."""
        return None

    def before(self, deletion: Deletion, desk: Desk) -> str | None:
        """Why the deletion is refused, in a sentence; None lets it through."""
        return None

    def after(self, deletions: Sequence[Deletion], weights: Weights, desk: Desk) -> str | None:
        """Why the model stays as it was, in a sentence, now that forgetting would make `weights` of it."""
        return None


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Collection[str]) -> float:
    """Euclidean distance of two models' tensors `names`."""
    return float(torch.cat([(one[name] - other[name]).double().flatten() for name in names]).norm())
