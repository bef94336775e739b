"""What a source says about its samples (series, writer, duplicate, ...) as filters and as groups."""

from __future__ import annotations

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import Listing, joined
from fedattack.errors import ConfigError, DataError

SERIES, WRITER, DUPLICATE = "series", "writer", "duplicate"
_SETTINGS = {SERIES: "data.series", WRITER: "data.writers", DUPLICATE: "data.duplicates"}
# Shares of the series among members and non-members that differ by more than this are called a shift.
_LARGEST_SHIFT = 0.15


def within(values: np.ndarray, ranges: tuple[str, ...], setting: str, name: str) -> np.ndarray:
    """Which values lie in one of the ranges ("4", "2100-2349"), bool (N,); DataError if one holds none of them."""
    chosen = np.zeros(len(values), dtype=bool)
    for text in ranges:
        low, _, high = text.partition("-")
        found = (values >= int(low)) & (values <= int(high or low))
        if not found.any():
            raise DataError(
                f"setting {setting!r} = {','.join(ranges)!r}: nothing in data set {name!r} is of {text}; "
                f"it has {spans(values)}"
            )
        chosen |= found
    return chosen


def spans(values: np.ndarray) -> str:
    """Whole numbers in words, neighbours joined: "0, 4" or "0-288, 2100-2349"."""
    known = np.unique(values)
    runs = np.split(known, np.flatnonzero(np.diff(known) != 1) + 1)
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run)]
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")


def filtered(listing: Listing, config: DataConfig) -> tuple[np.ndarray, str]:
    """Ids of the samples that the filters of `config` leave, int64 sorted, and what they left out, in words.

    Raises ConfigError if a filter or `group_by` names a fact that the source does not tell, DataError if nothing is
    left or a filter names values that are not there.
    """
    asked = {SERIES: config.series, WRITER: config.writers}
    asked = {fact: ranges for fact, ranges in asked.items() if ranges}
    for fact, ranges in config.where.items():
        if fact in _SETTINGS:
            raise ConfigError(f"setting 'data.where.{fact}': use setting {_SETTINGS[fact]!r}")
        if ranges:
            asked[fact] = ranges
    keep = np.ones(len(listing.labels), dtype=bool)
    notes = []
    for fact, ranges in asked.items():
        setting = _SETTINGS.get(fact, f"data.where.{fact}")
        column = require_fact(listing, fact, setting, ",".join(ranges), config.name)
        both = ranges + (config.nonmember_series if fact == SERIES else ())
        chosen = within(column, both, setting, config.name)
        if not chosen.all():
            notes.append(f"{fact} {', '.join(both)}: {chosen.sum():,} of {len(chosen):,} images")
        keep &= chosen
    if config.nonmember_series:
        text = ",".join(config.nonmember_series)
        column = require_fact(listing, SERIES, "data.nonmember_series", text, config.name)
        within(column, config.nonmember_series, "data.nonmember_series", config.name)
    if config.group_by is not None:
        require_fact(listing, config.group_by, "data.group_by", config.group_by, config.name)
    if config.duplicates == "drop" and DUPLICATE in listing.facts:
        copies = listing.facts[DUPLICATE] != 0
        notes.append(f"duplicates left out: {(keep & copies).sum():,}" if (keep & copies).any() else "")
        keep &= ~copies
    if not keep.any() and len(keep):
        settings = ", ".join(_SETTINGS.get(fact, f"data.where.{fact}") for fact in asked) or "data.duplicates"
        raise DataError(f"the filters {settings} together leave nothing of data set {config.name!r}")
    return np.flatnonzero(keep), joined(*notes)


def require_fact(listing: Listing, fact: str, setting: str, value: str, name: str) -> np.ndarray:
    """The fact that a setting needs, int64 (N,); ConfigError where the source does not tell it."""
    if fact not in listing.facts:
        known = (
            f"; known: {', '.join(sorted(listing.facts))}" if listing.facts else "; 'qmnist' and 'sd19' do"
        )
        raise ConfigError(
            f"setting {setting!r} = {value!r}: data set {name!r} does not tell the {fact} of a sample{known}"
        )
    return listing.facts[fact]


def interleaved(kinds: np.ndarray) -> np.ndarray:
    """The order, int64 (N,), in which any first few things are mixed as all are by kind; within a kind as they come.

    A share of k things is off by less than one per kind.
    """
    rank = np.empty(len(kinds))
    for kind in np.unique(kinds):
        own = kinds == kind
        rank[own] = (np.arange(own.sum()) + 0.5) / own.sum()
    return np.argsort(rank, kind="stable")


def series_shift(series: np.ndarray | None, members: np.ndarray, nonmembers: np.ndarray) -> str:
    """The warning that members' and non-members' samples, by id, come from other series; empty where they do not.

    The two are compared by the total variation distance of their shares of each series; above .15 what tells them
    apart may be the series and no membership.
    """
    if series is None or not len(members) or not len(nonmembers):
        return ""
    known = np.unique(series)
    ours, theirs = (np.array([(series[ids] == one).mean() for one in known]) for ids in (members, nonmembers))
    if np.abs(ours - theirs).sum() / 2 <= _LARGEST_SHIFT:
        return ""

    def words(shares: np.ndarray) -> str:
        return ", ".join(
            f"{share:.0%} series {one}" for one, share in zip(known, shares, strict=True) if share
        )

    return (
        f"distribution shift, not membership: members are {words(ours)}, non-members {words(theirs)}; an attack may "
        "tell the series apart and know no member"
    )
