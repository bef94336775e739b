"""Disaggregating a low-rank gradient: the directions in which its factor is sparse.

The gradient of a layer before a ReLU is ``G = D' X`` with D = dL/dz (B x m) and X (B x d). An SVD gives G = U S V'
with B columns, so D' = U Q for some Q (B x B), and X = Q^-1 S V'. Column i of U Q is zero for every neuron that is
inactive at sample i, about half of them, which hardly any other direction q has.

Two ways to find such a q:

"published" (Dimitrov et al. 2024): B - 1 random rows of U have a kernel vector; if their neurons are all inactive at
one sample, a chance of about ``B / 2^(B-1)``, it is that sample's.

"guided": the sender of the weights W knows which neurons are likely to be inactive together. From a random direction
v of the batch's span, take the neurons with the lowest w.v; the q that they leave smallest tells for all neurons
which are likely inactive, and the difference between the sums of the active and the inactive w is a better v, since
a half-space of weights points to its sample. A few turns of that end in a sample's own q or nowhere, and B of 100
takes seconds where random rows would take 2^99 draws. Two things make it work on trained layers, whose inputs are
much alike: inputs that cannot be below zero (behind a ReLU, or pixels) draw v to the cone of those that are not, and
one half of the starts keeps to where the samples not yet found must lie, orthogonal to S^-1 q of the others.

References
----------
Dimitrov, Baader, Mueller, Vechev, "SPEAR: Exact Gradient Inversion of Batches in Federated Learning", NeurIPS 2024.
The guided search is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["guided", "published"]

ZERO = 50.0
"""Entries of U q below so many standard deviations of their noise are zero."""

_TURNS = 8
_SHARES = (2.0, 1.0, 3.0, 1.5, 4.0)
_FIRST_CLIPS = 20
_CLIPS = 3
_DRAWS = 20_000
_EXTRA = 1
_DOUBTFUL = 100
_JUDGED = 32
_RESORT = 6
_LOOSE = (1e-4, 1e-5, 1e-6, 1e-7)
_FLOOR = 2.0**-24


@dataclass(frozen=True)
class Factors:
    """``G = left diag(values) right`` for the rows of G that are not zero up to noise, float64 on one device."""

    left: Tensor  # U, (m, B)
    values: Tensor  # S, (B,), descending
    right: Tensor  # V', (B, d)
    neurons: Tensor  # the layer's weights in the span, W V, (K, m, B): K states of them
    noise: Tensor  # (m,): deviation of the noise of an entry of G, by row, from what lies outside the span
    alive: Tensor  # bool: the rows of G that are not zero
    positive: bool = False  # whether no entry of X is below zero

    @classmethod
    def of(cls, gradient: Tensor, weights: Tensor, basis: Tensor, positive: bool = False) -> Factors:
        """Factors of a gradient (m, d) whose rows are spanned by the orthonormal columns of `basis` (d, B).

        `weights` are (m, d), or (K, m, d): states that the layer went through while the gradient was summed.
        """
        inside = gradient @ basis
        outside = (gradient - inside @ basis.T).norm(dim=1) / max(1, basis.shape[0] - basis.shape[1]) ** 0.5
        # Rounding that happens to vanish in a row says nothing about the row.
        noise = outside.maximum(1e-3 * _FLOOR * gradient.norm(dim=1) / gradient.shape[1] ** 0.5)
        alive = inside.norm(dim=1) > ZERO * noise * basis.shape[1] ** 0.5
        left, values, turn = torch.linalg.svd(inside[alive], full_matrices=False)
        right = turn @ basis.T
        states = weights.reshape(-1, *weights.shape[-2:])[:, alive]
        return cls(left, values, right, states @ right.T, noise[alive], alive, positive)

    @property
    def samples(self) -> int:
        """B."""
        return len(self.values)

    def completed(self, found: Found) -> Tensor:
        """The inputs, a row (1, d) up to scale, of the one sample that B - 1 directions leave."""
        rest = torch.linalg.qr((found.directions / self.values).T, mode="complete").Q[:, -1:].T
        return rest @ self.right

    def clipped(self, v: Tensor, times: int) -> Tensor:
        """Vectors of the span (n, B), nearer to those whose entries are not below zero, where X has none that are."""
        if self.positive:
            for _ in range(times):
                v = (v @ self.right).clamp_min(0) @ self.right.T
        return v


@dataclass
class Found:
    """Directions in the order of their zeros."""

    directions: Tensor  # unit q, (n, B)
    zeros: Tensor  # bool (n, m): where U q is zero up to noise
    firm: Tensor  # bool (n,): whether more than one row decides the direction

    def __getitem__(self, rows: Tensor) -> Found:
        return Found(self.directions[rows], self.zeros[rows], self.firm[rows])

    def __len__(self) -> int:
        return len(self.directions)


class Search:
    """Collects sparse directions until B independent ones are there; the generator is on the CPU."""

    def __init__(self, factors: Factors, method: Method, generator: torch.Generator) -> None:
        self._factors, self._method, self._generator = factors, method, generator
        self._rows = factors.left / factors.left.norm(dim=1, keepdim=True)
        nothing = torch.zeros_like(factors.left[:0, 0], dtype=torch.bool)
        self._pool = Found(factors.left[:0], nothing[:, None].expand(0, len(factors.left)), nothing)
        self.draws = 0

    def collect(self, rounds: int, accept: Callable[[Found], bool]) -> Found:
        """Draw in rounds until `accept` says True to the independent directions with the most zeros, B or fewer.

        Answers the last of these.
        """
        best = self._best()
        if self._factors.samples == 1:
            only = torch.ones_like(self._factors.values)
            self._keep(only, self._zeros(only[None]), True)
            return self._pool
        easy = expected_draws(self._factors.samples) < _DRAWS
        for turn in range(rounds):
            # Few neurons can hide a small batch's sample from the guided search.
            if self._method == "published" or (turn % _RESORT == _RESORT - 1 and easy):
                self._random_rows()
            else:
                neurons = self._factors.neurons[turn % len(self._factors.neurons)]
                self._guided(_SHARES[turn % len(_SHARES)], best, neurons)
            best = self._best()
            if accept(best):
                break
        return best

    def _random_rows(self) -> None:
        size, count = self._factors.samples, len(self._rows)
        for draws in (_DRAWS // 4,) * 4:
            picked = torch.randint(count, (draws, size - 1), generator=self._generator).to(self._rows.device)
            kernel = torch.linalg.qr(self._rows[picked].transpose(1, 2), mode="complete").Q[:, :, -1]
            self.draws += draws
            self._add(kernel)

    def _guided(self, share: float, best: Found, neurons: Tensor) -> None:
        """From directions of the span to q and back; half of the starts avoid the samples that are known."""
        size, count = self._factors.samples, len(self._rows)
        starts = max(64, 4 * size)
        v = torch.randn(starts, size, generator=self._generator, dtype=self._rows.dtype).to(self._rows.device)
        v *= self._factors.values
        # The others' inputs lie in the directions' dual, whatever these others are.
        known = torch.linalg.qr((best.directions[best.firm] / self._factors.values).T).Q
        v[::2] -= v[::2] @ known @ known.T
        if len(best) == size:
            # One wrong direction spoils the others' inputs, while its own still points to its sample.
            v[1 : 2 * size : 2] = torch.linalg.inv(best.directions).T * self._factors.values
        v *= torch.where(v @ self._factors.right[:, -1:] < 0, -1.0, 1.0).to(v)  # the last input is 1
        v = self._factors.clipped(v, _FIRST_CLIPS)
        least = min(int(share * size), count)
        for _ in range(_TURNS):
            lowest = (v @ neurons.T).topk(least, dim=1, largest=False).indices
            rows = self._rows[lowest]
            q = torch.linalg.eigh(rows.transpose(1, 2) @ rows).eigenvectors[:, :, 0]
            self.draws += starts
            self._add(q)
            size_of = (q @ self._rows.T).abs()
            middle = size_of.median(1, keepdim=True).values.clamp_min(1e-300)
            v = self._factors.clipped(torch.tanh(size_of / middle - 1) @ neurons, _CLIPS)
            v[::2] -= v[::2] @ known @ known.T

    def _zeros(self, q: Tensor, loose: float = 0.0) -> Tensor:
        """Where U q is zero up to noise, or below the share `loose` of its median; bool (n, m), for unit q (n, B)."""
        entries = (q @ self._factors.left.T).abs()
        level = ZERO * (q / self._factors.values).norm(dim=1, keepdim=True) * self._factors.noise
        return entries < level.maximum(loose * entries.median(1, keepdim=True).values)

    def _add(self, q: Tensor) -> None:
        """Keep those directions that are zero for more neurons than a direction can be made to be."""
        needed = self._factors.samples - 1 + _EXTRA
        counts = self._zeros(q, _LOOSE[0]).sum(1)
        order = counts.argsort(descending=True, stable=True)[: _JUDGED * self._factors.samples]
        for direction in _distinct(q[order[counts[order] >= needed]]):
            if bool(((self._pool.directions @ direction).abs() > 1 - 1e-6).any()):
                continue
            values = direction[:0]
            for loose in _LOOSE:
                rows = self._rows[self._zeros(direction[None], loose)[0]]
                values, vectors = torch.linalg.eigh(rows.T @ rows)
                direction = vectors[:, 0]
            zeros = self._zeros(direction[None])
            if int(zeros.sum()) >= needed:
                # A mixture of samples is zero beyond their common zeros by one row for each sample more: without
                # that row, of length 1, it is not determined.
                self._keep(direction, zeros, len(values) == 1 or float(values[1]) > 1)

    def _keep(self, direction: Tensor, zeros: Tensor, firm: bool) -> None:
        """Into the pool; of directions that one row decides, only those with the most zeros."""
        pool = self._pool
        pool.directions = torch.cat([pool.directions, direction[None]])
        pool.zeros = torch.cat([pool.zeros, zeros])
        pool.firm = torch.cat([pool.firm, torch.tensor([firm], device=zeros.device)])
        loose = torch.nonzero(~pool.firm)[:, 0]
        if len(loose) > _DOUBTFUL * len(direction):
            kept = torch.ones_like(pool.firm)
            kept[loose[pool.zeros[loose].sum(1).argmin()]] = False
            self._pool = pool[kept]

    def _best(self) -> Found:
        """Independent directions, the firm ones first, then those with the most zeros.

        A mixture of two samples' directions is zero where both are, so it has fewer zeros than either.
        """
        worth = self._pool.zeros.sum(1) + self._pool.firm * self._pool.zeros.shape[1]
        order = worth.argsort(descending=True, stable=True).tolist()
        basis = self._pool.directions[:0]
        chosen = []
        for place in order:
            direction = self._pool.directions[place]
            rest = direction - (direction @ basis.T) @ basis
            rest = rest - (rest @ basis.T) @ basis
            if float(rest.norm()) > 1e-4:
                chosen.append(place)
                basis = torch.cat([basis, rest[None] / rest.norm()])
            if len(chosen) == self._factors.samples:
                break
        return self._pool[torch.tensor(chosen, dtype=torch.int64, device=basis.device)]


def _distinct(q: Tensor) -> list[Tensor]:
    """Unit vectors (n, B) without repetitions up to sign."""
    kept: list[Tensor] = []
    left = q
    while len(left):
        kept.append(left[0])
        left = left[(left @ left[0]).abs() < 1 - 1e-6]
    return kept


def expected_draws(samples: int) -> float:
    """Draws until random rows have found every sample, on average: half of the neurons are inactive at each."""
    return 2.0 ** (samples - 1) * sum(1 / n for n in range(1, samples + 1)) if samples < 1000 else math.inf
