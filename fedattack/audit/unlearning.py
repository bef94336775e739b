"""Unlearning: what a deletion request cost beyond as many random deletions, and whose doing it is.

Damage counts when its 95 % interval lies above 0, and as slight below 5 points of accuracy. "No damage" needs an
upper end below 2 points. A model at chance has no accuracy to lose, so that its damage is undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedattack.audit.family import (
    AuditResult,
    Drawing,
    Family,
    Leakage,
    Level,
    Metric,
    Row,
    at_chance,
    describe,
    extremes,
    further_units,
    gain_level,
    interval_fields,
    score_rows,
)
from fedattack.errors import DataError
from fedattack.metrics import Interval, paired_difference, share_difference
from fedattack.metrics.statistics import FEWEST
from fedattack.reporting import formats

SLIGHT_DAMAGE = 0.05
MARGIN = 0.02
"""Less is no damage."""


def audit_unlearning(
    attack_name: str,
    accuracy: Mapping[str, Sequence[float]],
    *,
    losses: Mapping[str, Sequence[float]] | None = None,
    success: Mapping[str, Sequence[float]] | None = None,
    goal: str = "accuracy lost",
    curve: Mapping[str, Sequence[Sequence[float]]] | None = None,
    costs: Mapping[str, Any] | None = None,
    certificate: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
    requests: int,
    mechanism: str,
    idle: str = "",
    test_samples: int | None = None,
    chance_accuracy: float | None = None,
    seconds: float = 0.0,
    seed: int = 0,
) -> AuditResult:
    """Score a deletion request by the accuracy it costs beyond deleting as many random samples; a record per seed.

    Parameters
    ----------
    accuracy
        Arm -> test accuracies in [0, 1], one per seed: "before" the request, "after" it was carried out, and after
        the deletion of as many "random" samples instead (the floor); "retrained_after" and "retrained_random" where
        samples are forgotten by training again (absent: as `mechanism` does).
    losses
        Arm -> mean test losses.
    success
        Arm -> the share in [0, 1] of what the attack wanted, called `goal`; empty where that is the accuracy.
    curve
        Arm -> per seed the accuracies after each answered request.
    costs, certificate, details
        What forgetting took, beside retraining; what the mechanism promises, and says besides.
    idle
        Why the run says nothing, where it does not.
    test_samples
        Size of the test set: with a single seed the interval then covers the test samples.
    chance_accuracy
        In [0, 1]: the share of the commonest class. A model that cannot be told from it has no accuracy to lose.

    Raises
    ------
    DataError
        If the lengths differ or a figure is no share.
    """
    arms = _columns(attack_name, accuracy)
    wanted = _columns(attack_name, success) if success else {}
    first, changed, floor = arms["before"], arms["after"], arms["random"]
    runs = len(first)
    damage, covers = _harm(floor, changed, test_samples, seed)
    idle = idle or at_chance(float(first.mean()), chance_accuracy, test_samples)
    if wanted:
        reached, covers = _harm(wanted["after"], wanted["random"], test_samples, seed)
        was, now, guess = (float(wanted[arm].mean()) for arm in ("before", "after", "random"))
        level, verdict = success_verdict(goal, was, now, guess, reached, runs, idle)
    else:
        was, now, guess = (float(c.mean()) for c in (first, changed, floor))
        level, verdict = verdict_of(was, now, guess, damage, runs, idle)

    def share(values: NDArray[np.float64], worst: Literal["max", "min"] = "max") -> dict[str, Any]:
        return describe(values.tolist(), seed, worst=worst)

    def parted(columns: Mapping[str, NDArray[np.float64]], sign: float) -> dict[str, dict[str, Any]]:
        exact, exact_floor = columns["retrained_after"], columns["retrained_random"]
        ends = {
            "algorithm": (columns["before"], columns["random"]),
            "request": (exact_floor, exact),
            "together": (columns["random"] - columns["after"], exact_floor - exact),
        }
        found = {name: paired_difference(sign * a, sign * b, seed) for name, (a, b) in ends.items()}
        return {name: interval_fields(one) for name, one in found.items()}

    metrics: dict[str, Any] = {
        "accuracy_before": share(first),
        "accuracy_after": share(changed),
        "damage": interval_fields(damage) | extremes((floor - changed).tolist()),
        **parted(arms, 1.0),
    }
    metrics["damage"]["interval_over"] = covers
    if losses:
        lost = {arm: np.asarray(values, np.float64) for arm, values in losses.items()}
        gained = paired_difference(lost["after"], lost["random"], seed)
        metrics["loss_gained"] = interval_fields(gained) | extremes((lost["after"] - lost["random"]).tolist())
    if wanted:
        metrics["success"] = share(wanted["after"])
        metrics["success_before"] = share(wanted["before"])
        metrics["reached"] = interval_fields(reached)
        metrics |= {f"success_{name}": one for name, one in parted(wanted, -1.0).items()}
    summary = {
        "family": "unlearning",
        "count": requests,
        "seeds": runs,
        "mechanism": mechanism,
        "goal": goal,
        "test_samples": test_samples,
        "metrics": metrics,
        "floors": {
            "random deletion": {"accuracy": share(floor)}
            | ({"success": share(wanted["random"])} if wanted else {})
        },
        "best_floor": "random deletion",
        "curve": {arm: [list(one) for one in values] for arm, values in (curve or {}).items()},
        "costs": dict(costs or {}),
        "certificate": None if certificate is None else dict(certificate),
        "details": dict(details or {}),
        "seconds": float(seconds),
        "level": level,
        "verdict": verdict,
    }
    named = {"attack": attack_name, "family": "unlearning", "mechanism": mechanism, "requests": requests}
    records = [
        named
        | {"run": index, "accuracy_before": float(first[index]), "accuracy_after": float(changed[index])}
        | {
            "floor.random deletion.accuracy": float(floor[index]),
            "damage": float(floor[index] - changed[index]),
        }
        | {
            "retrained.accuracy_after": float(arms["retrained_after"][index]),
            "retrained.random deletion.accuracy": float(arms["retrained_random"][index]),
        }
        | {f"success.{arm}": float(values[index]) for arm, values in wanted.items()}
        for index in range(runs)
    ]
    return AuditResult(attack_name, "unlearning", records, summary, verdict, level)


def _columns(attack_name: str, told: Mapping[str, Sequence[float]]) -> dict[str, NDArray[np.float64]]:
    """Shares by arm, equally many of each; a mechanism without retraining beside it is its own."""
    arms = {arm: np.atleast_1d(np.asarray(values, np.float64)) for arm, values in told.items()}
    sizes = {len(values) for values in arms.values()}
    if len(sizes) != 1 or 0 in sizes or not all(((c >= 0) & (c <= 1)).all() for c in arms.values()):
        raise DataError(
            f"attack {attack_name!r}: accuracies before, after and after random deletion must be equally many "
            "shares in [0, 1]"
        )
    for arm in ("after", "random"):
        arms.setdefault(f"retrained_{arm}", arms[arm])
    return arms


def _harm(
    high: NDArray[np.float64], low: NDArray[np.float64], test_samples: int | None, seed: int
) -> tuple[Interval, str]:
    """The mean of ``high - low`` over seeds, or over the test samples of a single one; and which."""
    if len(high) == 1 and test_samples:
        return share_difference(float(high[0]), float(low[0]), test_samples), "test samples"
    return paired_difference(high, low, seed), "seeds"


def verdict_of(
    before: float, after: float, random: float, damage: Interval, runs: int, idle: str = ""
) -> tuple[Level, str]:
    """Level and sentence; `damage` is ``random - after`` over so many seeds, `idle` why nothing is said."""
    level = gain_level(damage, MARGIN)
    if level == "partial" and damage.mean >= SLIGHT_DAMAGE:
        level = "leak"
    side = "below" if damage.mean >= 0 else "above"
    gap = f"{abs(damage.mean) * 100:.1f} points {side} the deletion of as many random samples"
    text = f"accuracy {formats.percent(before)} before, {formats.percent(after)} after the request, {gap}"
    text += f" ({formats.percent(random)})"
    if damage.known:
        ends = f"{formats.signed(damage.low * 100)} to {formats.signed(damage.high * 100)}"
        text += f"; 95 % interval of the damage {ends} points"
    else:
        text += f"; {runs} seed{'s' if runs != 1 else ''} and no interval"
    if idle:
        return "undecided", f"undecided: {text}; {idle}"
    if level == "undecided":
        more = further_units(damage, MARGIN) if runs > 1 else FEWEST - 1
        least = "about" if runs >= FEWEST else "at least"
        text += f"; {least} {more:,} more seed{'s' if more != 1 else ''} would tell"
    return level, f"{UNLEARNING.words(level)}: {text}"


def success_verdict(
    goal: str, before: float, after: float, random: float, reached: Interval, runs: int, idle: str = ""
) -> tuple[Level, str]:
    """The same of what an attack wanted; `reached` is ``after - random``."""
    level = gain_level(reached, MARGIN)
    if level == "partial" and reached.mean >= SLIGHT_DAMAGE:
        level = "leak"
    text = f"{goal} {formats.percent(before)} before, {formats.percent(after)} after the request, "
    text += f"{formats.percent(random)} after the deletion of as many random samples"
    if reached.known:
        ends = f"{formats.signed(reached.low * 100)} to {formats.signed(reached.high * 100)}"
        text += f"; 95 % interval of the difference {ends} points"
    else:
        text += f"; {runs} seed{'s' if runs != 1 else ''} and no interval"
    if idle:
        return "undecided", f"undecided: {text}; {idle}"
    return level, f"{UNLEARNING.words(level)}: {text}"


def _score_rows(result: AuditResult) -> list[Row]:
    return [
        ("before any request", False, {"accuracy": result.summary["metrics"]["accuracy_before"]}),
        *score_rows(result),
    ]


def _remarks(result: AuditResult) -> list[str]:
    s = result.summary
    parts = [f"{result.attack}: {s['seeds']} seed{'s' if s['seeds'] != 1 else ''}"]
    parts.append(f"{formats.count(s['count'])} samples to forget, mechanism: {s['mechanism']}")
    if s["metrics"]["damage"]["low"] is not None:
        parts.append(f"the damage's interval covers {s['metrics']['damage']['interval_over']}")
    return [*parts, f"time: {formats.seconds(s['seconds'])}"]


def _beside(result: AuditResult) -> list[str]:
    """Whose doing the loss of accuracy is: of the mechanism, of the request, or of both together."""
    told = []
    for name, what in _PARTS.items():
        found = result.summary["metrics"][name]
        ends = formats.interval(found, 1, 100.0)
        told.append(
            f"{what}: {formats.signed(found['mean'] * 100)} points {'' if ends == formats.NONE else ends}"
        )
    if result.summary["mechanism"] == "retrain":
        return [told[1].rstrip()]
    return [one.rstrip() for one in told]


_PARTS = {
    "algorithm": "lost by the mechanism alone, forgetting random samples",
    "request": "lost by the request alone, forgotten by training again",
    "together": "lost only by both together",
}

UNLEARNING: Family = Family(
    name="unlearning",
    question="Can a client harm the model by what it asks to be forgotten?",
    title="Unlearning requests (with 95 % interval)",
    metrics=(
        Metric("accuracy_after", "test accuracy", "%", 100.0, worst="max", floor="accuracy"),
        Metric("damage", "damage", "points", 100.0),
    ),
    floors={"random deletion": "the deletion of as many random samples"},
    headlines={
        "leak": "the request damages the model",
        "partial": "slight damage",
        "none": "no damage beyond random deletion",
    },
    leakage=Leakage(
        "damage",
        "accuracy lost beyond random deletion, points",
        lambda s: s["metrics"]["damage"],
        nothing=0.0,
        span=5.0,
        title="What deletion requests cost beyond random deletion",
        scale=100.0,
    ),
    columns=(
        ("re-\nquests", lambda s: formats.count(s["count"])),
        ("mecha-\nnism", lambda s: str(s["mechanism"])),
        ("before", lambda s: formats.percent(s["metrics"]["accuracy_before"]["mean"])),
        ("after", lambda s: formats.percent(s["metrics"]["accuracy_after"]["mean"])),
        ("random\ndeletion", lambda s: formats.percent(s["floors"]["random deletion"]["accuracy"]["mean"])),
        ("damage,\npoints", lambda s: UNLEARNING.metrics[1].two_lines(s["metrics"])),
        ("time", lambda s: formats.seconds(s["seconds"])),
    ),
    rows=_score_rows,
    remarks=_remarks,
    beside=_beside,
    drawings=(
        Drawing(
            "unlearning",
            "fedattack.reporting.figures:unlearning_bars",
            "Accuracy before and after the deletion request, and after random deletion",
            "Only what the request costs beyond the hatched bar is the attack's doing.",
            each=False,
        ),
    ),
    types={"run": "Int64", "requests": "Int64", "mechanism": "string"},
    glossary="Damage: Accuracy after deleting as many random samples, minus accuracy after the request.",
)
