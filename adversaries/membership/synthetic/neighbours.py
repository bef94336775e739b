"""Nearest neighbours among images, exact also where they are duplicates."""

from __future__ import annotations

import torch
from torch import Tensor

from fedattack.errors import NotApplicable

_QUERIES, _POINTS, _EXACT = 512, 4096, 64
"""Rows of the matrix of distances that is held at once, its columns, and rows whose distances are taken exactly."""
_SPARE = 8
"""Further neighbours whose distances are taken exactly, since rounding may have put them behind others."""


def nearest(points: Tensor, queries: Tensor, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Euclidean distances, float64 (Q, count), ascending, and places in `points`, int64; on the CPU.

    Of points at one distance the earlier comes first, as long as no more than 8 others are as far as the last one.
    NotApplicable with fewer points than `count`.
    """
    if len(points) < count:
        raise NotApplicable(f"{len(points)} synthetic images, and {count} nearest are asked for")
    flat, asked = points.flatten(1).to(device), queries.flatten(1).to(device)
    lengths, kept = torch.linalg.vector_norm(flat, dim=1).square(), min(count + _SPARE, len(flat))
    distances, places = [], []
    for some in asked.split(_QUERIES):
        best = near = None
        for start in range(0, len(flat), _POINTS):
            part = slice(start, start + _POINTS)
            squares = torch.addmm(lengths[part], some, flat[part].T, alpha=-2)
            found, place = squares.topk(min(kept, squares.shape[1]), largest=False, sorted=False)
            place += start
            if best is not None and near is not None:
                found, which = torch.cat([best, found], 1).topk(kept, largest=False, sorted=False)
                place = torch.cat([near, place], 1).gather(1, which)
            best, near = found, place
        assert near is not None
        near = near.sort(dim=1).values
        # |q|^2 + |g|^2 - 2 q.g cancels where both are alike, so the winners' distances are taken anew.
        pairs = zip(some.split(_EXACT), near.split(_EXACT), strict=True)
        exact = torch.cat([(flat[which] - one[:, None]).double().norm(dim=2) for one, which in pairs])
        exact, order = exact.sort(dim=1, stable=True)
        distances.append(exact[:, :count].cpu())
        places.append(near.gather(1, order[:, :count]).cpu())
    return torch.cat(distances), torch.cat(places)


def within(points: Tensor, queries: Tensor, radius: float, device: torch.device) -> Tensor:
    """How many points are no further than `radius`, up to rounding, int64 (Q,); on the CPU."""
    asked = queries.flatten(1).to(device).double()
    found = torch.zeros(len(asked), dtype=torch.int64, device=device)
    for part in points.flatten(1).split(_POINTS):
        some = part.to(device).double()
        for place, one in enumerate(asked.split(_QUERIES)):
            near = torch.cdist(one, some) <= radius * (1 + 1e-9) + 1e-9
            found[place * _QUERIES : place * _QUERIES + len(one)] += near.sum(1)
    return found.cpu()
