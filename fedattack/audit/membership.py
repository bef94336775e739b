"""Membership inference: scores against who really was in the data, beside chance and floors that need no model.

All targets are pooled, with intervals over clients and, inside, people or samples. "Membership leaks" when the AUC's
interval lies above 0.5 and the AUC above what chance scores with so many candidates, or when so many members stand
out at 1 % false positives that chance does it less than once in 200; "members identified" from an AUC of 0.9. "No
leakage" needs the AUC's upper end below 0.55, or below 0.6 with 80 % power to have seen 0.6, and a model that is
better than chance. The rest is undecided, and so is everything where pixels alone tell members from non-members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedattack.audit import membership_told as told
from fedattack.audit.family import (
    AuditResult,
    Drawing,
    Family,
    Leakage,
    Level,
    Metric,
    at_chance,
    extremes,
    interval_fields,
)
from fedattack.audit.membership_floors import null_control
from fedattack.audit.membership_people import exposure
from fedattack.audit.membership_pool import KINDS, Pool, Scored
from fedattack.audit.selection import together
from fedattack.metrics import (
    Interval,
    OperatingPoint,
    allowed_auc,
    allowed_tpr,
    auc,
    auc_power,
    auc_reach,
    balanced_accuracy,
    chance_auc,
    chance_balanced_accuracy,
    chance_of_hits,
    clopper_pearson,
    hits_at_fpr,
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
FEW_MEMBERS = 20
"""Below so many members chance alone scores an AUC of 0.32 to 0.68 (95 %), and a warning is due."""
_EXPOSED = 8


@dataclass(frozen=True)
class Source:
    """Whose sample is it? Scores of all targets, (T,), for all their members, (M,).

    `scores` is (T, M), `owner`, (M,), one of the `targets`: which client trained on each member.
    """

    targets: NDArray[np.int64]
    scores: NDArray[np.float64]
    owner: NDArray[np.int64]


@dataclass(frozen=True)
class Guarantee:
    """The weakest guarantee that a client of the run has, of its best defence; see ``fedattack.defenses.Privacy``.

    `unit`: "sample", or "client" for all that a client sends.
    """

    epsilon: float
    delta: float
    unit: str
    client: int


def audit_membership(
    attack_name: str,
    scored: Sequence[Scored],
    *,
    statistic: str = "",
    seconds: float = 0.0,
    accuracy: float | None = None,
    chance_accuracy: float | None = None,
    test_samples: int | None = None,
    idle: str = "",
    source: Source | None = None,
    blind: Interval | None = None,
    guarantee: Guarantee | None = None,
    references: int | None = None,
    images: Callable[[NDArray[np.int64]], Tensor] | None = None,
    warnings: Sequence[str] = (),
    seed: int = 0,
) -> AuditResult:
    """Score membership inference against who really was in the clients' data, one record per candidate and target.

    All targets' candidates are pooled as they are scored: what an attacker with one threshold gets. The floors are
    chance (AUC 0.5 with the interval of that many members and non-members, and what a random ranking finds at the
    same false-positive rate), the null control (:func:`~.membership_floors.null_control`) and `blind`.

    Parameters
    ----------
    accuracy, chance_accuracy
        In [0, 1]: of the model on `test_samples` held-out samples, and the share of the commonest class there. A
        model that cannot be told from chance says nothing about membership.
    idle
        Why a model without an accuracy says nothing, where it does not.
    source
        For which client's a sample is; left out, it is not asked.
    blind
        AUC of pixels alone (:func:`~.membership_floors.blind_baseline`). Above 0.5 the verdict is withheld.
    guarantee
        What the run's noise guarantees, to be set beside what was found.
    references
        Reference models that the attack used.
    images
        Sample ids (n,) -> (n, C, H, W) in [0, 1], for the most exposed ones' pictures.
    warnings
        Of the run, told beside those that the candidates call for.

    Raises
    ------
    DataError
        If lengths differ, a score is not finite, or a target lacks members or non-members.
    """
    pool = Pool.of(scored)
    members, nonmembers = int(pool.is_member.sum()), int((~pool.is_member).sum())
    area, chance = pool.auc(), chance_auc(members, nonmembers)
    apart = [auc(one.scores, one.is_member) for one in scored]
    tails = {name: _tail(pool, scored, share) for name, share in TAILS.items()}
    idle = idle or at_chance(accuracy, chance_accuracy, test_samples)
    withheld = ""
    if blind is not None and blind.low > 0.5:
        withheld = f"the candidates differ: pixels alone, without any model, tell members by an AUC of {_told(blind)}"
    tail = tails["tpr_at_1_percent_fpr"]
    right = None if source is None or len(source.targets) < 2 else _right_client(source)
    named = ""
    if right is not None and right["low"] > right["chance"]:
        named = "yet whose a member is can be told: the right client comes first for "
        named += f"{right['right']} of {right['of']}"
    level, verdict = verdict_of(area, chance, tail[0], pool.unit_counts, idle, withheld, named)
    metrics: dict[str, Any] = {
        "auc": {
            **interval_fields(area),
            **extremes(apart),
            "clients_mean": float(np.mean(apart)),
            "clients_sd": float(np.std(apart, ddof=1)) if len(apart) > 1 else None,
        },
        **{name: _point_fields(*found) for name, found in tails.items()},
        "balanced_accuracy": {
            **extremes([balanced_accuracy(one.scores, one.is_member) for one in scored]),
            "mean": balanced_accuracy(pool.scores, pool.is_member),
            "low": None,
            "high": None,
        },
    }
    mean, high = chance_balanced_accuracy(pool.scores, pool.is_member, seed)
    floors: dict[str, Any] = {
        "chance": {
            "auc": {**interval_fields(chance), **extremes([0.5])},
            **{n: {"mean": p.chance_mean, "high": p.chance_high} for n, (p, _) in tails.items()},
            "balanced_accuracy": {"mean": mean, "high": high},
        }
    }
    for name, control in null_control(pool, seed).items():
        floors[f"null control, {name}"] = {"auc": interval_fields(control)}
    if blind is not None:
        floors["pixels alone"] = {"auc": interval_fields(blind) | {"confidence": blind.confidence}}
    if right is not None:
        metrics["right_client"] = right
        floors["chance"]["right_client"] = {"mean": right["chance"]}
    if pool.others.any() and not (pool.others | pool.is_member).all():
        for name, kept in (("auc_held_out", ~pool.others), ("auc_others", pool.others)):
            metrics[name] = interval_fields(pool.where(kept | pool.is_member).auc())
    warned = [*warnings, *_warnings(scored, nonmembers, floors)]
    allowed = None if guarantee is None else _allowed(guarantee)
    if allowed is not None and (area.low or 0.0) > allowed["auc"]:
        warned.append(
            "the AUC lies above what the accounted epsilon allows: the accounting does not hold for this run"
        )
    summary = {
        "family": "membership",
        "count": len(pool.scores),
        "targets": len(scored),
        "members": members,
        "nonmembers": nonmembers,
        "statistic": statistic,
        "references": references,
        "accuracy": accuracy,
        "metrics": metrics,
        "floors": floors,
        "best_floor": "chance",
        "allowed": allowed,
        "warnings": warned,
        "exposed": _exposed(pool, pool.is_member),
        "people": exposure(pool),
        "seconds": float(seconds),
        "level": level,
        "verdict": verdict,
    }
    rounds = {one.client: _ranges(one.rounds) for one in scored}
    curves: dict[str, Any] = {"people": summary["people"], "roc": _roc(pool, members, nonmembers)}
    if images is not None:
        curves["exposed"] = _pictures(pool, images)
    records = _records(attack_name, pool, rounds)
    return AuditResult(attack_name, "membership", records, summary, verdict, level, curves=curves)


TAILS = {"tpr_at_1_percent_fpr": 0.01, "tpr_at_0.1_percent_fpr": 0.001}
"""Where the ROC curve is read -> false-positive rate."""


def _records(attack: str, pool: Pool, rounds: Mapping[int, str]) -> list[dict[str, Any]]:
    """A row for each candidate of each target."""
    kinds = np.where(pool.is_member, KINDS[0], np.where(pool.others, KINDS[1], KINDS[2])).tolist()
    columns: dict[str, list[Any]] = {
        "client": pool.clients.tolist(),
        "sample": pool.samples.tolist(),
        **({} if pool.labels is None else {"label": pool.labels.tolist()}),
        **({} if pool.groups is None else {"group": pool.groups.tolist()}),
        "rounds": [rounds[client] for client in pool.clients.tolist()],
        "score": pool.scores.tolist(),
        "is_member": pool.is_member.tolist(),
        "kind": kinds,
    }
    named = {"attack": attack, "family": "membership"}
    return [named | dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _ranges(numbers: Sequence[int]) -> str:
    """``1-4 6`` of 1, 2, 3, 4, 6."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return " ".join("-".join(map(str, part)) for part in parts)


def _roc(pool: Pool, members: int, nonmembers: int) -> dict[str, Any]:
    """The pooled curve."""
    fpr, tpr = roc_points(pool.scores, pool.is_member)
    return {"fpr": fpr, "tpr": tpr, "members": members, "nonmembers": nonmembers}


def _tail(pool: Pool, scored: Sequence[Scored], share: float) -> tuple[OperatingPoint, list[float]]:
    """The pooled point, and each target's rate.

    Where targets share non-members, one that scores high does so for all of them, and the pooled p-value would take
    it for many: then it is the smallest of the targets' own, times their number.
    """
    point = tpr_at_fpr(pool.scores, pool.is_member, share)
    counts = [(int(one.is_member.sum()), int((~one.is_member).sum())) for one in scored]
    hits = [hits_at_fpr(one.scores, one.is_member, share)[0] for one in scored]
    if len(np.unique(pool.samples[~pool.is_member])) < point.nonmembers:
        least = min(chance_of_hits(found, *of, share) for found, of in zip(hits, counts, strict=True))
        point = replace(point, p_value=min(1.0, len(scored) * least))
    return point, [found / of for found, (of, _) in zip(hits, counts, strict=True)]


def _point_fields(point: OperatingPoint, own: Sequence[float]) -> dict[str, Any]:
    counts = ("true_positives", "members", "false_positives", "nonmembers", "p_value")
    return {
        **interval_fields(point.tpr),
        **extremes(own),
        **{name: getattr(point, name) for name in counts},
    }


def _right_client(source: Source) -> dict[str, Any]:
    """For how many members their own client scores higher than every other target; exact interval."""
    own = source.targets[:, None] == source.owner
    right = source.scores[own.argmax(0), np.arange(len(source.owner))]
    first = right > np.where(own, -np.inf, source.scores).max(0)
    shares = [float(first[source.owner == client].mean()) for client in np.unique(source.owner)]
    right, of = int(first.sum()), len(first)
    found = {**interval_fields(clopper_pearson(right, of)), **extremes(shares)}
    return found | {"right": right, "of": of, "chance": 1 / len(source.targets)}


def _exposed(pool: Pool, side: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """The highest scores of one kind, each sample once."""
    found: dict[int, dict[str, Any]] = {}
    optional = {"label": pool.labels, "group": pool.groups}
    order = np.argsort(-pool.scores, kind="stable")
    for place in order[side[order]]:
        row = {"sample": int(pool.samples[place]), "client": int(pool.clients[place])}
        row |= {name: int(column[place]) for name, column in optional.items() if column is not None}
        found.setdefault(row["sample"], row | {"score": float(pool.scores[place])})
        if len(found) == _EXPOSED:
            break
    return list(found.values())


def _pictures(pool: Pool, images: Callable[[NDArray[np.int64]], Tensor]) -> dict[str, Any]:
    """The most exposed members, and the non-members that look most like some: rows, images (n, C, H, W)."""
    shown = {}
    for name, side in (("members", pool.is_member), ("non-members", ~pool.is_member)):
        rows = _exposed(pool, side)
        shown[name] = {"rows": rows, "images": images(np.array([row["sample"] for row in rows]))}
    return shown


def _warnings(scored: Sequence[Scored], nonmembers: int, floors: Mapping[str, Any]) -> list[str]:
    """What the candidates call for."""
    found = []
    fewest = min(int(one.is_member.sum()) for one in scored)
    if fewest < FEW_MEMBERS:
        whose = f" of {formats.seat(scored[0].client)}" if len(scored) == 1 else " of the smallest target"
        found.append(
            f"only {fewest} member{'s' if fewest != 1 else ''}{whose} to ask about: chance spreads widely"
        )
    if nonmembers < 1000:
        rates = "0.1 %" if nonmembers >= 100 else "1 %, and 0.1 %,"
        found.append(f"with {nonmembers} non-members, {rates} means no false positive at all")
    if "pixels alone" not in floors:
        found.append("whether pixels alone tell members was not tested")
    for name in ("members", "non-members"):
        control = floors.get(f"null control, {name}", {}).get("auc")
        if control and not control["low"] <= 0.5 <= control["high"]:
            found.append(f"the null control of the {name} misses 0.5, as one in 20 does: mind the intervals")
    return found


def _allowed(guarantee: Guarantee) -> dict[str, Any]:
    """What the guarantee lets any attacker reach who asks about a sample.

    A client's contribution that is like none at all, for every sample in it, is like that without the sample at twice
    the epsilon (group privacy).
    """
    epsilon, delta = guarantee.epsilon, guarantee.delta
    if guarantee.unit == "client":
        delta = min(1.0, delta * (1 + float(np.exp(min(epsilon, 700.0)))))
        epsilon *= 2
    return {
        **{name: getattr(guarantee, name) for name in ("epsilon", "delta", "unit", "client")},
        "auc": allowed_auc(epsilon, delta),
        "tpr_at_1_percent_fpr": allowed_tpr(0.01, epsilon, delta),
    }


def _told(area: Interval) -> str:
    return f"{area.mean:.3f} [{area.low:.3f}, {area.high:.3f}]"


def verdict_of(
    auc: Interval,
    chance: Interval,
    tail: OperatingPoint,
    candidates: tuple[int, int],
    idle: str = "",
    withheld: str = "",
    named: str = "",
) -> tuple[Level, str]:
    """Level and sentence; `candidates`: distinct members and non-members, `idle`: no news, and why.

    `withheld`: why the scores are no evidence of membership; `named`: why they are none of safety.
    """
    ranked = auc.low > 0.5 and auc.mean > chance.high
    stands_out = tail.p_value < TAIL_P_VALUE
    backwards = auc.high < 0.5 and auc.mean < chance.low
    why = ""
    level: Level = "undecided"
    if withheld:
        why = f"; {withheld}"
    elif ranked or stands_out:
        level = "leak" if ranked and auc.mean >= IDENTIFIED_AUC else "partial"
    elif backwards:
        why = "; the scores run backwards: the statistic's sign is to be questioned"
    elif not _unseen(auc.high, candidates):
        more = max(1, _candidates_needed(auc.mean) - min(candidates))
        why = f"; about {more:,} more member{'s' if more != 1 else ''} and as many non-members would tell"
    elif named:
        why = f"; {named}"
    elif not idle:
        level = "none"
    if level == "undecided" and idle:
        why += f"; {idle}"
    figures = f"AUC {_told(auc)}"
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


MEMBERSHIP: Family = Family(
    name="membership",
    question="Can it be told which samples a client trained on?",
    title="Membership inference (with 95 % intervals)",
    metrics=(
        Metric("auc", "AUC", digits=3),
        Metric("tpr_at_1_percent_fpr", "TPR at 1 % FPR", "%", 100.0, note=told.tail_note),
        Metric("tpr_at_0.1_percent_fpr", "TPR at 0.1 % FPR", "%", 100.0, note=told.tail_note),
        Metric("balanced_accuracy", "balanced accuracy", "%", 100.0),
        Metric("right_client", "right client first", "%", 100.0, note=told.share_note),
    ),
    floors={"chance": "chance; for membership also what pixels alone tell, and halves without a difference"},
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
        ("AUC", lambda s: MEMBERSHIP.metrics[0].two_lines(s["metrics"])),
        ("chance\nAUC", lambda s: f"0.500\n{formats.span(s['floors']['chance']['auc'], 3)}"),
        ("pixels\nalone", told.pixels_cell),
        ("TPR at\n1 % FPR", told.tail_cell("tpr_at_1_percent_fpr")),
        ("TPR at\n0.1 % FPR", told.tail_cell("tpr_at_0.1_percent_fpr")),
    ),
    remarks=told.remarks,
    beside=told.beside,
    together=together,
    paired="fedattack.audit.paired:of_scores",
    drawings=(
        Drawing(
            "roc",
            "fedattack.reporting.figures:roc",
            "ROC curves of the membership attacks, linear and log-log",
            "Bands: exact pointwise 95 % intervals over the members. Fear an attack at the left of the right panel.",
            each=False,
        ),
        Drawing(
            "exposed",
            "fedattack.reporting.figures:exposed",
            "the members with the highest scores beside the best-scoring non-members",
            "The members that an attack is surest of, and below them the non-members it would accuse first; "
            "of the three attacks with the highest AUC.",
            each=False,
        ),
        Drawing(
            "people",
            "fedattack.reporting.figures:exposed_people",
            "whose samples are called members, person by person",
            "The most exposed people by the attack with the highest AUC, at 10 % false positives, beside those whom "
            "nobody trained on: what looks like a member may be a hand or a face, whoever trained on it.",
            each=False,
        ),
        Drawing(
            "samples",
            "fedattack.reporting.figures:samples",
            "Synthetic images, in the order of their file",
            "What was released; none was chosen.",
            each=False,
        ),
        Drawing(
            "nearest",
            "fedattack.reporting.figures:nearest",
            "the candidates with the highest scores and the synthetic images nearest to them",
            "What an attack on synthetic images is surest of, and the image that is most like it, with their "
            "Euclidean distance (pixels from 0 to 1). Non-members below: how near is near by chance. Distances alone "
            "prove nothing, in either direction: images that are far apart can still tell who was trained on.",
            each=False,
        ),
    ),
    types={
        "client": "Int64",
        "sample": "Int64",
        "label": "Int64",
        "group": "Int64",
        "rounds": "string",
        "is_member": "boolean",
        "kind": "string",
    },
    glossary="""
AUC: The chance that a member outscores a non-member.

TPR at 1 % FPR: Share of members found while at most 1 % of the non-members are called members: what an attacker who
must not be wrong gets.

Worst, best: Of the clients that were asked about, each alone; the AUC beside them is that of all with one threshold.

Right client first: For how many members their own client scores higher than every other one.

Null control: Members against members and non-members against non-members, in random halves: their intervals hold 0.5
in 95 of 100 runs.

Pixels alone: A classifier that sees the candidates' pixels and no model. Above 0.5 the candidates differ, and no
score is evidence of membership.

Best of several attacks: Chosen on one half of the candidates, scored on the other; the largest figure would flatter.

Balanced accuracy: With the best threshold for these very candidates, so chance lies above 50 %.
""",
)
