"""Patch embeddings with learned positions: where they lie in a vision transformer.

The token of patch t is ``z_t = W x_t + b + e_t`` with e_t its learned position. A position is added to one token
alone, so that its gradient is that token's, ``dL/de_t = dL/dz_t``, and the embedding's is
``dL/dW = sum_t dL/dz_t x_t'``: with one image in the batch every patch is a linear unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.inversion.evidence.first_layer import first_layer
from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.rng import torch_rng
from fedattack.task import trained_parameters

_EQUAL = 1e-4
"""Relative error below which two gradients of one thing, summed in another order, are the same."""


@dataclass(frozen=True)
class PatchEmbedding:
    """A convolution whose kernel is its stride, and positions that are added to its outputs.

    Attributes
    ----------
    weight, positions : str
        State-dict names of W, (D, C, p, p), and of the positions, whose last dimension is D.
    skipped : int
        Positions before that of the first patch (a class token's).
    size : int
        Side of a patch, p.
    rows, columns : int
        Of patches.
    width : int
        Numbers of a token, D.
    low, high : tuple of float
        What the convolution sees of a black and of a white pixel, by channel.
    """

    weight: str
    positions: str
    skipped: int
    size: int
    rows: int
    columns: int
    width: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def count(self) -> int:
        """Patches of an image."""
        return self.rows * self.columns

    def images(self, inputs: Tensor) -> Tensor:
        """Pixels (C, rows * p, columns * p) of the patches that the convolution saw, (patches, C * p * p)."""
        side = self.rows * self.size, self.columns * self.size
        seen = F.fold(inputs.T[None], side, self.size, stride=self.size)[0]
        low, high = (seen.new_tensor(one)[:, None, None] for one in (self.low, self.high))
        return (seen - low) / (high - low)

    def patches(self, images: Tensor) -> Tensor:
        """What the convolution sees of images (C, H, W): (patches, C * p * p); the inverse of :meth:`images`."""
        low, high = (images.new_tensor(one)[:, None, None] for one in (self.low, self.high))
        whole = (low + images * (high - low))[:, : self.rows * self.size, : self.columns * self.size]
        return F.unfold(whole[None], self.size, stride=self.size)[0].T


@lru_cache(maxsize=16)
def patch_embedding(model: ModelConfig) -> PatchEmbedding:
    """The patch embedding of a resolved model, found by trying it; NotApplicable where there is none like this."""
    refusal = f"model.name = {model.name!r}"
    with torch.random.fork_rng(devices=[]):
        module = build_model(model).eval()
    channels, side, _ = model.resolved
    generator = torch_rng(0, "patch embedding")
    trained = trained_parameters(module)
    with torch.no_grad():
        for parameter in module.parameters():  # behind a head of zeros all gradients would be zero
            if not bool(parameter.any()):
                parameter.normal_(0, 0.1, generator=generator)
    order: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    for name, part in module.named_modules():
        if list(part.parameters(recurse=False)):
            part.register_forward_hook(
                lambda part, inputs, output, name=name: order.append((name, part, inputs[0], output))
            )
    noise = torch.rand(1, channels, side, side, generator=generator)
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    for images in (torch.zeros_like(noise), torch.ones_like(noise), noise):
        order.clear()
        answer = module(images)
        seen.append(order[0])
    name, part, inputs, tokens = seen[-1]
    if f"{name}.weight" not in trained:
        raise NotApplicable(
            f"{refusal}: its first layer {name!r} is frozen, and this attack reads its gradient"
        )
    low, high = (one[2].mean((0, 2, 3)) if one[2].ndim == 4 else None for one in seen[:2])
    if (
        not isinstance(part, nn.Conv2d)
        or part.kernel_size[0] != part.kernel_size[1]
        or part.kernel_size != part.stride
        or (part.groups, part.dilation) != (1, (1, 1))
        or part.padding not in (0, (0, 0), "valid")
        or low is None
        or high is None
        or inputs.shape != noise.shape
        or not torch.allclose(
            inputs, low[:, None, None] + noise * (high - low)[:, None, None], rtol=1e-4, atol=1e-5
        )
    ):
        raise NotApplicable(
            f"{refusal} begins with {name!r}, {type(part).__name__}, which is neither an embedding of patches of the "
            "pixels nor a linear layer on the pixels; use --model mlp, or a vision transformer"
        )
    draws = torch.randn(answer.shape, generator=generator)
    names = [n for n, p in trained.items() if _fits(p, tokens)]
    slopes = torch.autograd.grad(
        (answer * draws).sum(), [tokens, *(trained[n] for n in names)], materialize_grads=True
    )
    wanted = slopes[0][0].flatten(1).T
    for positions, slope in zip(names, slopes[1:], strict=True):
        rows = slope.reshape(-1, slope.shape[-1])
        for skipped in range(len(rows) - len(wanted) + 1):
            error = (rows[skipped : skipped + len(wanted)] - wanted).norm()
            if float(error) <= _EQUAL * float(wanted.norm()) and f"{name}.weight" in trained:
                return PatchEmbedding(
                    f"{name}.weight",
                    positions,
                    skipped,
                    int(part.kernel_size[0]),
                    int(tokens.shape[2]),
                    int(tokens.shape[3]),
                    int(tokens.shape[1]),
                    tuple(low.tolist()),
                    tuple(high.tolist()),
                )
    raise NotApplicable(
        f"{refusal} embeds patches, and no learned position is added to each, whose gradient would be its token's; "
        "use a vision transformer that has them (vit)"
    )


@lru_cache(maxsize=16)
def embeds_patches(model: ModelConfig) -> bool:
    """Whether a resolved model begins with a :func:`patch_embedding`, and not with a linear layer."""
    for start, found in ((first_layer, False), (patch_embedding, True)):
        try:
            start(model)
        except NotApplicable:
            continue
        return found
    return False


def _fits(parameter: Tensor, tokens: Tensor) -> bool:
    """Whether a parameter could hold the positions of tokens (1, D, rows, columns)."""
    width = tokens.shape[1]
    return (
        parameter.ndim in (2, 3)
        and parameter.shape[-1] == width
        and parameter.numel() >= tokens.numel()
        and (parameter.ndim == 2 or parameter.shape[0] == 1)
    )
