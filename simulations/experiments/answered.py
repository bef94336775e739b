"""What a membership attack answered about its targets, beside what it was asked, for the auditor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedattack.audit.membership import Source
from fedattack.audit.membership_pool import Scored
from fedattack.observation import EVERYONE, MembershipScores
from simulations.experiments.question import Asked


@dataclass
class Answered:
    """One attack's answers. `ids`, `labels` and `groups` are of the whole list, int64 (U,)."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    scored: list[Scored] = field(default_factory=list)
    statistic: str = ""
    references: int | None = None
    _members: list[NDArray[np.int64]] = field(default_factory=list)
    _scores: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, asked: Asked, answer: MembershipScores, rounds: Sequence[int]) -> None:
        """Take in a target's scores of the whole list; `rounds`: in which it was observed."""
        scores, places = answer.scores.numpy(), asked.places
        groups = None if self.groups is None else self.groups[places]
        columns = (asked.is_member, self.ids[places], asked.others, self.labels[places], groups)
        self.scored.append(Scored(asked.target, scores[places], *columns, rounds))
        self.statistic = answer.statistic
        used = answer.details.get("references")
        if used is not None:
            self.references = used if self.references is None else min(used, self.references)
        self._members.append(places[asked.is_member])
        self._scores.append(scores)

    @property
    def source(self) -> Source | None:
        """Every target's scores for every target's members; None where there is one target, or it is anybody."""
        targets = np.array([one.client for one in self.scored])
        if len(targets) < 2 or EVERYONE in targets:
            return None
        members = np.concatenate(self._members)
        owner = np.repeat(targets, [len(places) for places in self._members])
        return Source(targets, np.stack(self._scores)[:, members], owner)
