"""Each image's own part of a least-squares problem that ties a batch together, factored: a preconditioner.

Where images below a convolution are solved for by its outputs and its gradient
(:mod:`adversaries.inversion.matching.positions`), what ties them to one another is weak beside what each one's own
equations say, and these are few enough to be written out: a matrix of pixels by pixels for each image. Conjugate
gradients on whitened images leave 3 % of the residual after 500 iterations; behind these factors, 1e-5 after 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.inversion.evidence.whitening import Whitening

MOST_NUMBERS = 4096
"""Of an image, up to which its matrix is worth factoring."""

MOST_BYTES = 2**30
"""Of a batch's factors."""

_PROBES = 192
_SLIGHT = 1e-3
"""Weight of an output, of the largest, and energy of the gradient's part, that are left out."""


def worthwhile(images: Tensor) -> bool:
    """Whether the factors of a batch (B, C, H, W) fit."""
    size = images[0].numel()
    return size <= MOST_NUMBERS and len(images) * size**2 * images.element_size() <= MOST_BYTES


@dataclass(frozen=True)
class Reach:
    """How far apart pixels are that no position of a map (h, w) sees together; all of them, where one sees all."""

    spacing: tuple[int, int]

    @classmethod
    def of(cls, given: Callable[[Tensor], Tensor], images: Tensor) -> Reach:
        """As seen at pixels in the middle of a few images (B, C, H, W)."""
        height, width = images.shape[2:]
        few = images[:4]
        rows, columns = (range(size // 2, min(size // 2 + 4, size)) for size in (height, width))
        pixels = [(r, c) for r in rows for c in columns]
        tangents = few.new_zeros(len(pixels), len(few), *few.shape[1:])
        for place, (r, c) in enumerate(pixels):
            tangents[place, :, :, r, c] = 1.0
        repeated = few.expand(len(pixels), -1, -1, -1, -1).flatten(0, 1)
        seen = _pushed(given, repeated, tangents.flatten(0, 1)) != 0
        seen = seen.unflatten(0, (len(pixels), len(few))).any(1).any(1)
        far = [0.0, 0.0]
        for place, pixel in enumerate(pixels):
            for axis, size in enumerate((height, width)):
                along = seen[place].any(1 - axis).nonzero()[:, 0].cpu()
                if len(along):
                    centres = _centres(seen.shape[1 + axis], size)[along]
                    far[axis] = max(far[axis], float((centres - pixel[axis]).abs().max()))
        spacing = [min(size, math.ceil(2 * f) + 2) for f, size in zip(far, (height, width), strict=True)]
        return cls((spacing[0], spacing[1]))


def _centres(count: int, size: int) -> Tensor:
    """Where `count` positions lie along `size` pixels."""
    return (torch.arange(count) + 0.5) * (size / count) - 0.5


def _pushed(given: Callable[[Tensor], Tensor], images: Tensor, tangents: Tensor) -> Tensor:
    """The derivative of a map along tangents, sample by sample."""
    images = images.detach().requires_grad_()
    found = given(images)
    zero = torch.zeros_like(found, requires_grad=True)
    (pulled,) = torch.autograd.grad(found, images, zero, create_graph=True)
    return torch.autograd.grad(pulled, zero, tangents)[0]


def jacobian(given: Callable[[Tensor], Tensor], image: Tensor, reach: Reach) -> Tensor:
    """(C H W, O, h, w): the derivative of a map (1, O, h, w) of an image (1, C, H, W), a row for each number."""
    channels, height, width = image.shape[1:]
    down, across = reach.spacing
    offsets = [(c, r, s) for c in range(channels) for r in range(down) for s in range(across)]
    found = None
    for first in range(0, len(offsets), _PROBES):
        part = offsets[first : first + _PROBES]
        tangents = image.new_zeros(len(part), *image.shape[1:])
        for place, (c, r, s) in enumerate(part):
            tangents[place, c, r::down, s::across] = 1.0
        answers = _pushed(given, image.expand(len(part), -1, -1, -1), tangents)
        high, wide = answers.shape[2:]
        if found is None:
            found = image.new_zeros(channels, height, width, high, wide, answers.shape[1])
        for answer, (c, r, s) in zip(answers, part, strict=True):
            rows = _nearest(_centres(high, height), r, down, height)[:, None]
            columns = _nearest(_centres(wide, width), s, across, width)[None]
            places = torch.arange(high)[:, None], torch.arange(wide)[None]
            found[c, rows, columns, places[0], places[1]] = answer.permute(1, 2, 0)
    assert found is not None
    return found.flatten(0, 2).permute(0, 3, 1, 2)


def _nearest(centres: Tensor, first: int, spacing: int, size: int) -> Tensor:
    """Of the pixels first, first + spacing, ..., the nearest to each centre."""
    steps = ((centres - first) / spacing).round().clamp(0, (size - 1 - first) // spacing)
    return (first + spacing * steps).long()


class Blocks:
    """The factors of a batch, and the preconditioner that they make.

    Parameters
    ----------
    prior : Whitening
    given : callable
        (B, C, H, W) -> (B, I, h, w): the convolution's inputs, of images.
    kernel : Tensor
        (O, I, k, l).
    settings : dict
        The convolution's stride, padding and dilation.
    """

    def __init__(
        self,
        prior: Whitening,
        given: Callable[[Tensor], Tensor],
        kernel: Tensor,
        settings: dict[str, Any],
        images: Tensor,
    ) -> None:
        self._prior, self._given, self._kernel, self._settings = prior, given, kernel, settings
        self._reach = Reach.of(given, images)
        size = images[0].numel()
        eye = torch.eye(size, dtype=images.dtype, device=images.device).view(size, *images.shape[1:])
        inverse = prior.whiten(eye + prior.mean).flatten(1)
        self._precision = inverse @ inverse.T
        self._factors: list[Tensor] = []

    def factor(self, images: Tensor, weights: Tensor, factors: Tensor, noise: Tensor) -> None:
        """Write out and factor each image's matrix.

        Parameters
        ----------
        images : Tensor
            (B, C, H, W).
        weights : Tensor
            (B, O, H', W'): of the convolution's outputs.
        factors : Tensor
            (B, O, H', W'): what inputs are multiplied by in the gradient of the convolution's weights.
        noise : Tensor
            (O,): variance of each channel's gradient.
        """
        self._factors = [
            self._factored(images[i : i + 1], weights[i], factors[i], noise) for i in range(len(images))
        ]

    @torch.no_grad()
    def __call__(self, whitened: Tensor) -> Tensor:
        """The inverse of the matrices, on whitened images (B, C, H, W)."""
        right = self._prior.unwhiten_adjoint(whitened).flatten(1)[..., None]
        solved = [
            torch.linalg.solve_triangular(
                lower.T, torch.linalg.solve_triangular(lower, one, upper=False), upper=True
            )
            for lower, one in zip(self._factors, right, strict=True)
        ]
        return self._prior.whiten(torch.stack(solved).view_as(whitened) + self._prior.mean)

    def _factored(self, image: Tensor, weights: Tensor, factors: Tensor, noise: Tensor) -> Tensor:
        matrix = self._precision.clone()
        rows = jacobian(self._given, image, self._reach)
        with torch.no_grad():
            heavy = weights.flatten() > _SLIGHT * weights.max()
            outputs = [
                F.conv2d(part, self._kernel, **self._settings).flatten(1)[:, heavy]
                for part in rows.split(_PROBES)
            ]
            seen = torch.cat(outputs) * weights.flatten()[heavy].sqrt()
            matrix.addmm_(seen, seen.T)
            root = self._root(factors, noise, (rows.shape[2], rows.shape[3]))
            seen = (rows.flatten(2) @ root).flatten(1)
            matrix.addmm_(seen, seen.T)
            scale = float(matrix.diagonal().mean())
            for attempt in range(6):
                lower, failed = torch.linalg.cholesky_ex(matrix)
                if not int(failed):
                    return lower
                matrix.diagonal().add_(1e-7 * 10**attempt * scale)
            # Whatever is positive serves: a poorer preconditioner changes the solution's cost, not the solution.
            return matrix.diagonal().sqrt().diag()

    def _root(self, factors: Tensor, noise: Tensor, size: tuple[int, int]) -> Tensor:
        """R (h w, r), so that a plane p of the inputs weighs |p R|^2 in the gradient of its kernels."""
        flat = factors.flatten(1)
        weighed = flat.T @ (flat / noise[:, None])
        places = torch.arange(1, size[0] * size[1] + 1, dtype=flat.dtype, device=flat.device)
        columns = F.unfold(
            places.view(1, 1, *size),
            self._kernel.shape[2:],
            self._settings["dilation"],
            self._settings["padding"],
            self._settings["stride"],
        )[0].long()
        total = flat.new_zeros(len(places), len(places))
        for one in columns:
            inside = one > 0
            at = one[inside] - 1
            total[at[:, None], at[None]] += weighed[inside][:, inside]
        values, vectors = torch.linalg.eigh(total)
        kept = values > _SLIGHT * values[-1]
        return vectors[:, kept] * values[kept].sqrt()
