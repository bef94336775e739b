"""The best of several attacks, with its selection corrected."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedattack.audit.family import AuditResult, Figures, interval_fields
from fedattack.audit.membership_pool import Pool, halves
from fedattack.metrics import (
    Interval,
    at_least_score,
    auc,
    auc_influence,
    clustered_interval,
    hits_at_fpr,
)
from fedattack.reporting import formats
from fedattack.rng import numpy_rng

SPLITS = 10


@dataclass(frozen=True)
class Best:
    """What the best of several attacks scores where it was not chosen.

    `auc` with its interval, `tpr` at 1 % false positives, and how often each attack was `chosen` of `halves`.
    """

    auc: Interval
    tpr: float
    chosen: dict[str, int]
    halves: int


def best_of(attacks: Mapping[str, Pool], seed: int) -> Best | None:
    """Choose the attack of the highest AUC on one half of the people (or samples), score it on the other, both ways.

    Mean over :data:`SPLITS` random halvings; the attacks answer for the same candidates in the same order. The
    largest of many AUCs on the same candidates would be biased upwards. The interval is as wide as one halving's:
    halvings of the same candidates are far from independent. None where a half lacks members or non-members.
    """
    first = next(iter(attacks.values()))
    member, rng = first.is_member, numpy_rng(seed, "best of many attacks")
    found, rates = list[Interval](), list[float]()
    chosen: Counter[str] = Counter()
    for _ in range(SPLITS):
        half = halves(first.units, rng)
        moved, areas = np.zeros(len(member)), list[float]()
        for chooses, scores in ((half, ~half), (~half, half)):
            if any(member[part].all() or not member[part].any() for part in (chooses, scores)):
                return None
            best = max(attacks, key=lambda n: auc(attacks[n].scores[chooses], member[chooses]))
            chosen[best] += 1
            values = attacks[best].scores[scores]
            area, influence = auc_influence(values, member[scores])
            moved[scores] = influence / 2
            areas.append(area)
            rates.append(hits_at_fpr(values, member[scores], 0.01)[0] / member[scores].sum())
        found.append(clustered_interval(float(np.mean(areas)), moved, member, first.clients, first.units))
    mean, low, high = (
        float(np.mean([getattr(one, end) for one in found])) for end in ("mean", "low", "high")
    )
    whole = at_least_score(Interval(mean, low, high, found[0].count), member, first.units)
    return Best(whole, float(np.mean(rates)), dict(chosen.most_common()), 2 * SPLITS)


def together(results: Sequence[AuditResult]) -> Figures | None:
    """The best of the attacks that were asked the same question, a question each; None where no two were."""
    alike: dict[tuple[bytes, ...], dict[str, Pool]] = defaultdict(dict)
    for result in results:
        pool = Pool.of_records(result.records)
        question = tuple(column.tobytes() for column in (pool.clients, pool.samples, pool.is_member))
        alike[question][result.attack] = pool
    told: list[dict[str, Any]] = []
    for asked in alike.values():
        best = best_of(asked, 0) if len(asked) > 1 else None
        if best is not None:
            figures = {"auc": interval_fields(best.auc), "tpr_at_1_percent_fpr": {"mean": best.tpr}}
            told.append({**figures, "attacks": list(asked), "chosen": best.chosen, "halves": best.halves})
    return {"best": told, "text": "; ".join(map(_best_text, told))} if told else None


def _best_text(best: Figures) -> str:
    area, found = best["auc"], formats.percent(best["tpr_at_1_percent_fpr"]["mean"])
    often = ", ".join(f"{name} in {count} of {best['halves']}" for name, count in best["chosen"].items())
    return (
        f"best of {len(best['attacks'])} attacks ({', '.join(best['attacks'])}), chosen on one half, scored on the "
        f"other: AUC {area['mean']:.3f} {formats.interval(area, 3)}, {found} of the members at 1 % false positives; "
        f"chosen: {often}"
    )
