"""Disjoint pools of samples: the clients', what is withheld from them, the held-out, the adversary's public ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import ImageDataset, joined, require_groups
from fedattack.data.facts import SERIES, interleaved, within
from fedattack.errors import DataError
from fedattack.rng import numpy_rng


@dataclass(frozen=True, eq=False)
class Pools:
    """Disjoint sample ids, int64, sorted."""

    clients: np.ndarray  # to be dealt out
    nonmembers: np.ndarray  # held out: evaluation and membership non-members
    auxiliary: np.ndarray  # the adversary's; empty when its images come from a file
    withheld: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of clients' people
    note: str = ""  # samples that were left out of every pool, and why


def fingerprints(images: np.ndarray) -> list[bytes]:
    """A 16-byte digest of each image of a uint8 array (N, ...): equal for equal pixels."""
    return [blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images]


def make_pools(dataset: ImageDataset, config: DataConfig, seed: int) -> Pools:
    """Cut a data set into its pools; DataError if they leave nothing for the clients.

    `nonmembers` defaults to a tenth (at least 1) of the samples, or of the people where `nonmember_unit` is "group";
    a split `auxiliary_size` to half of the rest. Where the data set knows whose a sample is, nobody is both in the
    auxiliary pool and in another one; where it also knows people's series, whole people are held out, and granted, in
    the proportions of the series, unless `nonmember_series` holds out of those alone. `withheld` is that share of
    every client's person's samples, rounded, at least one and never all. A picture that is stored twice never ends up
    on both sides of a border: its copy is taken out of the pool that nobody trains on.
    """
    rng = numpy_rng(seed, "data.pools")
    order = rng.permutation(len(dataset))
    held_out = max(1, len(dataset) // 10) if config.nonmembers is None else config.nonmembers
    nonmembers, rest = order[:0], order
    if config.nonmember_unit == "group" or config.nonmember_series:
        nonmembers, rest = _held_out_first(dataset, order, held_out, config)
        held_out = 0
    granted = 0
    if config.auxiliary == "split":
        half = max(0, (len(rest) - held_out) // 2)
        granted = half if config.auxiliary_size is None else config.auxiliary_size
    if held_out + granted >= len(rest):
        raise DataError(
            f"data set {config.name!r} has {len(dataset)} samples: {held_out or len(nonmembers)} non-members "
            f"(setting 'data.nonmembers') and {granted} auxiliary images (setting 'data.auxiliary_size') "
            "leave none for the clients"
        )
    if granted and dataset.groups is not None:
        auxiliary, rest, left_out = _by_group(dataset, rest, granted, held_out, config)
    else:
        auxiliary, rest, left_out = rest[:granted], rest[granted:], 0
    nonmembers, clients = np.concatenate([nonmembers, rest[:held_out]]), rest[held_out:]
    clients, withheld = _withheld(dataset, clients, config.withheld)
    note = f"{left_out} images left out: their people are in the auxiliary pool" if left_out else ""

    digests = fingerprints(dataset.images)
    everybody = np.concatenate([clients, withheld, nonmembers])
    auxiliary, copies = _without(auxiliary, everybody, digests)
    note = joined(note, _copies_note(copies, "auxiliary"))
    nonmembers, copies = _without(nonmembers, np.concatenate([clients, withheld]), digests)
    note = joined(note, _copies_note(copies, "non-member"))
    withheld, copies = _without(withheld, clients, digests)
    note = joined(note, _copies_note(copies, "withheld"))
    return Pools(np.sort(clients), np.sort(nonmembers), np.sort(auxiliary), np.sort(withheld), note)


def _held_out_first(
    dataset: ImageDataset, order: np.ndarray, held_out: int, config: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the held-out people or samples (of `nonmember_series`), and those that the other pools may have."""
    eligible = rest = order
    if config.nonmember_series:
        series = dataset.facts[SERIES][order]
        foreign = within(series, config.nonmember_series, "data.nonmember_series", config.name)
        ours = within(series, config.series, "data.series", config.name) if config.series else ~foreign
        eligible, rest = order[foreign], order[ours]
    if config.nonmember_unit == "group":
        nonmembers = _people_held_out(dataset, eligible, config)
        groups = require_groups(dataset.groups, "setting 'data.nonmember_unit' = 'group'")
        return nonmembers, rest[~np.isin(groups[rest], groups[nonmembers])]
    if held_out > len(eligible):
        raise DataError(
            f"setting 'data.nonmembers' = {held_out}: series {', '.join(config.nonmember_series)} "
            f"('data.nonmember_series') of data set {config.name!r} hold {len(eligible)} samples"
        )
    return eligible[:held_out], rest[~np.isin(rest, eligible[:held_out])]


def _people_in_order(dataset: ImageDataset, order: np.ndarray) -> np.ndarray:
    """The people of the samples `order`, in the order of their first ones; any first few as the series are mixed."""
    assert dataset.groups is not None
    whose, first = np.unique(dataset.groups[order], return_index=True)
    place = np.argsort(first)
    if SERIES not in dataset.facts:
        return whose[place]
    return whose[place][interleaved(dataset.facts[SERIES][order][first[place]])]


def _people_held_out(dataset: ImageDataset, order: np.ndarray, config: DataConfig) -> np.ndarray:
    """Ids of the samples of whole people, as many as `nonmembers` says."""
    groups = require_groups(dataset.groups, "setting 'data.nonmember_unit' = 'group'")
    people = _people_in_order(dataset, order)
    wanted = max(1, len(people) // 10) if config.nonmembers is None else config.nonmembers
    if wanted + (not config.nonmember_series) > len(people):
        left = "" if config.nonmember_series else ", and some must be left for the clients"
        where = f" of series {', '.join(config.nonmember_series)}" if config.nonmember_series else ""
        raise DataError(
            f"setting 'data.nonmembers' = {wanted}: data set {config.name!r} has {len(people)} people{where}{left}"
        )
    return order[np.isin(groups[order], people[:wanted])]


def share_of_each(groups: np.ndarray, share: float) -> np.ndarray:
    """Which of some people's samples, in random order, are that share of each person's, bool (n,): never all."""
    chosen = np.zeros(len(groups), dtype=bool)
    for whose in np.unique(groups):
        own = np.flatnonzero(groups == whose)
        chosen[own[: min(len(own) - 1, max(1, round(share * len(own))))]] = True
    return chosen


def _withheld(dataset: ImageDataset, ids: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """What is dealt out of some people's samples in random order, and what nobody gets."""
    if not share:
        return ids, ids[:0]
    groups = require_groups(dataset.groups, f"setting 'data.withheld' = {share:g}")
    kept_back = share_of_each(groups[ids], share)
    return ids[~kept_back], ids[kept_back]


def _by_group(
    dataset: ImageDataset, order: np.ndarray, granted: int, held_out: int, config: DataConfig
) -> tuple[np.ndarray, np.ndarray, int]:
    """Auxiliary ids of whole groups in the order of first samples, the other groups' ids, and the size of neither."""
    assert dataset.groups is not None
    groups, people = dataset.groups, _people_in_order(dataset, order)
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    chosen: list[int] = []
    taken = 0
    for group in people:
        if taken >= granted:
            break
        if taken + sizes[group] + held_out < len(order):
            chosen.append(group)
            taken += int(sizes[group])
    if not taken or (config.auxiliary_size is not None and taken < granted):
        raise DataError(
            f"setting 'data.auxiliary' = 'split': no {granted} auxiliary images of data set {config.name!r} can be "
            f"cut off so that nobody ({len(people)} groups) is also among the clients"
        )
    inside = np.isin(groups[order], chosen)
    auxiliary = order[inside]
    if config.auxiliary_size is not None:
        auxiliary = auxiliary[:granted]
    return auxiliary, order[~inside], taken - len(auxiliary)


def _without(ids: np.ndarray, others: np.ndarray, digests: list[bytes]) -> tuple[np.ndarray, int]:
    """`ids` less those whose picture is also among `others`, and how many those were."""
    theirs = {digests[i] for i in others}
    keep = np.array([digests[i] not in theirs for i in ids], dtype=bool)
    return ids[keep], int((~keep).sum())


def _copies_note(copies: int, pool: str) -> str:
    return (
        f"{copies} images left out of the {pool} pool: identical pictures are in another pool"
        if copies
        else ""
    )
