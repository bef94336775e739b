"""Reconstructions with the answer whether they were recognised, and how they are split for training and tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedattack.errors import ConfigError, DataError
from fedattack.rng import numpy_rng

AXES = ("model", "attack", "defence", "dataset")
"""What a reconstruction came from: columns of the annotation table by which tests leave something out."""


@dataclass(frozen=True, eq=False)
class Rated:
    """N reconstructions of M originals, and whether each was recognised.

    Parameters
    ----------
    originals : Tensor, float32 (M, C, S, S) in [0, 1]
    reconstructions : Tensor, float32 (N, C, S, S) in [0, 1]
    owner : array, int64 (N,)
        Place of each reconstruction's original.
    recognised : array, bool (N,)
    facts : mapping of str to array of str (N,)
        Of :data:`AXES`, where known.
    labels : array, int64 (M,), optional
        Class of each original.
    proxy : str
        Name of the classifier that answered; empty where people did.

    Raises DataError if they do not fit each other, or an original stands there twice.
    """

    originals: Tensor
    reconstructions: Tensor
    owner: NDArray[np.int64]
    recognised: NDArray[np.bool_]
    facts: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    labels: NDArray[np.int64] | None = None
    proxy: str = ""

    def __post_init__(self) -> None:
        many, shape = len(self.reconstructions), self.originals.shape[1:]
        if self.originals.ndim != 4 or self.reconstructions.shape[1:] != shape or shape[1] != shape[2]:
            raise DataError(
                f"originals of shape {tuple(self.originals.shape)} and reconstructions of shape "
                f"{tuple(self.reconstructions.shape)}: both must be (N, C, S, S) of one size"
            )
        for name, values in (("owner", self.owner), ("recognised", self.recognised), *self.facts.items()):
            if len(values) != many:
                raise DataError(f"{many} reconstructions need as many values of {name!r}; got {len(values)}")
        if many and not 0 <= self.owner.min() <= self.owner.max() < len(self.originals):
            raise DataError(f"'owner' must name one of {len(self.originals)} originals")
        if len(set(self.digests)) < len(self.originals):
            raise DataError("an original stands there twice: give it once, with all its reconstructions")

    def __len__(self) -> int:
        return len(self.reconstructions)

    @property
    def digests(self) -> tuple[str, ...]:
        """16 hexadecimal digits of the SHA-256 of each original's pixels as 8-bit values."""
        return tuple(image_digests(self.originals))

    def groups(self, by: tuple[str, ...]) -> NDArray[np.str_]:
        """The facts `by` of each reconstruction as one text, (N,); ConfigError where one is unknown."""
        for name in by:
            if name not in self.facts:
                raise ConfigError(f"'{name}' is not known of these ratings; known: {', '.join(self.facts)}")
        if not by:
            raise ConfigError(f"by what to group is left open; accepted: some of {', '.join(self.facts)}")
        return np.array([", ".join(row) for row in zip(*(self.facts[name] for name in by), strict=True)])

    def only(self, mask: NDArray[np.bool_]) -> Rated:
        """The reconstructions of a mask (N,), with the originals that they have."""
        kept = np.unique(self.owner[mask])
        place = torch.from_numpy(kept)
        return Rated(
            self.originals[place],
            self.reconstructions[torch.from_numpy(np.flatnonzero(mask))],
            np.searchsorted(kept, self.owner[mask]),
            self.recognised[mask],
            {name: values[mask] for name, values in self.facts.items()},
            None if self.labels is None else self.labels[kept],
            self.proxy,
        )

    def both(self) -> Rated:
        """The originals that have recognised and unrecognised reconstructions, with theirs."""
        count = len(self.originals)
        yes = np.bincount(self.owner[self.recognised], minlength=count) > 0
        no = np.bincount(self.owner[~self.recognised], minlength=count) > 0
        return self.only((yes & no)[self.owner])


def image_digests(images: Tensor) -> list[str]:
    """16 hexadecimal digits of the SHA-256 of each image's pixels as 8-bit values, for images in [0, 1]."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [hashlib.sha256(one.tobytes()).hexdigest()[:16] for one in pixels]


def held_out(rated: Rated, share: float, seed: int) -> NDArray[np.bool_]:
    """Which reconstructions, bool (N,), are of originals held out for a test: that share of the originals, drawn.

    An original is on one side with all its reconstructions. ConfigError unless both sides have one.
    """
    count = len(rated.originals)
    many = round(share * count)
    if not 0 < share < 1 or not 0 < many < count:
        raise ConfigError(
            f"{share:g} of {count} originals to hold out: at least one must be held out and one be left"
        )
    # By digest, so that the order of the files has no part in it.
    order = np.argsort(np.array(rated.digests))
    chosen = order[numpy_rng(seed, "semsim held out").permutation(count)[:many]]
    return np.isin(rated.owner, chosen)


def leave_one_out(
    rated: Rated, axis: str, share: float, seed: int
) -> Iterator[tuple[str, NDArray[np.bool_], NDArray[np.bool_]]]:
    """For each model, attack, ... (value of `axis`): its name, a mask to train on and one to test on, bool (N,).

    The test is of that value on held-out originals (:func:`held_out`), the training of all others on the rest.
    ConfigError with fewer than two values.
    """
    values = rated.groups((axis,))
    names = np.unique(values)
    if len(names) < 2:
        raise ConfigError(f"leaving one {axis} out: all ratings are of {', '.join(names) or 'none'}")
    tested = held_out(rated, share, seed)
    for name in names:
        yield str(name), (values != name) & ~tested, (values == name) & tested
