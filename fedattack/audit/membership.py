"""Membership inference: scores against who really was in the data, beside chance.

"Membership leaks" when the AUC's interval lies above 0.5 and the AUC above what chance scores with so many
candidates, or when so many members stand out at 1 % false positives that chance does it less than once in 200;
"members identified" from an AUC of 0.9. "No leakage" needs the AUC's upper end below 0.55, or below 0.6 with 80 %
power to have seen 0.6, and a model that is better than chance. The rest is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedattack.audit.family import (
    AuditResult,
    Drawing,
    Family,
    Figures,
    Leakage,
    Level,
    Metric,
    at_chance,
    extremes,
    interval_fields,
)
from fedattack.metrics import (
    Interval,
    OperatingPoint,
    auc_interval,
    auc_power,
    auc_reach,
    balanced_accuracy,
    chance_auc,
    chance_balanced_accuracy,
    roc_points,
    tpr_at_fpr,
)
from fedattack.reporting import formats

IDENTIFIED_AUC = 0.9
TAIL_P_VALUE = 0.005
MARGIN_AUC = 0.55
"""An AUC surely below this is no leakage."""
SEEN_AUC, POWER = 0.6, 0.8
"""What candidates must be enough to see, and how surely, before not having seen it means anything."""


@dataclass(frozen=True)
class Scored:
    """What an attack said of one target's candidates, and what they are; arrays of one length n.

    Parameters
    ----------
    client : int
        The target; ``EVERYONE``: members of anybody.
    scores, is_member
        Float64, higher means "more likely a member", and bool.
    samples : ndarray of int64
        Sample ids; targets may share candidates.
    others : ndarray of bool
        Which non-members are members of other clients; the rest was held out.
    labels, groups : ndarray of int64, optional
        Of each sample its label, and whose it is.
    """

    client: int
    scores: NDArray[np.float64]
    is_member: NDArray[np.bool_]
    samples: NDArray[np.int64]
    others: NDArray[np.bool_]
    labels: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None


def audit_membership(
    attack_name: str,
    scored: Sequence[Scored],
    *,
    statistic: str = "",
    seconds: float = 0.0,
    accuracy: float | None = None,
    chance_accuracy: float | None = None,
    test_samples: int | None = None,
    seed: int = 0,
) -> AuditResult:
    """Score membership inference against who really was in the clients' data, one record per candidate and target.

    The floor is chance: AUC 0.5 with the interval of that many members and non-members, and what a random ranking
    finds at the same false-positive rate.

    Parameters
    ----------
    accuracy, chance_accuracy
        In [0, 1]: of the model on `test_samples` held-out samples, and the share of the commonest class there. A
        model that cannot be told from chance says nothing about membership.

    Raises
    ------
    DataError
        If lengths differ, a score is not finite, or a target lacks members or non-members.
    """
    targets = [one.client for one in scored]
    pairs = [(one.scores, one.is_member) for one in scored]
    values, members = [v for v, _ in pairs], [m for _, m in pairs]
    areas = [auc_interval(v, m, seed) for v, m in pairs]
    chances = [chance_auc(int(m.sum()), int((~m).sum())) for m in members]
    points = {share: [tpr_at_fpr(v, m, share) for v, m in pairs] for share in (0.01, 0.001)}
    shares = [balanced_accuracy(v, m) for v, m in pairs]
    share_chance = [chance_balanced_accuracy(v, m, seed) for v, m in pairs]
    area, chance = _average(areas), _average(chances)
    tail = min(points[0.01], key=lambda point: point.p_value)
    candidates = min(int(m.sum()) for m in members), min(int((~m).sum()) for m in members)
    idle = at_chance(accuracy, chance_accuracy, test_samples)
    level, verdict = verdict_of(area, chance, tail, candidates, len(targets), idle)
    summary = {
        "family": "membership",
        "count": sum(len(v) for v in values),
        "targets": len(targets),
        "members": sum(int(m.sum()) for m in members),
        "nonmembers": sum(int((~m).sum()) for m in members),
        "statistic": statistic,
        "accuracy": accuracy,
        "metrics": {
            "auc": {**interval_fields(area), **extremes([a.mean for a in areas])},
            "tpr_at_1_percent_fpr": _point_fields(points[0.01]),
            "tpr_at_0.1_percent_fpr": _point_fields(points[0.001]),
            "balanced_accuracy": extremes(shares)
            | {"mean": float(np.mean(shares)), "low": None, "high": None},
        },
        "floors": {
            "chance": {
                "auc": {**interval_fields(chance), **extremes([0.5])},
                "tpr_at_1_percent_fpr": _chance_fields(points[0.01]),
                "tpr_at_0.1_percent_fpr": _chance_fields(points[0.001]),
                "balanced_accuracy": {
                    "mean": float(np.mean([m for m, _ in share_chance])),
                    "high": float(np.mean([h for _, h in share_chance])),
                },
            }
        },
        "best_floor": "chance",
        "seconds": float(seconds),
        "level": level,
        "verdict": verdict,
    }
    common = {"attack": attack_name, "family": "membership"}
    records = [
        common | {"client": client, "candidate": index, "score": float(score), "is_member": bool(member)}
        for client, (v, m) in zip(targets, pairs, strict=True)
        for index, (score, member) in enumerate(zip(v, m, strict=True))
    ]
    roc = {}
    for client, (v, m) in zip(targets, pairs, strict=True):
        curve = dict(zip(("fpr", "tpr"), roc_points(v, m), strict=True))
        roc[f"client {client}"] = curve | {"members": int(m.sum()), "nonmembers": int((~m).sum())}
    return AuditResult(attack_name, "membership", records, summary, verdict, level, curves={"roc": roc})


def _average(intervals: Sequence[Interval]) -> Interval:
    """Mean of intervals end by end: as wide as if all targets moved together."""
    mean, low, high = (
        float(np.mean([getattr(i, end) for i in intervals])) for end in ("mean", "low", "high")
    )
    return Interval(mean, low, high, sum(i.count for i in intervals))


def _point_fields(points: Sequence[OperatingPoint]) -> dict[str, Any]:
    rates = [point.tpr.mean for point in points]
    counts = ("true_positives", "members", "false_positives", "nonmembers")
    return {
        **interval_fields(_average([point.tpr for point in points])),
        **extremes(rates),
        **{name: sum(getattr(point, name) for point in points) for name in counts},
        "p_value": min(1.0, len(points) * min(point.p_value for point in points)),
    }


def _chance_fields(points: Sequence[OperatingPoint]) -> dict[str, float]:
    return {
        "mean": float(np.mean([point.chance_mean for point in points])),
        "high": float(np.mean([point.chance_high for point in points])),
    }


def verdict_of(
    auc: Interval,
    chance: Interval,
    tail: OperatingPoint,
    candidates: tuple[int, int],
    targets: int = 1,
    idle: str = "",
) -> tuple[Level, str]:
    """Level and sentence; `candidates`: members and non-members of the smallest target, `idle`: no news, and why."""
    ranked = auc.low > 0.5 and auc.mean > chance.high
    stands_out = tail.p_value * targets < TAIL_P_VALUE
    backwards = auc.high < 0.5 and auc.mean < chance.low
    why = ""
    level: Level = "undecided"
    if ranked or stands_out:
        level = "leak" if ranked and auc.mean >= IDENTIFIED_AUC else "partial"
    elif backwards:
        why = "; the scores run backwards: the statistic's sign is to be questioned"
    elif not _unseen(auc.high, candidates):
        more = max(1, _candidates_needed(auc.mean) - min(candidates))
        why = f"; about {more:,} more member{'s' if more != 1 else ''} and as many non-members would tell"
    elif not idle:
        level = "none"
    if level == "undecided" and idle:
        why += f"; {idle}"
    figures = f"AUC {auc.mean:.3f} [{auc.low:.3f}, {auc.high:.3f}]"
    figures += f", chance 0.500 [{chance.low:.3f}, {chance.high:.3f}]"
    found = f"at {formats.rate(tail.max_fpr)} false positives {tail.true_positives} of {tail.members} members found"
    found += f" (chance: {tail.chance_mean * tail.members:.1f})"
    return level, f"{MEMBERSHIP.words(level)}: {figures}{why}; {found}"


def _unseen(high: float, candidates: tuple[int, int]) -> bool:
    """Whether an AUC with this upper end is no leakage."""
    return high < MARGIN_AUC or (high < SEEN_AUC and auc_power(*candidates, SEEN_AUC) >= POWER)


def _candidates_needed(area: float) -> int:
    """Fewest members, with as many non-members, that would tell if the AUC stays as it was observed."""

    def tells(count: int) -> bool:
        low, high = auc_reach(area, count, count)
        return (low > 0.5 and area > chance_auc(count, count).high) or _unseen(high, (count, count))

    low, high = 1, 2
    while not tells(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tells(middle) else (middle, high)
    return high


def _tail_note(point: Figures) -> str:
    if "members" in point:
        return f"{point['true_positives']} of {point['members']}"
    return f"up to {formats.decimal(point['high'] * 100)}"


def _remarks(result: AuditResult) -> list[str]:
    s = result.summary
    targets = f"{s['targets']} target client{'s' if s['targets'] != 1 else ''}"
    parts = [f"{result.attack}: {s['members']} members and {s['nonmembers']} non-members, {targets}"]
    parts += [f"statistic: {s['statistic']}"] if s["statistic"] else []
    tail = s["metrics"]["tpr_at_1_percent_fpr"]
    parts.append(f"chance of finding so many at 1 % false positives: {formats.p_value(tail['p_value'])}")
    if s["nonmembers"] < 1000:
        parts.append("with so few non-members, 0.1 % means no false positive at all")
    return [*parts, f"time: {formats.seconds(s['seconds'])}"]


def _tail_cell(key: str) -> Any:
    def cell(s: Figures) -> str:
        point = s["metrics"][key]
        return f"{formats.percent(point['mean'])}\n({_tail_note(point)})"

    return cell


MEMBERSHIP: Family = Family(
    name="membership",
    question="Can it be told which samples a client trained on?",
    title="Membership inference (with 95 % intervals)",
    metrics=(
        Metric("auc", "AUC", digits=3),
        Metric("tpr_at_1_percent_fpr", "members found at 1 % false positives", "%", 100.0, note=_tail_note),
        Metric("tpr_at_0.1_percent_fpr", "members found at 0.1 %", "%", 100.0, note=_tail_note),
        Metric("balanced_accuracy", "balanced accuracy", "%", 100.0),
    ),
    floors={"chance": "chance"},
    headlines={
        "leak": "members identified",
        "partial": "membership leaks",
        "none": "no leakage beyond chance",
    },
    leakage=Leakage(
        "auc",
        "AUC",
        lambda s: s["metrics"]["auc"],
        nothing=0.5,
        span=0.1,
        title="How well members are told from non-members (chance: 0.5)",
        digits=3,
    ),
    columns=(
        ("asked\nabout", lambda s: formats.count(s["count"])),
        ("AUC", lambda s: MEMBERSHIP.metrics[0].two_lines(s["metrics"])),
        ("chance\nAUC", lambda s: f"0.500\n{formats.span(s['floors']['chance']['auc'], 3)}"),
        ("TPR at\n1 % FPR", _tail_cell("tpr_at_1_percent_fpr")),
        ("chance", lambda s: formats.percent(s["floors"]["chance"]["tpr_at_1_percent_fpr"]["mean"])),
        ("TPR at\n0.1 % FPR", _tail_cell("tpr_at_0.1_percent_fpr")),
        ("time", lambda s: formats.seconds(s["seconds"])),
    ),
    remarks=_remarks,
    drawings=(
        Drawing(
            "roc",
            "fedattack.reporting.figures:roc",
            "ROC curves of the membership attacks, linear and log-log",
            "Bands: exact pointwise 95 % intervals over the members. Fear an attack at the left of the right panel.",
            each=False,
        ),
    ),
    types={"client": "Int64", "candidate": "Int64", "is_member": "boolean"},
    glossary="""
AUC: The chance that a member outscores a non-member.

Found at 1 %: Share of members found while at most 1 % of the non-members are called members: what an attacker who
must not be wrong gets.

Balanced accuracy: With the best threshold for these very candidates, so chance lies above 50 %.
""",
)
