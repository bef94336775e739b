"""Pictures that little is needed to learn: mixtures of four fixed ones."""

from __future__ import annotations

import torch
from hcgla_scenes import smooth_images
from torch import Tensor


def mixtures(count: int, size: int = 8, seed: int = 0) -> Tensor:
    """float32 (N, 3, S, S) in [0, 1]."""
    shares = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)).pow(4)
    shares = shares / shares.sum(1, keepdim=True)
    return torch.einsum("nk,kchw->nchw", shares, smooth_images(4, size, seed=123))
