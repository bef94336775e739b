"""Unlearning: what a deletion request cost beyond as many random deletions, and whose doing it is.

Damage counts when its 95 % interval lies above 0, and as slight below 5 points of accuracy. "No damage" needs an
upper end below 2 points. A model at chance has no accuracy to lose, so that its damage is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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
    before: Sequence[float] | float,
    after: Sequence[float] | float,
    random: Sequence[float] | float,
    *,
    retrained: tuple[Sequence[float], Sequence[float]] | None = None,
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
    before, after, random
        Test accuracies in [0, 1], one per seed: before the request, after it was carried out, and after the
        deletion of as many random samples instead (the floor).
    retrained
        The latter two where samples are forgotten by training again; None: as `mechanism` does.
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
    again = retrained or (after, random)
    columns = [np.atleast_1d(np.asarray(c, dtype=np.float64)) for c in (before, after, random, *again)]
    sizes = {len(c) for c in columns}
    if len(sizes) != 1 or 0 in sizes or not all(((c >= 0) & (c <= 1)).all() for c in columns):
        raise DataError(
            f"attack {attack_name!r}: accuracies before, after and after random deletion must be equally many "
            "shares in [0, 1]"
        )
    first, changed, floor, exact, exact_floor = columns
    runs = len(first)
    if runs == 1 and test_samples:
        damage = share_difference(float(floor[0]), float(changed[0]), test_samples)
        covers = "test samples"
    else:
        damage = paired_difference(floor, changed, seed)
        covers = "seeds"
    idle = idle or at_chance(float(first.mean()), chance_accuracy, test_samples)
    parts = {
        "algorithm": (first, floor),
        "request": (exact_floor, exact),
        "together": (floor - changed, exact_floor - exact),
    }
    was, now, guess = (float(c.mean()) for c in columns[:3])
    level, verdict = verdict_of(was, now, guess, damage, runs, idle)

    def accuracy(values: np.ndarray) -> dict[str, Any]:
        return describe(values.tolist(), seed, worst="max")

    summary = {
        "family": "unlearning",
        "count": requests,
        "seeds": runs,
        "mechanism": mechanism,
        "test_samples": test_samples,
        "metrics": {
            "accuracy_before": accuracy(first),
            "accuracy_after": accuracy(changed),
            "damage": interval_fields(damage)
            | extremes((floor - changed).tolist())
            | {"interval_over": covers},
            **{name: interval_fields(paired_difference(*both, seed)) for name, both in parts.items()},
        },
        "floors": {"random deletion": {"accuracy": accuracy(floor)}},
        "best_floor": "random deletion",
        "seconds": float(seconds),
        "level": level,
        "verdict": verdict,
    }
    records = [
        {
            "attack": attack_name,
            "family": "unlearning",
            "run": index,
            "mechanism": mechanism,
            "requests": requests,
        }
        | {"accuracy_before": float(b), "accuracy_after": float(a)}
        | {"floor.random deletion.accuracy": float(r), "damage": float(r - a)}
        | {"retrained.accuracy_after": float(e), "retrained.random deletion.accuracy": float(f)}
        for index, (b, a, r, e, f) in enumerate(zip(*columns, strict=True))
    ]
    return AuditResult(attack_name, "unlearning", records, summary, verdict, level)


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
