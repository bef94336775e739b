"""Digits with made-up writers, for tests of questions about people."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import Listing
from fedattack.data.embedded import digits

PEOPLE = 60


def alike(config: DataConfig) -> Listing:
    """Each of 60 people has 29 or 30 digits of anybody's hand: there is nothing to recognise."""
    listing = digits(config)
    count = len(listing.labels)
    groups = np.random.default_rng(5).permutation(np.arange(count) % PEOPLE)
    return replace(listing, groups=groups.astype(np.int64))


def hands(config: DataConfig) -> Listing:
    """The same, but everybody writes every digit in a way of their own: a pattern under it."""
    listing = alike(config)
    strokes = np.random.default_rng(6).integers(0, 90, (PEOPLE, 10, 1, 8, 8))
    assert listing.groups is not None
    groups = listing.groups

    def read(ids: np.ndarray, size: int | None) -> np.ndarray:
        marked = (
            listing.read(ids, size).astype(np.int64) * 165 // 255 + strokes[groups[ids], listing.labels[ids]]
        )
        return marked.astype(np.uint8)

    return replace(listing, read=read)
