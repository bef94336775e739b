"""Forgotten samples in the models before and after: who was a member, and who was forgotten.

Samples are ranked by their loss, the smaller the likelier a member, and, by an observer of both models, by how much
their loss rose (Chen et al., "When Machine Unlearning Jeopardizes Privacy", CCS 2021); beside samples that nobody
trained on. The verdict is about the forgotten after the deletion and about the two models together, by the rules of
:mod:`fedattack.audit.membership`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedattack.audit.family import (
    SEVERITY,
    AuditResult,
    Family,
    Figures,
    Leakage,
    Level,
    Metric,
    Row,
    at_chance,
    interval_fields,
)
from fedattack.audit.membership import IDENTIFIED_AUC, MARGIN_AUC
from fedattack.errors import DataError
from fedattack.metrics import Interval, auc, auc_reach, chance_auc
from fedattack.reporting import formats

QUESTIONS = {
    "forgotten_before": "forgotten samples, in the model before",
    "auc": "forgotten samples, in the model after",
    "both": "forgotten samples, by both models",
    "retained_before": "retained samples of the same clients, in the model before",
    "retained_after": "retained samples of the same clients, in the model after",
}
"""Whom an observer would tell from samples that nobody trained on."""


def audit_forgotten(
    name: str,
    forgotten: tuple[NDArray[np.float64], NDArray[np.float64]],
    retained: tuple[NDArray[np.float64], NDArray[np.float64]],
    unseen: tuple[NDArray[np.float64], NDArray[np.float64]],
    *,
    mechanism: str,
    accuracy: float | None = None,
    chance_accuracy: float | None = None,
    told: Sequence[str] = (),
    seconds: float = 0.0,
) -> AuditResult:
    """Score what the models before and after a deletion say of who was in the data; a record per sample.

    Parameters
    ----------
    forgotten, retained, unseen
        Losses before and after, each (n,): of the samples that were forgotten, of those that the same clients keep,
        of those that nobody trained on.
    accuracy, chance_accuracy
        In [0, 1]: of the model before on the unseen samples, and the share of their commonest class. A model that
        cannot be told from chance says nothing about membership.
    told
        Sentences to stand beside the verdict.

    Raises
    ------
    DataError
        If a loss is not finite, or nothing was forgotten or unseen.
    """
    metrics: dict[str, Any] = {}
    asked = {
        "forgotten_before": (-forgotten[0], -unseen[0]),
        "auc": (-forgotten[1], -unseen[1]),
        "both": (forgotten[1] - forgotten[0], unseen[1] - unseen[0]),
        "retained_before": (-retained[0], -unseen[0]),
        "retained_after": (-retained[1], -unseen[1]),
    }
    if not len(forgotten[0]) or not len(unseen[0]):
        raise DataError(
            f"{name}: {len(forgotten[0])} forgotten and {len(unseen[0])} unseen samples; one of each is needed"
        )
    for key, (ours, others) in asked.items():
        if len(ours):
            metrics[key] = interval_fields(_area(ours, others))
    chance = chance_auc(len(forgotten[0]), len(unseen[0]))
    idle = at_chance(accuracy, chance_accuracy, len(unseen[0]))
    levels = {key: _level(metrics[key], chance) for key in ("auc", "both")}
    level: Level = "undecided" if idle else min(levels.values(), key=SEVERITY.index)
    figures = [f"{words} {_said(metrics[key])}" for key, words in _SHORT.items() if key in metrics]
    verdict = f"{FORGOTTEN.words(level)}: AUC of {', '.join(figures)}"
    verdict += f"; chance 0.500 [{chance.low:.3f}, {chance.high:.3f}]{f'; {idle}' if idle else ''}"
    groups = {"forgotten": forgotten, "retained": retained, "unseen": unseen}
    records = [
        {
            "attack": name,
            "family": "forgotten",
            "group": group,
            "loss_before": float(b),
            "loss_after": float(a),
        }
        for group, (before, after) in groups.items()
        for b, a in zip(before, after, strict=True)
    ]
    summary = {
        "family": "forgotten",
        "count": len(forgotten[0]),
        "retained": len(retained[0]),
        "unseen": len(unseen[0]),
        "mechanism": mechanism,
        "metrics": metrics,
        "floors": {"chance": {"auc": interval_fields(chance)}},
        "best_floor": "chance",
        "told": list(told),
        "seconds": seconds,
        "level": level,
        "verdict": verdict,
    }
    return AuditResult(name, "forgotten", records, summary, verdict, level)


def _area(ours: NDArray[np.float64], others: NDArray[np.float64]) -> Interval:
    member = np.repeat([True, False], [len(ours), len(others)])
    area = auc(np.concatenate([ours, others]), member)
    return Interval(area, *auc_reach(area, len(ours), len(others)), count=len(member))


def _level(found: Figures, chance: Interval) -> Level:
    """As a ranking of members: "none" needs the upper end below what counts as a leak."""
    if found["low"] > 0.5 and found["mean"] > chance.high:
        return "leak" if found["mean"] >= IDENTIFIED_AUC else "partial"
    return "none" if found["high"] < MARGIN_AUC else "undecided"


def _said(found: Figures) -> str:
    return f"{found['mean']:.3f} {formats.interval(found, 3)}"


_SHORT = {
    "forgotten_before": "the forgotten before",
    "auc": "after",
    "both": "by both models",
    "retained_before": "the retained before",
    "retained_after": "after",
}


def _rows(result: AuditResult) -> list[Row]:
    metrics = result.summary["metrics"]
    rows: list[Row] = [
        (f"{result.attack}: {words}", key == "auc", {"auc": metrics[key]})
        for key, words in QUESTIONS.items()
        if key in metrics
    ]
    return [*rows, ("floor: chance", False, result.summary["floors"]["chance"])]


def _cell(key: str) -> Any:
    return lambda s: FORGOTTEN.metrics[0].two_lines({"auc": s["metrics"].get(key)})


FORGOTTEN: Family = Family(
    name="forgotten",
    question="Can it be told from the models before and after who was in the data, and who was forgotten?",
    title="Membership before and after forgetting (AUC against samples that nobody trained on, 95 % interval)",
    metrics=(Metric("auc", "AUC", digits=3),),
    floors={"chance": "a ranking that knows nothing"},
    headlines={
        "leak": "the forgotten are identified",
        "partial": "the forgotten can be told",
        "none": "the forgotten look like samples never seen",
    },
    leakage=Leakage(
        "forgotten_auc",
        "AUC of the forgotten after forgetting",
        lambda s: s["metrics"]["auc"],
        nothing=0.5,
        span=0.2,
        title="How well the forgotten can still be told",
        digits=3,
    ),
    columns=(
        ("for-\ngotten", lambda s: formats.count(s["count"])),
        ("before", _cell("forgotten_before")),
        ("after", _cell("auc")),
        ("by both\nmodels", _cell("both")),
        ("retained,\nbefore", _cell("retained_before")),
        ("retained,\nafter", _cell("retained_after")),
    ),
    rows=_rows,
    beside=lambda result: result.summary["told"],
    types={"group": "string"},
    glossary="""
By both models: An observer of both ranks samples by how much their loss rose: those that were forgotten stand out
where the mechanism, or retraining, raises it.

Retained: Samples that the same clients did not ask to forget. Forgetting others can raise their risk.
""",
)
