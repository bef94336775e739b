"""Updates and per-sample gradients, the plain way, for the tests of membership attacks."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedattack.observation import Candidates, Update


def as_update(tensors: dict[str, Tensor], kind: str) -> Update:
    values = torch.cat([t.flatten() for t in tensors.values()])
    return Update(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()), None, values, kind)


def top_k(update: Update, rate: float) -> Update:
    kept = max(1, round(rate * update.numel))
    indices = update.values.abs().topk(kept).indices.sort().values
    return replace(update, indices=indices, values=update.values[indices])


def gradients(model: nn.Module, state: dict[str, Tensor], candidates: Candidates) -> Tensor:
    """Per-sample gradients in double precision, one backward pass each, shape (N, P)."""
    own = {n for n, _ in [*model.named_parameters(), *model.named_buffers()]}  # a tied one once
    double = {n: t.double() if t.is_floating_point() else t for n, t in state.items() if n in own}
    rows = []
    for x, y in zip(candidates.images.double(), candidates.labels, strict=True):
        leaves = {
            n: double[n].clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad
        }
        loss = functional.cross_entropy(functional_call(model, {**double, **leaves}, (x[None],)), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))]))
    return torch.stack(rows)


def build_as(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in another precision."""
    return copy.deepcopy(model).to(dtype).eval()
