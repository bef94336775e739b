"""The ReLU trap: neurons that wake for the samples asked about and for nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.inversion.evidence.first_layer import FirstLayer, first_layer
from adversaries.membership.base import Figures, MembershipAttack, rows_of
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.view import RoundView
from adversaries.needs import Needs
from adversaries.seats import MaliciousServer
from fedattack.config import Share
from fedattack.errors import NotApplicable
from fedattack.models.normalise import shown
from fedattack.observation import Auxiliary, Candidates, MembershipScores, Observation, Scenario

RIDGE = 1e-2
"""Of the background's covariance, relative to its mean variance."""

NARROWEST = 0.1
"""Least distance from candidate to background that is believed, where the candidate stands at 1 and the mean at 0."""


@dataclass
class ReLUTrap(MaliciousServer, MembershipAttack):
    """ReLU trap (Pichler et al., TDSC 2024; Nguyen et al., AMI, AISTATS 2023): one armed round tells members.

    The first linear layer is replaced. Neuron ``i % m`` looks at candidate ``i`` along the direction in which
    it stands out most from all other candidates and the public images, ``w = S^-1 (x - mu)`` with their mean
    and covariance, behind a bias that only the candidate exceeds. A client that does not train on it gets no
    gradient there; one that does sends a multiple of the candidate itself. Where there are more candidates
    than neurons, a neuron wakes for several, which the direction of its gradient tells apart.

    The score, in [0, 1], is the length of the row's gradient along the candidate, of its whole length, times
    the share of the row that its candidates explain: a stranger that woke the neuron lowers it. Armed rounds
    are asked about and no others; the best round counts.

    Parameters
    ----------
    gap : float
        In (0, 1): where the threshold lies between the candidate (0) and the background that comes nearest (1).
    """

    gap: Share = 0.2

    needs: ClassVar[Needs] = Needs(
        sums="single", first_layer=True, activations=("relu",), helped=True, held_out=True
    )

    def arm(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        seed: int,
        auxiliary: Auxiliary | None,
        candidates: Candidates | None = None,
        turn: int = 0,
    ) -> dict[str, Tensor]:
        """The global model with traps in the first layer; the neurons that trap nothing are silent."""
        if candidates is None:
            raise NotApplicable("relu-trap: no candidate to ask about")
        layer = first_layer(scenario.model)
        asked = shown(candidates.images.double(), scenario.model).flatten(1)
        granted = candidates.images[:0] if auxiliary is None else auxiliary.images
        public = shown(granted.double(), scenario.model).flatten(1)
        background = torch.cat([asked, public])
        mean = background.mean(0)
        covariance = (background - mean).T.cov() if len(background) > 1 else torch.eye(len(mean)).double()
        ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-6)
        inverse = torch.linalg.inv(covariance + ridge * torch.eye(len(mean), dtype=torch.float64))
        rows = torch.zeros_like(weights[layer.weight], dtype=torch.float64)
        biases = -torch.ones_like(weights[layer.bias], dtype=torch.float64)
        for neuron, group in enumerate(_groups(len(asked), len(rows))):
            caught = (asked[group] - mean) @ inverse
            # The least direction along which each of the group stands one above the mean.
            row = caught.T @ torch.linalg.pinv(caught @ (asked[group] - mean).T).sum(1)
            heights = (background - mean) @ row
            heights[group] = -1.0
            scale = self.gap * (1 - heights.max()).clamp_min(NARROWEST)
            rows[neuron], biases[neuron] = row / scale, 1 - (1 + mean @ row) / scale
        return weights | {layer.weight: rows.float(), layer.bias: biases.float()}

    def watch(self, view: RoundView, seed: int) -> Figures:
        """``clients``, int64 (K,), and ``statistic``, float64 (K, N); without rows where no trap was sent."""
        model = view.observations[0].scenario.model
        images, layer = shown(view.candidates.images.double(), model).flatten(1), first_layer(model)
        trapped = [o for o in view.observations if _is_trap(o, layer, images)]
        rows = [_read(o, layer, images) for o in trapped]
        empty = torch.empty(0, len(images), dtype=torch.float64)
        return {
            "clients": torch.tensor([o.client for o in trapped], dtype=torch.int64),
            "statistic": torch.stack(rows) if rows else empty,
        }

    def scores(self, rounds: Mapping[int, Figures], target: int, knowledge: Knowledge) -> MembershipScores:
        """The candidates' best scores over the armed rounds that the target answered; NotApplicable without any."""
        found = rows_of(rounds, target)
        if not found:
            raise NotApplicable(f"relu-trap: client {target}, the target, answered in no armed round")
        best = torch.stack(list(found.values())).amax(0)
        return MembershipScores(best, "relu-trap", {"rounds": list(found), "awake": int((best > 0).sum())})


def _groups(count: int, neurons: int) -> list[list[int]]:
    """The candidates of each neuron that traps any."""
    return [list(range(neuron, count, neurons)) for neuron in range(min(count, neurons))]


def _is_trap(observation: Observation, layer: FirstLayer, images: Tensor) -> bool:
    """Whether the weights sent were these traps: nearly every candidate wakes its neuron, and few others."""
    weight, bias = observation.weights[layer.weight].double(), observation.weights[layer.bias].double()
    awake = images @ weight.T + bias > 0
    own = torch.nn.functional.one_hot(torch.arange(len(images)) % len(weight), len(weight)).bool()
    return (
        float(awake[own].double().mean()) > 0.9 and float(awake[~own].double().sum()) < 0.25 * awake.numel()
    )


def _read(observation: Observation, layer: FirstLayer, images: Tensor) -> Tensor:
    """Each candidate's score from one client's update, (N,)."""
    dense = observation.update.dense()
    rows = torch.cat([dense[layer.weight], dense[layer.bias][:, None]], dim=1).double().cpu()
    asked = torch.cat([images, torch.ones(len(images), 1, dtype=torch.float64)], dim=1)
    scores = torch.zeros(len(images), dtype=torch.float64)
    for row, group in zip(rows, _groups(len(images), len(rows)), strict=False):
        size = row.norm()
        if size > 0:
            shares = torch.linalg.lstsq(asked[group].T, row[:, None]).solution[:, 0]
            explained = (shares @ asked[group]).norm() / size
            scores[group] = explained * (shares.abs() * asked[group].norm(dim=1) / size).clamp(max=1)
    return scores
