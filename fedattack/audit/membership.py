"""The auditor of membership inference: scores against who really was in the data, beside chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fedattack.audit import membership_verdict
from fedattack.audit.family import AuditResult, _ends, interval_fields
from fedattack.errors import DataError
from fedattack.metrics import (
    Interval,
    OperatingPoint,
    auc_interval,
    balanced_accuracy,
    chance_auc,
    chance_balanced_accuracy,
    roc_points,
    tpr_at_fpr,
)
from fedattack.observation import MembershipScores


def audit_membership(
    attack_name: str,
    scores: MembershipScores | Tensor | Sequence[MembershipScores | Tensor],
    is_member: ArrayLike | Sequence[ArrayLike],
    *,
    clients: Sequence[int] | None = None,
    seconds: float = 0.0,
    seed: int = 0,
) -> AuditResult:
    """Score membership inference against who really was in the clients' data.

    The floor is chance: AUC 0.5 with the interval of that many members and non-members, and what a random ranking
    finds at the same false-positive rate.

    Parameters
    ----------
    attack_name : str
        Its name in this run.
    scores : MembershipScores or Tensor, or one per target client
        Shape (N,); higher means "more likely a member".
    is_member : array-like of bool, or one per target client
        Shape (N,).
    clients : sequence of int, optional
        The target clients; numbered from 0 where absent.
    seconds : float
        Time in all.
    seed : int
        Seeds the bootstrap.

    Returns
    -------
    AuditResult
        One record per candidate and target. With several targets the AUC is their mean; as the candidates may be
        shared, neither its interval nor its floor is narrowed for their number.

    Raises
    ------
    DataError
        If lengths differ, a score is not finite, or a target lacks members or non-members.
    """
    several = not isinstance(scores, MembershipScores | Tensor)
    score_list: list[Any] = list(scores) if several else [scores]  # type: ignore[arg-type]
    member_list: list[Any] = list(is_member) if several else [is_member]  # type: ignore[arg-type]
    targets = list(range(len(score_list))) if clients is None else list(clients)
    if not len(score_list) == len(member_list) == len(targets) or not score_list:
        raise DataError(
            f"attack {attack_name!r}: {len(score_list)} lists of scores, {len(member_list)} of memberships and "
            f"{len(targets)} target clients; one of each per target is needed"
        )
    statistic = next((s.statistic for s in score_list if isinstance(s, MembershipScores)), "")
    values = [_array(s.scores if isinstance(s, MembershipScores) else s) for s in score_list]
    members = [_array(m) for m in member_list]
    pairs = list(zip(values, members, strict=True))
    areas = [auc_interval(v, m, seed) for v, m in pairs]
    chances = [chance_auc(int(m.sum()), int((~m).sum())) for m in members]
    points = {share: [tpr_at_fpr(v, m, share) for v, m in pairs] for share in (0.01, 0.001)}
    accuracy = [balanced_accuracy(v, m) for v, m in pairs]
    accuracy_chance = [chance_balanced_accuracy(v, m, seed) for v, m in pairs]
    area, chance = _average(areas), _average(chances)
    tail = min(points[0.01], key=lambda point: point.p_value)
    level, verdict = membership_verdict.membership(area, chance, tail, len(targets))
    summary = {
        "family": "membership",
        "count": sum(len(v) for v in values),
        "targets": len(targets),
        "members": sum(int(m.sum()) for m in members),
        "nonmembers": sum(int((~m).sum()) for m in members),
        "statistic": statistic,
        "metrics": {
            "auc": {**interval_fields(area), **_ends([a.mean for a in areas])},
            "tpr_at_1_percent_fpr": _point_fields(points[0.01]),
            "tpr_at_0.1_percent_fpr": _point_fields(points[0.001]),
            "balanced_accuracy": {
                "mean": float(np.mean(accuracy)),
                **_ends(accuracy),
                "low": None,
                "high": None,
            },
        },
        "floors": {
            "chance": {
                "auc": {**interval_fields(chance), **_ends([0.5])},
                "tpr_at_1_percent_fpr": _chance_fields(points[0.01]),
                "tpr_at_0.1_percent_fpr": _chance_fields(points[0.001]),
                "balanced_accuracy": {
                    "mean": float(np.mean([m for m, _ in accuracy_chance])),
                    "high": float(np.mean([h for _, h in accuracy_chance])),
                },
            }
        },
        "best_floor": "chance",
        "seconds": float(seconds),
        "level": level,
        "verdict": verdict,
    }
    records = [
        {
            "attack": attack_name,
            "family": "membership",
            "client": client,
            "candidate": index,
            "score": float(score),
            "is_member": bool(member),
        }
        for client, (v, m) in zip(targets, pairs, strict=True)
        for index, (score, member) in enumerate(zip(v, m, strict=True))
    ]
    roc = {}
    for client, (v, m) in zip(targets, pairs, strict=True):
        fpr, tpr = roc_points(v, m)
        roc[f"client {client}"] = {
            "fpr": fpr,
            "tpr": tpr,
            "members": int(m.sum()),
            "nonmembers": int((~m).sum()),
        }
    return AuditResult(attack_name, "membership", records, summary, verdict, level, curves={"roc": roc})


def _array(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _average(intervals: Sequence[Interval]) -> Interval:
    """Mean of intervals end by end: as wide as if all targets moved together."""
    mean, low, high = (
        float(np.mean([getattr(i, end) for i in intervals])) for end in ("mean", "low", "high")
    )
    return Interval(mean, low, high, sum(i.count for i in intervals))


def _point_fields(points: Sequence[OperatingPoint]) -> dict[str, Any]:
    rates = [point.tpr.mean for point in points]
    return {
        **interval_fields(_average([point.tpr for point in points])),
        **_ends(rates),
        "true_positives": sum(point.true_positives for point in points),
        "members": sum(point.members for point in points),
        "false_positives": sum(point.false_positives for point in points),
        "nonmembers": sum(point.nonmembers for point in points),
        "p_value": min(1.0, len(points) * min(point.p_value for point in points)),
    }


def _chance_fields(points: Sequence[OperatingPoint]) -> dict[str, float]:
    return {
        "mean": float(np.mean([point.chance_mean for point in points])),
        "high": float(np.mean([point.chance_high for point in points])),
    }


__all__ = ["audit_membership"]
