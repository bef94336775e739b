"""FedMIA: membership from intercepted updates, with the other clients as shadows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adversaries.membership.base import Figures, RoundStatistic, rows_of, unanswered
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.view import RoundView
from adversaries.needs import Needs
from fedattack.errors import NotApplicable
from fedattack.observation import MembershipScores

MIN_SHADOWS = 2
"""Other clients that must have answered in a round: a spread needs two."""


@dataclass
class FedMIA(RoundStatistic):
    """FedMIA (Zhu et al., CVPR 2025): one-tailed test of the target's update against all other clients'.

    In each round ``t`` every client ``k`` gives a statistic ``s_k(x)`` that grows with membership. The other
    clients, most of which never saw ``x``, tell how it is distributed for non-members; the score is

        mean over t of  Phi( (s_target - mean_k s_k) / sqrt(var_k s_k + 1e-8) ),   k over the others,

    with the population variance (divisor: number of shadows), as in the authors' code. Every round asks about
    the same candidates. Gradients are taken in eval mode: BatchNorm has no per-sample gradient on batch
    statistics. Rounds in which the target, or fewer than two others, did not answer are passed over.

    Parameters
    ----------
    statistic : {"cosine", "loss"}
        ``cosine`` (FedMIA-II): cosine between the gradient ``g_x`` at the weights sent out and the client's
        update, a weight delta with its sign turned, so that members point along it. A sparse update counts as
        zero where nothing was sent: inner product over the sent entries, divided by the norm of the *whole*
        gradient ``g_x`` and the norm of what was sent. An all-zero update or gradient has cosine 0.

        ``loss`` (FedMIA-I): minus the cross-entropy of ``x`` under the client's own model, i.e. the weights sent
        out plus the delta under "fedavg", and minus the server's step times the gradient under "fedsgd"
        (`server_learning_rate`, else `learning_rate`); unsent entries stay as sent out, and BatchNorm statistics
        are the client's where it sent them.
    drop_members : bool
        For clients that share samples or classes (non-IID data): per round and candidate, leave out the shadows
        above mean + 3 standard deviations, which may be members themselves, and take mean and variance again.
        Among n values none can lie further than sqrt(n - 1) deviations out, so this acts from 11 shadows on.
    """

    statistic: Literal["cosine", "loss"] = "cosine"
    drop_members: bool = False

    needs: ClassVar[Needs] = Needs(sums="single", held_out=True, clients=MIN_SHADOWS + 1)

    def watch(self, view: RoundView, seed: int) -> Figures:
        """``clients``, int64 (K,), and ``statistic``, float64 (K, N); without rows where the round is passed over."""
        if len(view.candidates.images) == 0:
            raise NotApplicable("fedmia: no candidate to ask about")
        if len(view.clients) > MIN_SHADOWS:
            return super().watch(view, seed)
        empty = torch.empty(0, len(view.candidates.images), dtype=torch.float64)
        return {"clients": torch.tensor(view.clients), "statistic": empty}

    def measure(self, view: RoundView) -> Tensor:
        """Cosines, or minus the losses under the clients' own models."""
        return view.cosines if self.statistic == "cosine" else -view.client_losses

    def scores(self, rounds: Mapping[int, Figures], target: int, knowledge: Knowledge) -> MembershipScores:
        """The candidates' scores in [0, 1].

        `details`: rounds used and passed over, shadows per round, `saturated` (share of per-round values that
        are exactly 0 or 1, hence cannot be ranked), `dropped` (share of shadow values left out).
        NotApplicable if no round was answered by the target and two other clients.
        """
        used = {number: rounds[number] for number in rows_of(rounds, target)}
        if not used:
            together = [len(f["clients"]) for f in rounds.values() if target in f["clients"].tolist()]
            if not together:
                raise unanswered("fedmia", target, len(rounds))
            raise NotApplicable(
                f"fedmia: at most {max(together)} clients answered in a round together with the target; "
                f"at least {MIN_SHADOWS + 1} are needed (raise federation.clients or federation.participation)"
            )
        per_round, shadows, dropped = [], [], []
        for figures in used.values():
            s, own = figures["statistic"], figures["clients"].tolist().index(target)
            others = torch.cat([s[:own], s[own + 1 :]])
            keep = _not_outlying(others) if self.drop_members else torch.ones_like(others, dtype=torch.bool)
            per_round.append(one_tailed(s[own], others, keep))
            shadows.append(len(others))
            dropped.append(1 - float(keep.double().mean()))
        values = torch.stack(per_round)
        return MembershipScores(
            values.mean(0),
            f"fedmia-{'ii' if self.statistic == 'cosine' else 'i'} ({self.statistic})",
            {
                "rounds": sorted(used),
                "rounds_passed_over": sorted(set(rounds) - set(used)),
                "shadows": shadows,
                "saturated": float(((values == 0) | (values == 1)).double().mean()),
                "dropped": sum(dropped) / len(dropped),
            },
        )


def one_tailed(own: Tensor, others: Tensor, keep: Tensor) -> Tensor:
    """Probability that a non-member's statistic is below `own` (N,) under a normal fitted to `others` (K, N).

    `keep`, bool (K, N), says which of the others count.
    """
    count = keep.sum(0)
    mean = (others * keep).sum(0) / count
    variance = ((others - mean).square() * keep).sum(0) / count
    return torch.special.ndtr((own - mean) / (variance + 1e-8).sqrt())


def _not_outlying(others: Tensor) -> Tensor:
    """Which shadows are not above mean + 3 standard deviations of their candidate, bool (K, N)."""
    apart = others - others.mean(0)
    # By the same mean on both sides, so that of equal ones none is out, however it is rounded.
    return apart <= 3 * apart.square().mean(0).sqrt()
