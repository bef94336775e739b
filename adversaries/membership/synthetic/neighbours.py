"""Nearest neighbours among images, exact also where they are duplicates."""

from __future__ import annotations

import torch
from torch import Tensor

from fedattack.errors import NotApplicable

_QUERIES = 256


def nearest(points: Tensor, queries: Tensor, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Euclidean distances, float64 (Q, count), ascending, and places in `points`, int64; on the CPU.

    NotApplicable with fewer points than `count`.
    """
    if len(points) < count:
        raise NotApplicable(f"{len(points)} synthetic images, and {count} nearest are asked for")
    flat = points.flatten(1).to(device)
    lengths = flat.square().sum(1)
    distances, places = [], []
    for some in queries.flatten(1).to(device).split(_QUERIES):
        near = torch.addmm(lengths, some, flat.T, alpha=-2).topk(count, largest=False).indices
        # |q|^2 + |g|^2 - 2 q.g cancels where both are alike, so the winners' distances are taken anew.
        exact = (flat[near].double() - some[:, None].double()).norm(dim=2)
        exact, order = exact.sort(dim=1)
        distances.append(exact.cpu())
        places.append(near.gather(1, order).cpu())
    return torch.cat(distances), torch.cat(places)
