"""Whether a generator still makes different images, or the same ones again and again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REPETITION = 0.01
"""Share of the typical distance between real images below which two images are one picture.

Grey images of full contrast lie about .4 apart, root mean square over the pixels: a hundredth is .004, one of the
256 levels that a pixel has in a file.
"""

LEAST_DISTINCT, LEAST_SPREAD = 0.5, 0.1
"""A generator has collapsed where most of its images repeat one another, or differ ten times less than real ones."""


@dataclass(frozen=True)
class Diversity:
    """`distinct`: share of `samples` images that repeat no earlier one; `spread`: their median distance over that of
    real images."""

    samples: int
    distinct: float
    spread: float

    @property
    def collapsed(self) -> bool:
        """Whether the generator makes few different images."""
        return not (self.distinct >= LEAST_DISTINCT and self.spread >= LEAST_SPREAD)

    @property
    def text(self) -> str:
        """In words, with a warning where there is one."""
        text = (
            f"{self.distinct:.1%} of {self.samples:,} samples are distinct, typically {self.spread:.2f} times as far "
            "apart as real images"
        )
        return f"the generator collapsed: {text}" if self.collapsed else text


def diversity(made: Tensor, real: Tensor) -> Diversity:
    """Of generated images (n, ...), beside real ones (m, ...) of the same shape and scale; n and m at least 2.

    An image is a repetition if an earlier one is nearer than :data:`REPETITION` times the median distance between
    real images. n^2 and m^2 distances are held at once.
    """
    among, typical = _distances(made), _upper(_distances(real)).median()
    first = torch.ones(len(made), dtype=torch.bool)
    first[1:] = ~(among.tril(-1) + torch.full_like(among, torch.inf).triu() < REPETITION * typical).any(1)[1:]
    spread = float(_upper(among).median() / typical) if typical > 0 else float("nan")
    return Diversity(len(made), float(first.double().mean()), spread)


def _distances(images: Tensor) -> Tensor:
    flat = images.flatten(1).double()
    return torch.cdist(flat, flat)


def _upper(distances: Tensor) -> Tensor:
    count = len(distances)
    row, column = torch.triu_indices(count, count, 1)
    return distances[row, column]
