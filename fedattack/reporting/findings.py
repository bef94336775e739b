"""What a figure shows, in words, for those who do not see it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedattack.audit.family import SEVERITY, AuditResult, Drawing, get_family
from fedattack.reporting import formats

_MOST = 3
"""Attacks whose finding is told of a figure of several, the worst first."""


def of_drawing(drawing: Drawing, results: Sequence[AuditResult]) -> str:
    """What is drawn, and what the attacks in it found."""
    ranked = sorted(results, key=lambda result: SEVERITY.index(result.level))[:_MOST]
    more = f"; and {len(results) - _MOST} more" if len(results) > _MOST else ""
    whose = f"{results[0].attack}: " if drawing.each else ""
    return f"{whose}{drawing.alt}. {'; '.join(_found(result, drawing.each) for result in ranked)}{more}."


def _found(result: AuditResult, named: bool) -> str:
    """``hcgla: private images recovered, PSNR 31.2 dB, best floor 14.8``."""
    family = get_family(result.family)
    lead, s = family.metrics[0], result.summary
    told = ([] if named else [f"{result.attack}"]) + [family.words(result.level)]
    described = lead.of(s["metrics"]) or {}
    if described.get("mean") is not None:
        told.append(f"{lead.title or lead.key} {lead.shown(described['mean'])} {lead.unit}".strip())
    floor = lead.of(s["floors"].get(s.get("best_floor"), {})) if s.get("floors") else None
    if floor and floor.get("mean") is not None:
        told.append(f"best floor {lead.shown(floor['mean'])}")
    return ", ".join(told)


def of_rounds(rounds: Sequence[Mapping[str, Any]], called: Mapping[str, str]) -> str:
    """From which to which figure the model came."""
    told = []
    for key, name, show in (
        ("accuracy", "test accuracy", formats.percent),
        ("loss", called["loss"], formats.compact),
        ("train_loss", called["train_loss"], formats.compact),
    ):
        known = [(row["round"], row[key]) for row in rounds if row.get(key) is not None]
        if len(known) > 1:
            (first, began), (last, ended) = known[0], known[-1]
            told.append(f"{name} from {show(began)} in round {first} to {show(ended)} in round {last}")
    return f"The global model over the rounds: {'; '.join(told)}."


def of_labels(counts: Mapping[int, Mapping[int, int]]) -> str:
    """How unlike the clients' labels are."""
    sizes = [sum(held.values()) for held in counts.values()]
    kinds = [len([n for n in held.values() if n]) for held in counts.values()]
    totals = Counter[int]()
    for held in counts.values():
        totals.update(held)
    return (
        f"Samples of each label at each client: {len(counts)} clients hold {_span(sizes)} samples of {_span(kinds)} "
        f"of {len(totals)} labels."
    )


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def known(value: Any) -> bool:
    """Whether a figure is there: neither None nor NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))
