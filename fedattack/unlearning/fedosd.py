"""Forgetting along the direction that is at right angles to what the remaining clients want."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedattack.models import build_model
from fedattack.task import tied_names, trained_parameters
from fedattack.unlearning.averaging import flat, moved, stepped, told
from fedattack.unlearning.history import ClientUpdate, History, Weights
from fedattack.unlearning.mechanism import Excluded, Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion


@dataclass
class FedOSD(Mechanism):
    """FedOSD (Pan et al., Federated unlearning with gradient descent and conflict mitigation, AAAI 2025).

    First `steps` times ``w <- w - rate * d``: d is g_u, the gradient of the mean ``-log(1 - p_y / 2)`` over the
    samples to be forgotten, without its part in the span of the remaining clients' gradients, ``g_u - A'(AA')^+ A
    g_u``, made as long as g_u. Then the last `rounds` rounds are trained again by the plain mean of the remaining
    clients' updates, each without its part along the way that was walked from the model before, and as long as
    before, so that the model does not walk back. A strategy other than the mean is not followed. Each step costs a
    round.

    Parameters
    ----------
    rate : float
        Size of the steps of the first part.
    steps : int
        Their number.
    rounds : int
        Rounds of recovery.
    """

    keeps = frozenset({"checkpoints"})
    singles = True
    rate: Annotated[float, Field(gt=0)] = 0.2
    steps: Annotated[int, Field(ge=1)] = 10
    rounds: Annotated[int, Field(ge=0)] = 4

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget the samples of `deletions`; see :meth:`Mechanism.forget`."""
        excluded = merged(history.excluded, deletions)
        if history.ignorant(excluded) is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        model = build_model(history.scenario.model)
        names, tied = tuple(trained_parameters(model)), tied_names(model)
        start = flat(history.weights, names)
        weights = self._unlearnt(deletions, history, trainer, excluded, names, tied)
        resumed = max(0, history.rounds - self.rounds)
        for round in range(resumed + 1, history.rounds + 1):
            walked = flat(weights, names) - start
            updates = (turned(one, walked, names) for one in trainer.updates(excluded, weights, round))
            weights = moved(weights, updates, tied)
        details = {"distance": float((flat(weights, names) - start).norm())}
        return Forgotten(weights, excluded, resumed, details=details | told(history.scenario, "a gradient"))

    def _unlearnt(
        self,
        deletions: Sequence[Deletion],
        history: History,
        trainer: Trainer,
        excluded: Excluded,
        names: Sequence[str],
        tied: dict[str, str],
    ) -> Weights:
        """The model after the first part."""
        weights, last, asking = history.weights, history.rounds, sorted({one.client for one in deletions})
        everybody = trainer.gradients(history.excluded, weights, last, clients=asking)
        sizes = {one.client: one.examples + len(history.excluded.get(one.client, ())) for one in everybody}
        wanted = {one.client: one.positions for one in deletions}
        rest = {client: frozenset(range(size)) - wanted[client] for client, size in sizes.items()}
        for _ in range(self.steps):
            forgotten = list(trainer.gradients(rest, weights, last, clients=sorted(rest), objective="forget"))
            if not forgotten:
                break
            slope = torch.stack([flat(one.change, names) for one in forgotten]).mean(0)
            others = [flat(one.change, names) for one in trainer.gradients(excluded, weights, last)]
            free = without(slope, torch.stack(others)) if others else slope
            weights = stepped(weights, -self.rate * same_length(slope, free), names, tied)
        return weights


def turned(update: ClientUpdate, walked: Tensor, names: Sequence[str]) -> ClientUpdate:
    """The update without its part along a way (P,), as long as before, and of the weight that all have."""
    move = flat(update.change, names)
    other = same_length(move, without(move, walked[None]))
    return replace(update, change=stepped(update.change, other - move, names, {}), examples=1)


def without(vector: Tensor, rows: Tensor) -> Tensor:
    """The part of a vector (P,) at right angles to all rows (k, P)."""
    between = torch.linalg.pinv(rows @ rows.T, hermitian=True, rtol=1e-10)
    return vector - rows.T @ (between @ (rows @ vector))


def same_length(vector: Tensor, turned: Tensor) -> Tensor:
    """`turned` as long as `vector`; 0 where it has no direction."""
    own = turned.norm()
    return turned * (vector.norm() / own) if float(own) > 0 else turned
