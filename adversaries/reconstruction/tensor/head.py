"""The wide two-layer head: what is known of it, the gradient that a batch would cause, and its labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.inversion.gradients.activations import ACTIVATIONS
from adversaries.inversion.gradients.closed_form import Activation
from fedattack.errors import NotApplicable

_MOST_COPIES = 16


@dataclass(frozen=True)
class TwoLayerHead:
    """Known weights of ``z = A s(W x)`` with ``A = v a'``, float64 on one device.

    `wide` is W (m, d), `head` A (C, m), `scale` a (m,), `name` the activation's, and `row` v (C,): which mixture of
    the softmax residuals ``delta`` the wide layer's gradient holds, ``r_i = v . delta_i``.
    """

    wide: Tensor
    head: Tensor
    row: Tensor
    scale: Tensor
    name: str

    @property
    def activation(self) -> Activation:
        """s with its first two derivatives."""
        return ACTIVATIONS[self.name]

    @property
    def width(self) -> int:
        """Hidden neurons (m)."""
        return len(self.wide)

    @property
    def inputs(self) -> int:
        """Inputs of the wide layer (d)."""
        return self.wide.shape[1]

    @property
    def classes(self) -> int:
        """Classes (C)."""
        return len(self.head)

    @classmethod
    def of(cls, wide: Tensor, head: Tensor, name: str) -> TwoLayerHead:
        """The head of weights that were sent out; NotApplicable where A is not of rank one: residuals then cancel."""
        wide, head = wide.double(), head.double()
        first = head[head.norm(dim=1).argmax()]
        square = first.square().sum()
        if not float(square) > 0:
            raise NotApplicable("the head that was sent is zero: the wide layer gets no gradient")
        row = head @ first / square
        if float((head - torch.outer(row, first)).norm()) > 1e-6 * float(head.norm()):
            raise NotApplicable(
                "the head that was sent has more than one direction (an honest server's): one gradient then mixes "
                "the samples' residuals differently in each neuron; let the server send the attack's weights "
                "(attack.names with 'tensor' arms the rounds in attack.rounds)"
            )
        return cls(wide, head, row, first, name)

    def logits(self, inputs: Tensor) -> Tensor:
        """z (B, C) at x (B, d)."""
        return self.activation.value(inputs @ self.wide.T) @ self.head.T

    def gradient(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the mean cross-entropy: of W (m, d) and of A (C, m)."""
        u = inputs @ self.wide.T
        hidden = self.activation.value(u)
        delta = (hidden @ self.head.T).softmax(1)
        delta = delta - torch.nn.functional.one_hot(labels, self.classes).to(delta.dtype)
        back = (delta @ self.head) * self.activation.slope(u)
        return back.T @ inputs / len(inputs), delta.T @ hidden / len(inputs)


@dataclass(frozen=True)
class Labelled:
    """Labels read from the head's gradient.

    `counts`, int64 (B, C): how many samples of each class lie at each recovered input, one for samples that differ;
    `doubt`: largest distance of a count from an integer.
    """

    counts: Tensor
    doubt: float

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Positions of the inputs and labels, int64, one per sample."""
        total = self.counts.sum(1)
        positions = torch.repeat_interleave(torch.arange(len(total)), total.cpu())
        labels = torch.cat([torch.repeat_interleave(torch.arange(len(c)), c) for c in self.counts.cpu()])
        return positions, labels


def residuals_of(head: TwoLayerHead, inputs: Tensor, gradient: Tensor, samples: int) -> Tensor:
    """Softmax residuals Delta (B, C), summed over equal samples, by least squares on the head's gradient (C, m)."""
    hidden = head.activation.value(inputs @ head.wide.T)
    scale = hidden.norm(dim=1, keepdim=True).clamp_min(1e-300)
    solution = torch.linalg.lstsq((hidden / scale).T, samples * gradient.T).solution
    return solution / scale


def read_labels(head: TwoLayerHead, inputs: Tensor, delta: Tensor) -> Labelled:
    """Labels from residuals (B, C): ``Delta_i = n p_i - counts_i``, with p_i from the forward pass and n copies."""
    p = head.logits(inputs).softmax(1)
    copies = torch.arange(1, _MOST_COPIES + 1, dtype=p.dtype, device=p.device)[:, None, None]
    counts = copies * p - delta
    rounded = counts.round().clamp_min(0)
    distance = (counts - rounded).abs().amax(2) + (rounded.sum(2) != copies[:, :, 0]) * 1e3
    # The fewest copies that explain it: more only fit better by chance.
    good = distance < 0.05
    chosen = torch.where(good.any(0), good.int().argmax(0), torch.zeros_like(good[0], dtype=torch.int64))
    picked = rounded[chosen, torch.arange(len(inputs), device=p.device)].long()
    bad = ~good.any(0)
    picked[bad] = torch.nn.functional.one_hot(delta[bad].argmin(1), head.classes)
    doubt = distance[chosen, torch.arange(len(inputs), device=p.device)].max()
    return Labelled(picked, float(doubt.clamp(max=1.0)))


def fix_scales(head: TwoLayerHead, directions: Tensor, gradient: Tensor, samples: int) -> Tensor:
    """Norms (B,) of samples along unit directions (B, d) where the activation is homogeneous, from cross-entropy.

    The wide layer's gradient gives only r_i x_i. The head's (C, m) gives ``n_i delta_i``, and ``delta_i = p(n_i) -
    e_y`` with p(n) = softmax(n v k_i) is a curve that is met in one point (below its maximum, where two of
    different norm can be, the smaller is taken).
    """
    scaled = residuals_of(head, directions, gradient, samples)
    k = head.activation.value(directions @ head.wide.T) @ head.scale
    label = torch.nn.functional.one_hot(scaled.argmin(1), head.classes).to(scaled.dtype)

    def misfit(n: Tensor) -> Tensor:
        p = (n[:, :, None] * k[:, None, None] * head.row).softmax(2)
        model = n[:, :, None] * (p - label[:, None])
        return (model - scaled[:, None]).square().sum(2) / scaled.square().sum(1)[:, None]

    grid = torch.logspace(-2, 4, 6001, dtype=scaled.dtype, device=scaled.device).expand(len(scaled), -1)
    values = misfit(grid)
    inner = values[:, 1:-1]
    dips = (inner <= values[:, :-2]) & (inner <= values[:, 2:])
    floor = torch.where(dips, inner, torch.full_like(inner, torch.inf)).amin(1, keepdim=True)
    first = (dips & (inner <= 100 * floor + 1e-4)).int().argmax(1) + 1
    low = grid.gather(1, (first - 1)[:, None])[:, 0]
    high = grid.gather(1, (first + 1).clamp(max=grid.shape[1] - 1)[:, None])[:, 0]
    return golden_section(lambda n: misfit(n[:, None])[:, 0], low, high, 80)


def golden_section(cost: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Where each of B functions, of one argument (B,) each, is least between `low` and `high`."""
    golden = (5**0.5 - 1) / 2
    for _ in range(steps):
        left, right = high - golden * (high - low), low + golden * (high - low)
        better = cost(left) < cost(right)
        low, high = torch.where(better, low, left), torch.where(better, right, high)
    return (low + high) / 2
