"""FedMIA: membership from intercepted updates, with the other clients as shadows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from adversaries.membership.base import Figures, MembershipAttack
from adversaries.membership.per_sample import gradient_products
from adversaries.needs import Needs
from adversaries.seats import CuriousServer
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Candidates, MembershipScores, Observation
from fedattack.training import sample_losses

MIN_SHADOWS = 2
"""Other clients that must have answered in a round: a spread needs two."""


@dataclass
class FedMIA(CuriousServer, MembershipAttack):
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

    def watch(
        self,
        observations: Sequence[Observation],
        target: int,
        candidates: Candidates,
        seed: int,
        device: torch.device,
    ) -> Figures:
        """``clients``, int64 (K,), and ``statistic``, float64 (K, N); without rows where the round is passed over."""
        if len(candidates.images) == 0:
            raise NotApplicable("fedmia: no candidate to ask about")
        observations = list({one.client: one for one in observations}.values())
        clients = [observation.client for observation in observations]
        s = torch.empty(0, len(candidates.images), dtype=torch.float64)
        if target in clients and len(clients) > MIN_SHADOWS:
            model = build_model(observations[0].scenario.model).to(device).eval()
            s = statistics(self.statistic, model, observations, candidates)
        return {"clients": torch.tensor(clients), "statistic": s}

    def scores(self, rounds: Mapping[int, Figures], target: int) -> MembershipScores:
        """The candidates' scores in [0, 1].

        `details`: rounds used and passed over, shadows per round, `saturated` (share of per-round values that
        are exactly 0 or 1, hence cannot be ranked), `dropped` (share of shadow values left out).
        NotApplicable if no round was answered by the target and two other clients.
        """
        used = {number: figures for number, figures in rounds.items() if len(figures["statistic"])}
        if not used:
            together = [len(f["clients"]) for f in rounds.values() if target in f["clients"].tolist()]
            if not together:
                raise NotApplicable(
                    f"fedmia: client {target}, the target, answered in none of {len(rounds)} observed rounds"
                )
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


def statistics(
    statistic: Literal["cosine", "loss"],
    model: nn.Module,
    answers: Sequence[Observation],
    candidates: Candidates,
) -> Tensor:
    """``s_k(x)`` of one round, float64 (K, N): a row per observation, a column per candidate."""
    images, labels = candidates.images, candidates.labels
    if statistic == "loss":
        return torch.stack([-sample_losses(model, client_model(o), images, labels) for o in answers])
    result = torch.empty(len(answers), len(images), dtype=torch.float64)
    for group in _same_weights(answers):
        updates = [answers[k].update for k in group]
        products, norms = gradient_products(model, answers[group[0]].weights, images, labels, updates)
        for row, k in enumerate(group):
            length = norms * updates[row].values.double().norm().cpu()
            sign = 1.0 if updates[row].kind == "gradient" else -1.0
            result[k] = sign * products[row] / length.clamp_min(1e-300)
    return result


def client_model(observation: Observation) -> dict[str, Tensor]:
    """The client's own model after the round, as far as the server can tell: name -> tensor."""
    training = observation.scenario.training
    step = 1.0
    if observation.update.kind == "gradient":
        step = -(training.server_learning_rate or training.learning_rate)
    moved = {
        name: observation.weights[name] + step * change.to(observation.weights[name].device)
        for name, change in observation.update.dense().items()
    }
    return {**observation.weights, **observation.buffers, **moved}


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


def _same_weights(answers: Sequence[Observation]) -> list[list[int]]:
    """Positions grouped by the weights sent out: one group unless the server sent clients different ones."""
    groups: list[list[int]] = []
    for k, observation in enumerate(answers):
        for group in groups:
            first = answers[group[0]].weights
            if first is observation.weights or all(
                torch.equal(first[name], tensor) for name, tensor in observation.weights.items()
            ):
                group.append(k)
                break
        else:
            groups.append([k])
    return groups
