"""The auditor of unlearning: what a deletion request cost beyond as many random deletions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedattack.audit import unlearning_verdict
from fedattack.audit.family import AuditResult, _ends, describe, interval_fields
from fedattack.errors import DataError
from fedattack.metrics import (
    paired_difference,
    share_difference,
)


def audit_unlearning(
    attack_name: str,
    before: Sequence[float] | float,
    after: Sequence[float] | float,
    random: Sequence[float] | float,
    *,
    requests: int,
    mechanism: str,
    test_samples: int | None = None,
    seconds: float = 0.0,
    seed: int = 0,
) -> AuditResult:
    """Score a deletion request by the accuracy it costs beyond deleting as many random samples.

    Parameters
    ----------
    attack_name : str
        Its name in this run.
    before, after, random : float, or one per seed
        Test accuracies in [0, 1]: before the request, after it was carried out, and after the deletion of as many
        random samples instead (the floor).
    requests : int
        Samples whose deletion was requested.
    mechanism : str
        How the server forgets.
    test_samples : int, optional
        Size of the test set: with a single seed the interval then covers the test samples.
    seconds : float
        Time in all.
    seed : int
        Seeds the bootstrap.

    Returns
    -------
    AuditResult
        One record per seed.

    Raises
    ------
    DataError
        If the lengths differ or a figure is no share.
    """
    columns = [np.atleast_1d(np.asarray(c, dtype=np.float64)) for c in (before, after, random)]
    sizes = {len(c) for c in columns}
    if len(sizes) != 1 or 0 in sizes or not all(((c >= 0) & (c <= 1)).all() for c in columns):
        raise DataError(
            f"attack {attack_name!r}: accuracies before, after and after random deletion must be equally many "
            "shares in [0, 1]"
        )
    first, changed, floor = columns
    runs = len(first)
    if runs == 1 and test_samples:
        damage = share_difference(float(floor[0]), float(changed[0]), test_samples)
        covers = "test samples"
    else:
        damage = paired_difference(floor, changed, seed)
        covers = "seeds"
    level, verdict = unlearning_verdict.unlearning(
        float(first.mean()), float(changed.mean()), float(floor.mean()), damage
    )

    def accuracy(values: np.ndarray) -> dict[str, Any]:
        return {"accuracy": describe(values.tolist(), seed, worst="max")}

    summary = {
        "family": "unlearning",
        "count": requests,
        "seeds": runs,
        "mechanism": mechanism,
        "test_samples": test_samples,
        "metrics": {
            "accuracy_before": accuracy(first)["accuracy"],
            "accuracy_after": accuracy(changed)["accuracy"],
            "damage": {
                **interval_fields(damage),
                **_ends((floor - changed).tolist()),
                "interval_over": covers,
            },
        },
        "floors": {"random deletion": accuracy(floor)},
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
            "accuracy_before": float(b),
            "accuracy_after": float(a),
            "floor.random deletion.accuracy": float(r),
            "damage": float(r - a),
        }
        for index, (b, a, r) in enumerate(zip(first, changed, floor, strict=True))
    ]
    return AuditResult(attack_name, "unlearning", records, summary, verdict, level)


__all__ = ["audit_unlearning"]
