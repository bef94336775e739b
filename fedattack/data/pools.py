"""Three disjoint pools of samples: the clients', the held-out non-members, and the adversary's public ones."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import ImageDataset, joined
from fedattack.errors import DataError
from fedattack.rng import numpy_rng


@dataclass(frozen=True, eq=False)
class Pools:
    """Disjoint sample ids, int64, sorted."""

    clients: np.ndarray  # to be dealt out
    nonmembers: np.ndarray  # held out: evaluation and membership non-members
    auxiliary: np.ndarray  # the adversary's; empty when its images come from a file
    note: str = ""  # samples that were left out of every pool, and why


def fingerprints(images: np.ndarray) -> list[bytes]:
    """A 16-byte digest of each image of a uint8 array (N, ...): equal for equal pixels."""
    return [blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images]


def make_pools(dataset: ImageDataset, config: DataConfig, seed: int) -> Pools:
    """Cut a data set into its pools; DataError if they leave nothing for the clients.

    `nonmembers` defaults to a tenth (at least 1), a split `auxiliary_size` to half of the rest. Where the data set
    knows whose a sample is, nobody is both in the auxiliary pool and in another one. A picture that is stored twice
    never ends up on both sides of a border: its copy is taken out of the auxiliary or the non-member pool.
    """
    count, split = len(dataset), config.auxiliary == "split"
    held_out = max(1, count // 10) if config.nonmembers is None else config.nonmembers
    granted = 0
    if split:
        granted = max(0, (count - held_out) // 2) if config.auxiliary_size is None else config.auxiliary_size
    if held_out + granted >= count:
        raise DataError(
            f"data set {config.name!r} has {count} samples: {held_out} non-members (setting 'data.nonmembers') and "
            f"{granted} auxiliary images (setting 'data.auxiliary_size') leave none for the clients"
        )
    rng = numpy_rng(seed, "data.pools")
    order = rng.permutation(count)
    if granted and dataset.groups is not None:
        auxiliary, rest, left_out = _by_group(dataset.groups, order, granted, held_out, config)
    else:
        auxiliary, rest, left_out = order[:granted], order[granted:], 0
    nonmembers, clients = rest[:held_out], rest[held_out:]
    note = f"{left_out} images left out: their people are in the auxiliary pool" if left_out else ""

    digests = fingerprints(dataset.images)
    auxiliary, copies = _without(auxiliary, np.concatenate([clients, nonmembers]), digests)
    note = joined(note, _copies_note(copies, "auxiliary"))
    nonmembers, copies = _without(nonmembers, clients, digests)
    note = joined(note, _copies_note(copies, "non-member"))
    return Pools(np.sort(clients), np.sort(nonmembers), np.sort(auxiliary), note)


def _by_group(
    groups: np.ndarray, order: np.ndarray, granted: int, held_out: int, config: DataConfig
) -> tuple[np.ndarray, np.ndarray, int]:
    """Auxiliary ids of whole groups in the order of first samples, the other groups' ids, and the size of neither."""
    whose, first = np.unique(groups[order], return_index=True)
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    chosen: list[int] = []
    taken = 0
    for group in whose[np.argsort(first)]:
        if taken >= granted:
            break
        if taken + sizes[group] + held_out < len(order):
            chosen.append(group)
            taken += int(sizes[group])
    if not taken or (config.auxiliary_size is not None and taken < granted):
        raise DataError(
            f"setting 'data.auxiliary' = 'split': no {granted} auxiliary images of data set {config.name!r} can be "
            f"cut off so that nobody ({len(whose)} groups) is also among the clients"
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
