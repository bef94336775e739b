"""Many victims, as many at a time as memory bears."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

from adversaries.base import Progress, share_of
from fedattack.observation import Observation

T = TypeVar("T")

_NUMBERS_TOGETHER = 64_000_000
"""Sent entries, over all victims and restarts, that are worth holding at once."""

_IMAGES_TOGETHER = 256
"""Images, over all victims and restarts, that are worth optimising at once."""


def in_parts(
    observations: Sequence[Observation],
    kinds: Sequence[tuple[int, ...]],
    restarts: int,
    work: Callable[[list[int], Progress], Sequence[T]],
    progress: Progress,
) -> list[T]:
    """What `work` makes of the victims at some positions, for all of them in their order.

    Victims of one kind can be treated together; a kind begins with the batch size. Each has so many
    `restarts`.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, kind in enumerate(kinds):
        groups[kind].append(position)
    found: dict[int, T] = {}
    total = len(observations)
    for (batch, *_), members in groups.items():
        heaviest = max(1, *(observations[position].update.kept for position in members))
        together = min(_NUMBERS_TOGETHER // (restarts * heaviest), _IMAGES_TOGETHER // (restarts * batch))
        for first in range(0, len(members), max(1, together)):
            part = members[first : first + max(1, together)]
            told = share_of(progress, len(found) / total, (len(found) + len(part)) / total)
            found |= dict(zip(part, work(part, told), strict=True))
    return [found[position] for position in range(total)]
