"""Unlearning: what a deletion request cost beyond as many random deletions, and whose doing it is.

Damage counts when its 95 % interval, over seeds and over test samples, lies above 0, and as slight below 5 points of
accuracy. "No damage" needs an upper end below 2 points. A model at chance has no accuracy to lose, and one
training does not tell how others would do: their damage is undecided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

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
from fedattack.metrics.statistics import FEWEST, student_mean
from fedattack.reporting import formats

SLIGHT_DAMAGE = 0.05
MARGIN = 0.02
"""Less is no damage."""


def audit_unlearning(
    attack_name: str,
    accuracy: Mapping[str, Sequence[float]],
    *,
    losses: Mapping[str, Sequence[float]] | None = None,
    right_lost: Sequence[float] = (),
    success: Mapping[str, Sequence[float]] | None = None,
    goal: str = "accuracy lost",
    curve: Mapping[str, Sequence[Sequence[Mapping[str, float]]]] | None = None,
    clean: Mapping[str, Sequence[float]] | None = None,
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
    """Score deletion requests by what they cost beyond deleting as many random samples; a record per request and arm.

    Parameters
    ----------
    accuracy
        Arm -> test accuracies in [0, 1], one per seed: "before" the request, "after" it was carried out, and after
        the deletion of as many "random" samples instead (the floor); "retrained_after" and "retrained_random" where
        samples are forgotten by training again (absent: as `mechanism` does).
    losses
        Arm -> mean test losses.
    right_lost
        Of each test sample the share of seeds in which it is right after random deletion less that after the request.
    success
        Arm -> the share in [0, 1] of what the attack wanted, called `goal`; empty where that is the accuracy.
    curve
        Arm -> per seed the "accuracy" and "loss" after each answered request.
    clean
        "before" and "random" accuracies where nobody planted anything, of an attack that plants.
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
    if runs > 1 and len(right_lost) >= FEWEST:
        # A few seeds may lose the same few test samples: the wider of both intervals, at either end.
        over_samples = student_mean(right_lost)
        if over_samples.known and damage.known:
            low, high = min(damage.low, over_samples.low), max(damage.high, over_samples.high)
            damage, covers = dataclasses.replace(damage, low=low, high=high), "seeds and test samples"
    idle = idle or at_chance(float(first.mean()), chance_accuracy, test_samples)
    if runs == 1:
        idle = idle or "one training does not tell how others would do: raise unlearning.seeds"
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
        "retrained_after": share(arms["retrained_after"]),
        "damage": interval_fields(damage) | extremes((floor - changed).tolist()),
        **parted(arms, 1.0),
    }
    metrics["damage"]["interval_over"] = covers
    # a model that noise or a step destroyed may have no finite loss
    lost = {arm: np.asarray(values, np.float64) for arm, values in (losses or {}).items()}
    if lost and all(np.isfinite(lost[arm]).all() for arm in ("after", "random")):
        gained = paired_difference(lost["after"], lost["random"], seed)
        metrics["loss_gained"] = interval_fields(gained) | extremes((lost["after"] - lost["random"]).tolist())
    if wanted:
        metrics["success"] = share(wanted["after"])
        metrics["success_before"] = share(wanted["before"])
        metrics["reached"] = interval_fields(reached)
        metrics |= {f"success_{name}": one for name, one in parted(wanted, -1.0).items()}
    if clean:
        poisoned, honest = first - floor, np.subtract(clean["before"], clean["random"])
        metrics["planted"] = interval_fields(paired_difference(poisoned, honest, seed))
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
    named = {"attack": attack_name, "family": "unlearning", "mechanism": mechanism}
    records = [
        named | row for run in range(runs) for row in _rows(run, arms, lost, wanted, curve or {}, requests)
    ]
    return AuditResult(attack_name, "unlearning", records, summary, verdict, level)


def _rows(
    run: int,
    arms: Mapping[str, NDArray[np.float64]],
    losses: Mapping[str, NDArray[np.float64]],
    wanted: Mapping[str, NDArray[np.float64]],
    curve: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    requests: int,
) -> Iterator[dict[str, Any]]:
    """One seed: each arm after each answered request, then at the federation's end (request None)."""
    for arm, seeds in curve.items():
        for number, figures in enumerate(seeds[run], start=1):
            yield {"run": run, "arm": arm, "request": number, **figures}
    for arm, values in arms.items():
        row = {"run": run, "arm": arm, "request": None, "requests": requests}
        row |= {"accuracy": float(values[run])}
        row |= {"loss": float(losses[arm][run])} if arm in losses else {}
        yield row | ({"success": float(wanted[arm][run])} if wanted else {})


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
    side = "below" if damage.mean >= 0 else "above"
    gap = f"{abs(damage.mean) * 100:.1f} points {side} the deletion of as many random samples"
    text = f"accuracy {formats.percent(before)} before, {formats.percent(after)} after the request, {gap}"
    return _concluded(f"{text} ({formats.percent(random)})", "damage", damage, runs, idle)


def success_verdict(
    goal: str, before: float, after: float, random: float, reached: Interval, runs: int, idle: str = ""
) -> tuple[Level, str]:
    """The same of what an attack wanted; `reached` is ``after - random``."""
    text = f"{goal} {formats.percent(before)} before, {formats.percent(after)} after the request, "
    text += f"{formats.percent(random)} after the deletion of as many random samples"
    return _concluded(text, "difference", reached, runs, idle)


def _concluded(text: str, what: str, found: Interval, runs: int, idle: str) -> tuple[Level, str]:
    """The level of an interval, and `text` with that interval, why nothing is said, or how many seeds would tell."""
    level = gain_level(found, MARGIN)
    if level == "partial" and found.mean >= SLIGHT_DAMAGE:
        level = "leak"
    if found.known:
        ends = f"{formats.signed(found.low * 100)} to {formats.signed(found.high * 100)}"
        text += f"; 95 % interval of the {what} {ends} points"
    else:
        text += f"; {runs} seed{'s' if runs != 1 else ''} and no interval"
    if idle:
        return "undecided", f"undecided: {text}; {idle}"
    if level == "undecided":
        more = further_units(found, MARGIN)
        least = "about" if runs >= FEWEST else "at least"
        text += f"; {least} {more:,} more seed{'s' if more != 1 else ''} would tell"
    return level, f"{UNLEARNING.words(level)}: {text}"


def _score_rows(result: AuditResult) -> list[Row]:
    metrics = result.summary["metrics"]
    before = {"accuracy": metrics["accuracy_before"]}
    if "success_before" in metrics:
        before["success"] = metrics["success_before"]
    rows = [("before any request", False, before), *score_rows(result)]
    if result.summary["mechanism"] != "retrain":
        exact = {"accuracy": metrics["retrained_after"], "damage": metrics["request"]}
        rows.append((f"{result.attack}, by training again", False, exact))
    return rows


def _remarks(result: AuditResult) -> list[str]:
    s = result.summary
    parts = [f"{result.attack}: {s['seeds']} seed{'s' if s['seeds'] != 1 else ''}"]
    parts.append(f"{formats.count(s['count'])} samples to forget, mechanism: {s['mechanism']}")
    if s["metrics"]["damage"]["low"] is not None:
        parts.append(f"the damage's interval covers {s['metrics']['damage']['interval_over']}")
    return [*parts, f"time: {formats.seconds(s['seconds'])}"]


def _beside(result: AuditResult) -> list[str]:
    """What it cost, whose doing the loss is, and what the mechanism says of itself."""
    s, told = result.summary, []
    if costs := s["costs"]:
        told.append(f"what it cost: {_cost(costs['mechanism'])}{_against(costs)}")
    told += _parts(s, "", "accuracy")
    if "success" in s["metrics"]:
        told += _parts(s, "success_", s["goal"])
    if "planted" in s["metrics"]:
        found = s["metrics"]["planted"]
        told.append(f"random deletions cost more after what was planted: {_points(found)}")
    losses = s["details"].get("requested_loss") or {}
    if losses.get("before") is not None and losses.get("after") is not None:
        ends = " to ".join(formats.compact(losses[arm]) for arm in ("before", "after"))
        told.append(f"what it leaves: mean loss of the requested samples {ends} (first seed)")
    if s["certificate"]:
        facts = ", ".join(f"{name} {_plain(value)}" for name, value in s["certificate"].items())
        told.append(f"certificate: {facts}")
    for gate, arms in (s["details"].get("gates") or {}).items():
        refused = [f"{arms[arm][0]} of {arms[arm][1]} {what}" for arm, what in _ARMS.items() if arm in arms]
        if gate != "request" or any(count for count, _ in arms.values()):
            told.append(f"gate {gate} refused {' and '.join(refused)}")
    if warning := s["details"].get("warning"):
        told.append(f"warning: {warning}")
    return told


def _cost(cost: Mapping[str, float]) -> str:
    """One side's cost in words."""
    parts = [
        (cost["rounds"], f"{formats.count(cost['rounds'])} round{'s' if cost['rounds'] != 1 else ''}"),
        (cost["client_steps"], f"{formats.count(cost['client_steps'])} client steps"),
        (cost["gradients"], f"{formats.compact(cost['gradients'])} gradients over all data"),
        (cost["bytes"], f"{formats.size(cost['bytes'])} sent by clients"),
        (1, f"{formats.seconds(cost['cpu_seconds'])} of CPU"),
    ]
    return ", ".join(text for value, text in parts if value)


def _against(costs: Mapping[str, Any]) -> str:
    """The same beside retraining, and what has to be kept."""
    mine, exact = costs["mechanism"], costs["retraining"]
    text = f"; kept on disk {formats.size(costs['history_bytes'])}"
    if mine != exact:
        text += f"; retraining: {_cost(exact)}"
    return text


def _parts(s: Mapping[str, Any], prefix: str, what: str) -> list[str]:
    """Whose doing a loss is: of the mechanism, of the request, or of both together."""
    named = _PARTS if s["mechanism"] != "retrain" else {"request": _PARTS["request"]}
    gained = "gained" if prefix else "lost"
    return [
        f"{what} {gained} {text}: {_points(s['metrics'][f'{prefix}{name}'])}" for name, text in named.items()
    ]


def _points(found: Figures) -> str:
    """A difference of shares in points, with its interval."""
    ends = formats.interval(found, 1, 100.0)
    return f"{formats.signed(found['mean'] * 100)} points {'' if ends == formats.NONE else ends}".rstrip()


def _plain(value: Any) -> str:
    return formats.compact(value) if isinstance(value, float) else str(value)


_ARMS = {"after": "requests", "random": "requests for random samples"}

_PARTS = {
    "algorithm": "by the mechanism alone, forgetting random samples",
    "request": "by the request alone, forgotten by training again",
    "together": "only by both together",
}

UNLEARNING: Family = Family(
    name="unlearning",
    question="Can a client harm the model by what it asks to be forgotten?",
    title="Unlearning requests (with 95 % interval)",
    metrics=(
        Metric("accuracy_after", "test accuracy", "%", 100.0, worst="max", floor="accuracy"),
        Metric("damage", "damage", "points", 100.0),
        Metric("success", "what it wanted", "%", 100.0, worst="max"),
    ),
    floors={"random deletion": "the deletion of as many random samples"},
    headlines={
        "leak": "the request damages the model",
        "partial": "slight damage",
        "none": "no damage beyond random deletion",
    },
    leakage=Leakage(
        "damage",
        "points beyond random deletion",
        lambda s: s["metrics"].get("reached") or s["metrics"]["damage"],
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
    paired="fedattack.audit.paired:of_damage",
    drawings=(
        Drawing(
            "unlearning",
            "fedattack.reporting.figures:unlearning_bars",
            "Accuracy before and after the deletion request, and after random deletion",
            "Only what the request costs beyond the hatched bar is the attack's doing. Outlined: the same samples "
            "forgotten by training again.",
            each=False,
        ),
        Drawing(
            "unlearning-curve",
            "fedattack.reporting.figures:unlearning_curve",
            "Accuracy over answered deletion requests, beside retraining and random deletion",
            "Mean over seeds and their range, after each answered request.",
        ),
    ),
    types={
        "run": "Int64",
        "request": "Int64",
        "requests": "Int64",
        "arm": "string",
        "mechanism": "string",
    },
    glossary="""
        Damage: Accuracy after deleting as many random samples, minus accuracy after the request.

        Lost only by both together: What the request costs under the mechanism beyond random deletion, less what it
        costs where the samples are forgotten by training again.
    """,
)
