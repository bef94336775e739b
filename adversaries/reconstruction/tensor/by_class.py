"""Inputs from the head's whole gradient, one class at a time.

A class's row is ``sum_i (p_ic - [y_i = c]) s(W x_i)' / B``. Where the head's output goes into one class, all others
have the same probability, and a row of one without samples, taken from that of one with samples, leaves ``sum_(y_i =
c) s(W x_i)``: the samples of a class by themselves, with a tenth of the equations and without the softmax. How many
they are is the least number that explains it, so that labels need no guess. What their part leaves of the row of a
class without samples is the part of those of the head's own class, each weighed by a probability.

Each sum is solved from many starts, by damped Gauss-Newton steps. What one input in the place of n leaves of a sum
is of second order in their differences d, ``s''(w . mean) sum_i (w . d_i)^2 / 2``: as in phase retrieval the leading
eigenvectors of the neurons' second moment, with these weights, span the differences roughly, and better if large
weights are cut off (Chen, Candes 2015). Starts are drawn in the span of a few, where steps are cheap, and the best is
carried to the whole space.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adversaries.inversion.solvers.levenberg_marquardt import Damping, Step, levenberg_marquardt, normal_steps
from adversaries.reconstruction.tensor.head import TwoLayerHead

_SOLVED = 1e-5
"""Relative residual of a sum whose inputs are found."""

_MOST_UNKNOWNS = 3200
"""Up to this many unknowns of a class the normal equations are formed."""

_EQUAL = 1e-5
"""Difference of rows of the head's gradient that is rounding, over the norm of the largest."""

_ROUND = 3
_ROUNDS = 10
"""Starts of each number of samples before the next number's turn, and turns."""

_MOST_WORK = 1e10
"""Multiplications in one J'J of each start, summed, up to which there are as many turns."""

_BOUNDS = (3.0, 1.0, 10.0)
"""Means of the absolute weights at which they are cut off, in turn: the best one depends on the batch."""

_WIDTHS = (2, 3, 4, 6)
_DRAWS = 2
_ROUGH = 1e-3
"""Draws in the narrowest span, and the gain of a step there that ends a search."""

_DAMPING = Damping(1e-2, least=1e-10, rise=6.0, fall=0.1, slow=0.4, tries=6)


@dataclass(frozen=True)
class ClassSum:
    """``sum_i k_i s(W x_i)`` (m,) over the samples of a class, each counted `copies` times.

    `wanted` (m,): what it should be. k_i is 1, or with `weigher` the probability of that class at x_i: the samples'
    part in that class's row, where no sample has it.
    """

    head: TwoLayerHead
    wanted: Tensor
    weigher: int | None = None
    copies: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """The sum at x (n, d)."""
        return self.at(x)[0]

    def at(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """The sum at x (n, d), and its Jacobian there (m, n d), on demand."""
        head = self.head
        u = x @ head.wide.T
        hidden, slope = head.activation.value(u), head.activation.slope(u)
        k = torch.ones_like(u[:, :1])
        turn = torch.zeros_like(k)
        if self.weigher is not None:
            p = (hidden @ head.head.T).softmax(1)
            k = p[:, [self.weigher]]
            turn = k * (head.row[self.weigher] - p @ head.row)[:, None]

        def jacobian() -> Tensor:
            direct = (k * slope).T[:, :, None] * head.wide[:, None]
            if self.weigher is not None:
                direct = direct + hidden.T[:, :, None] * (turn * ((slope * head.scale) @ head.wide))
            return self.copies * direct.reshape(len(head.wide), -1)

        return self.copies * (k * hidden).sum(0), jacobian

    def within(self, basis: Tensor) -> ClassSum:
        """The same sum, of inputs in the span of `basis` (d, q) by their coordinates."""
        return replace(self, head=replace(self.head, wide=self.head.wide @ basis))

    def fit(self, start: Tensor, iterations: int = 60, gain: float = 1e-4) -> tuple[Tensor, float]:
        """Inputs (n, d) from `start`, and the relative residual there."""

        def linearise(x: Tensor) -> tuple[Tensor, Callable[[float], Step]]:
            value, jacobian = self.at(x)
            left = self.wanted - value

            def prepare(_: float) -> Step:
                rows = jacobian()
                # float32: a step with four right digits costs half, and the residual is float64's.
                low = rows.float()
                gram, right = (low.T @ low).double(), rows.T @ left
                return normal_steps(gram, right, x.shape)

            return left, prepare

        norm = float(self.wanted.norm().clamp_min(1e-300))
        x, left, _ = levenberg_marquardt(
            linearise, start, iterations, _DAMPING, settled=1e-7 * norm, gain=gain, trusted=1e-3
        )
        return x, float(left.norm()) / norm


def solve(
    head: TwoLayerHead, gradient: Tensor, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """Labels (B,) and inputs (B, d) from the head's gradient (C, m) of the mean loss; None where a class is left.

    None, too, where there are no two classes without samples to be told by their equal rows, as under noise.
    """
    own = int(head.row.abs().argmax())
    rest = [c for c in range(head.classes) if c != own]
    rows = samples * gradient[rest]
    tolerance = _EQUAL * float(rows.norm(dim=1).max())
    if float((head.row[rest] - head.row[rest[0]]).abs().max()) > 1e-6 * float(head.row.abs().max()):
        return None
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    empty = int((apart <= tolerance).sum(1).argmax())
    if int((apart[empty] <= tolerance).sum()) < 2:
        return None
    present = torch.nonzero(apart[empty] > tolerance).flatten().tolist()
    inputs, left = [head.wide[:0]], rows[empty]
    labels: list[int] = []
    for place, number in enumerate(present):
        most = samples - len(labels) - (len(present) - place - 1)
        found = _least(ClassSum(head, rows[empty] - rows[number]), range(1, most + 1), generator)
        if found is None:
            return None
        inputs.append(found)
        labels += [rest[number]] * len(found)
        # What the others leave of the empty class's row is of the head's own class.
        left = left - ClassSum(head, left, rest[empty])(found)
    others = samples - len(labels)
    if others > 0 and float(left.norm()) > tolerance:
        found = _least(ClassSum(head, left, rest[empty]), range(others, others + 1), generator)
        if found is None:
            return None
        inputs.append(found)
    elif others > 0:
        inputs.append(torch.zeros_like(head.wide[:1]).expand(others, -1))
    named = torch.tensor(labels + [own] * others, dtype=torch.int64, device=head.wide.device)
    return named, torch.cat(inputs)


def _least(function: ClassSum, numbers: range, generator: torch.Generator) -> Tensor | None:
    """Inputs (n, d) of a class's sum, n the least of `numbers` that explains it; all get their starts in turn."""
    width, dimension = function.head.wide.shape
    tried = [n for n in numbers if n * dimension <= min(width, _MOST_UNKNOWNS)]
    sources = {n: starts(function, n, generator) for n in tried}
    work = sum(width * (n * dimension) ** 2 for n in tried)
    rounds = max(1, min(_ROUNDS, int(_MOST_WORK / (_ROUND * max(work, 1)))))
    for _, n in itertools.product(range(rounds), tried):
        for start in itertools.islice(sources[n], _ROUND if n > 1 else 1):
            inputs, residual = function.fit(start)
            if residual <= _SOLVED:
                return inputs
    return None


def starts(function: ClassSum, number: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Starting inputs (n, d) of a class's sum: one from the neurons' average, several in the differences' span."""
    mean = _mean(function, number)
    if number == 1:
        yield mean
        while True:
            yield _disturbed(function, mean, generator)
    bases = [_differences(function, mean, number, bound) for bound in _BOUNDS]
    for basis, width in zip(itertools.cycle(bases), itertools.cycle(_WIDTHS)):
        narrow = basis[:, : width * (number + 1)]
        inside, at = function.within(narrow), (mean @ narrow).expand(number, -1)
        tried = [inside.fit(_disturbed(function, at, generator), 30, _ROUGH) for _ in range(_DRAWS)]
        point = min(tried, key=lambda end: end[1])[0] @ narrow.T
        for times in (3, 6):
            wider = basis[:, : times * narrow.shape[1]]
            if wider.shape[1] < basis.shape[1]:
                point = function.within(wider).fit(point @ wider, 15, _ROUGH)[0] @ wider.T
        yield point


def _disturbed(function: ClassSum, points: Tensor, generator: torch.Generator) -> Tensor:
    """Inputs (n, d), each moved by up to its norm; of a weighed sum, which two sizes explain alike, resized too."""
    noise = torch.randn(points.shape, dtype=points.dtype, generator=generator).to(points.device)
    reach, growth = torch.rand(2, dtype=points.dtype, generator=generator).tolist()
    moved = (
        points + (0.2 + 0.8 * reach) * points.norm() / len(points) ** 0.5 * noise / noise.norm(dim=1)[:, None]
    )
    return moved if function.weigher is None else moved * 4 ** (growth - 0.5)


def _mean(function: ClassSum, number: int) -> Tensor:
    """The input (1, d) that explains a sum best if all samples are equal, from where Stein's lemma points."""
    wide, together = function.head.wide, replace(function, copies=number)
    mean = (function.wanted @ wide)[None]
    mean = mean / (mean.norm() * wide.square().mean().sqrt()).clamp_min(1e-300)
    sizes = torch.logspace(-0.5, 0.5, 11, dtype=wide.dtype).tolist()
    misfits = [float((together(size * mean) - function.wanted).norm()) for size in sizes]
    return together.fit(sizes[misfits.index(min(misfits))] * mean, 15)[0]


def _differences(function: ClassSum, mean: Tensor, number: int, bound: float) -> Tensor:
    """Orthonormal basis (d, d): the mean's direction, and others by how much samples differ in them, most first."""
    head = function.head
    left = function.wanted - replace(function, copies=number)(mean)
    bend = head.activation.bend(mean @ head.wide.T)[0]
    if bool(bend.any()):
        # sum_i (w . d_i)^2, but for neurons whose small s'' would enlarge what is no part of it
        left = left * bend / (bend.square() + 0.1 * bend.square().mean())
    weights = (left / left.abs().mean().clamp_min(1e-300)).clamp(-bound, bound)
    weights = weights - weights.mean()
    vectors = torch.linalg.eigh(head.wide.T @ (weights[:, None] * head.wide)).eigenvectors.flip(1)
    return torch.linalg.qr(torch.cat([mean.T, vectors], 1)).Q
