"""Ratings of reconstructions by people or their proxies: tables, agreement, the page that asks."""

from __future__ import annotations

from fedattack.annotation.agreement import fleiss_kappa, krippendorff_alpha
from fedattack.annotation.table import (
    COLUMNS,
    check_images,
    latest,
    read_table,
    votes,
    write_table,
    write_votes,
)

__all__ = [
    "COLUMNS",
    "check_images",
    "fleiss_kappa",
    "krippendorff_alpha",
    "latest",
    "pair_name",
    "read_table",
    "votes",
    "write_table",
    "write_votes",
]
