"""The images that an attack on synthetic data is surest of, each beside the synthetic image that is most like it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adversaries.membership.synthetic.neighbours import nearest
from fedattack.audit import AuditResult


def nearest_pictures(result: AuditResult, synthetic: Tensor, device: torch.device) -> dict[str, Any]:
    """Kind of candidate -> "rows" of the most exposed, their "images", "synthetic" ones, and "distances" to these.

    Distances are Euclidean, of pixels in [0, 1]. Non-members are the floor: near ones among them are near by chance.
    """
    found = {}
    for kind, shown in result.curves["exposed"].items():
        distances, places = nearest(synthetic, shown["images"], 1, device)
        pairs = {"synthetic": synthetic[places[:, 0]], "distances": distances[:, 0].tolist()}
        found[kind] = dict(shown) | pairs
    return found
