"""What an attack said of all its targets' candidates, and what they are, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedattack.errors import DataError
from fedattack.metrics import Interval, pooled_auc, unit_counts
from fedattack.metrics.membership import checked
from fedattack.metrics.statistics import FEWEST

KINDS = ("member", "member of another", "held out")
"""What a candidate is."""


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
    rounds : sequence of int
        In which the target was observed.
    """

    client: int
    scores: NDArray[np.float64]
    is_member: NDArray[np.bool_]
    samples: NDArray[np.int64]
    others: NDArray[np.bool_]
    labels: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None
    rounds: Sequence[int] = ()


@dataclass(frozen=True)
class Pool:
    """The candidates of all targets, (n,): the columns of :class:`Scored` below one another, each with its target.

    `labels` and `groups` are None where a target lacks them.
    """

    scores: NDArray[np.float64]
    is_member: NDArray[np.bool_]
    clients: NDArray[np.int64]
    samples: NDArray[np.int64]
    others: NDArray[np.bool_]
    labels: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, scored: Sequence[Scored]) -> Pool:
        """The targets below one another.

        DataError where there is none, lengths differ, a score is not finite, or one lacks members or non-members.
        """
        if not scored:
            raise DataError("no target was scored: at least one is needed")
        for one in scored:
            count = len(checked(one.scores, one.is_member)[0])
            found = (one.samples, one.others, one.labels, one.groups)
            if wrong := [len(column) for column in found if column is not None and len(column) != count]:
                raise DataError(
                    f"client {one.client}: {count} scores, {wrong[0]} of something else: one per candidate"
                )

        def column(name: str) -> NDArray[np.int64] | None:
            parts = [getattr(one, name) for one in scored]
            return None if any(part is None for part in parts) else np.concatenate(parts)

        clients = np.concatenate([np.full(len(one.scores), one.client) for one in scored])
        fixed = {
            name: np.concatenate([getattr(one, name) for one in scored])
            for name in ("scores", "is_member", "samples", "others")
        }
        return cls(**fixed, clients=clients, labels=column("labels"), groups=column("groups"))

    @classmethod
    def of_records(cls, records: Sequence[Mapping[str, Any]]) -> Pool:
        """The candidates of an audit, without their labels."""

        def column(name: str, kind: type) -> NDArray[Any]:
            return np.array([row[name] for row in records], dtype=kind)

        return cls(
            scores=column("score", float),
            is_member=column("is_member", bool),
            clients=column("client", int),
            samples=column("sample", int),
            others=np.array([row["kind"] == KINDS[1] for row in records]),
            groups=column("group", int) if "group" in records[0] else None,
        )

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """What was drawn: the person of a candidate, or where there are too few people the sample."""
        if self.groups is not None and min(unit_counts(self.is_member, self.groups)) >= FEWEST:
            return self.groups
        return self.samples

    @property
    def unit_counts(self) -> tuple[int, int]:
        """Distinct units among members and among non-members."""
        return unit_counts(self.is_member, self.units)

    def where(self, kept: NDArray[np.bool_]) -> Pool:
        """Some of the candidates."""
        return Pool(
            self.scores[kept],
            self.is_member[kept],
            self.clients[kept],
            self.samples[kept],
            self.others[kept],
            None if self.labels is None else self.labels[kept],
            None if self.groups is None else self.groups[kept],
        )

    def auc(self, confidence: float = 0.95) -> Interval:
        """See :func:`fedattack.metrics.pooled_auc`."""
        return pooled_auc(self.scores, self.is_member, self.clients, self.units, confidence)


def halves(units: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which candidates, (n,), lie in one half of the units, drawn at random."""
    names, place = np.unique(units, return_inverse=True)
    chosen = np.zeros(len(names), dtype=bool)
    chosen[rng.permutation(len(names))[: len(names) // 2]] = True
    return chosen[place]
