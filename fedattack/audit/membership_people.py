"""Whose samples an attack finds: exposure person by person, beside the people nobody trained on."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedattack.audit.membership_pool import Pool
from fedattack.metrics import clopper_pearson
from fedattack.metrics.membership import bar_at_fpr

SHARE = 0.1
"""False positives at which candidates are called members here: at 1 % a person with few samples is never found."""

FEWEST_SAMPLES = 3
"""Of a person, below which nothing is said of them."""

FEWEST_PEOPLE = 2


def exposure(pool: Pool) -> dict[str, Any] | None:
    """Of each person with enough samples, how many the attack calls members, the most exposed first.

    "members" and "non-members" -> rows of "group", "found", "of" and "low", the lower end of their share at 95 %.
    Handwriting, or a face, can look like a member whoever trained on it: so those nobody trained on are the floor of
    the others. None where samples belong to nobody, or too few people have enough members.
    """
    if pool.groups is None:
        return None
    called = pool.scores > bar_at_fpr(pool.scores, pool.is_member, SHARE)
    found: dict[str, Any] = {}
    for name, side in (("members", pool.is_member), ("non-members", ~pool.is_member)):
        people, place = np.unique(pool.groups[side], return_inverse=True)
        of, hits = np.bincount(place), np.bincount(place, weights=called[side]).astype(int)
        rows = [
            {
                "group": int(person),
                "found": int(hit),
                "of": int(count),
                "low": clopper_pearson(hit, count).low,
            }
            for person, hit, count in zip(people, hits, of, strict=True)
            if count >= FEWEST_SAMPLES
        ]
        found[name] = sorted(rows, key=lambda row: (-row["low"], row["group"]))
    return found if len(found["members"]) >= FEWEST_PEOPLE else None


def exposed_people(rows: list[dict[str, Any]]) -> str:
    """How many have more of their samples called members than chance explains, in words."""
    return f"{sum(row['low'] > SHARE for row in rows)} of {len(rows)}"
