"""Inputs from single entries of the gradient: top-k updates and the last layer alone.

Where the wide layer's gradient is not complete its row space is lost, but every entry that was sent is still an
equation. They are solved for the inputs themselves, in all d dimensions, by Levenberg-Marquardt from averages over
the neurons; the residual tells a solution from a stuck run as long as there are clearly more entries than unknowns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adversaries.inversion.solvers.conjugate_gradients import conjugate_gradients
from adversaries.inversion.solvers.levenberg_marquardt import Damping, Step, levenberg_marquardt, normal_steps
from adversaries.reconstruction.tensor.head import TwoLayerHead

Function = Callable[[Tensor], Tensor]

DIRECT = 3200
"""Up to this many unknowns the normal equations are formed."""

UNSEEN = 3e-3
"""Share of a random step that may go unseen where a small residual is to vouch for the inputs."""

SPARE_COARSE = 2.0
"""Entries of the head per unknown that a small space must have."""

_DAMPING = Damping(1e-2, least=1e-10, rise=6.0, fall=0.1, slow=0.4, tries=6)
_STEPS = 60
_COARSE_STARTS = 4
_COARSE_STEPS = 40
_ROWS = 512
_MOST_STEPS = 1000


@dataclass(frozen=True)
class Entries:
    """Entries of a gradient of the mean loss that were sent.

    Class, neuron (int64) and value (float64) of A's gradient, each (k_A,); neuron, input and value of W's, (k_W,).
    """

    head_rows: Tensor
    head_columns: Tensor
    head_values: Tensor
    wide_rows: Tensor
    wide_columns: Tensor
    wide_values: Tensor

    @property
    def count(self) -> int:
        """Equations."""
        return len(self.head_values) + len(self.wide_values)

    def whole(self, head: TwoLayerHead) -> bool:
        """Whether all entries of A's gradient are there."""
        return len(self.head_values) == head.head.numel()

    def head_gradient(self, head: TwoLayerHead) -> Tensor | None:
        """A's gradient; None where an entry is missing."""
        if not self.whole(head):
            return None
        found = torch.zeros_like(head.head)
        found[self.head_rows, self.head_columns] = self.head_values
        return found

    def independent(self, samples: int) -> int:
        """How many of the equations can be independent.

        The wide layer's gradient has rank B, and the head's entries of one neuron mix the same B numbers w.x_i: a
        neuron has at most B equations, an input's column B more, and B^2 of them only mix the samples.
        """
        neurons = torch.cat([self.head_columns, self.wide_rows]).bincount().clamp(max=samples).sum()
        columns = self.wide_columns.bincount().clamp(max=samples).sum()
        return min(self.count, int(neurons) + max(0, int(columns) - samples**2))


@dataclass(frozen=True)
class Solution:
    """Inputs (B, d) with their labels (B,), and how well they are founded.

    `residual`: the larger relative one of the two blocks in `parts`; for the others see :func:`foundation`.
    """

    inputs: Tensor
    labels: Tensor
    residual: float
    parts: dict[str, float]
    unseen: float = 1.0
    error: float = math.inf


class Model:
    """x (B, d) -> the entries' values, each block over its norm, with products by the Jacobian both ways."""

    def __init__(self, head: TwoLayerHead, entries: Entries, labels: Tensor) -> None:
        self._head, self._entries = head, entries
        self._hot = torch.nn.functional.one_hot(labels, head.classes).to(head.wide.dtype)
        self._norms = _norms(entries)

    def __call__(self, x: Tensor) -> Tensor:
        """The values at x."""
        return self.at(x)[0]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """W x, s and s' of it, the softmax, and its residuals."""
        u = x @ self._head.wide.T
        hidden, slope = self._head.activation.value(u), self._head.activation.slope(u)
        p = (hidden @ self._head.head.T).softmax(1)
        return u, hidden, slope, p, p - self._hot

    def at(self, x: Tensor) -> tuple[Tensor, Function, Function]:
        """Values at x, and the Jacobian there as a map of steps (B, d) and, transposed, of residuals (k,)."""
        head, e, (head_norm, wide_norm) = self._head, self._entries, self._norms
        size, split = len(x), len(e.head_values)
        u, hidden, slope, p, delta = self._forward(x)
        back = delta @ head.head
        bend = head.activation.bend(u) * back if len(e.wide_values) else u
        wide_weights = back * slope

        def joined(full: Tensor, wide: Tensor) -> Tensor:
            return torch.cat([full[e.head_rows, e.head_columns] / head_norm, wide / wide_norm]) / size

        def wide_entries(weights: Tensor, inputs: Tensor) -> Tensor:
            return (weights[:, e.wide_rows] * inputs[:, e.wide_columns]).sum(0)

        def through_softmax(d: Tensor) -> Tensor:
            return p * (d - (p * d).sum(1, keepdim=True))

        def push(step: Tensor) -> Tensor:
            du = step @ head.wide.T
            dh = slope * du
            dd = through_softmax(dh @ head.head.T)
            wide = e.wide_values
            if len(wide):
                dw = (dd @ head.head) * slope + bend * du
                wide = wide_entries(dw, x) + wide_entries(wide_weights, step)
            return joined(dd.T @ hidden + delta.T @ dh, wide)

        def pull(left: Tensor) -> Tensor:
            scattered = torch.zeros_like(head.head)
            scattered.index_put_(
                (e.head_rows, e.head_columns), left[:split] / head_norm / size, accumulate=True
            )
            dd, dh = hidden @ scattered.T, delta @ scattered
            direct: Tensor | float = 0.0
            bent: Tensor | float = 0.0
            if len(e.wide_values):
                part = left[split:] / wide_norm / size
                dw = torch.zeros_like(u).index_add_(1, e.wide_rows, x[:, e.wide_columns] * part)
                direct = torch.zeros_like(x).index_add_(
                    1, e.wide_columns, wide_weights[:, e.wide_rows] * part
                )
                dd = dd + (dw * slope) @ head.head.T
                bent = dw * bend
            dh = dh + through_softmax(dd) @ head.head
            return (slope * dh + bent) @ head.wide + direct

        values = joined(delta.T @ hidden, wide_entries(wide_weights, x))
        return values, push, pull

    def normal_equations(self, x: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """J'J (B d, B d) and J' left (B d,) at x, the Jacobian's rows formed in blocks."""
        head, e, (head_norm, wide_norm) = self._head, self._entries, self._norms
        size, dimension = x.shape
        u, hidden, slope, p, delta = self._forward(x)
        # d delta_i / d x_i = (diag p - p p') A diag(s') W, (B, C, d)
        inner = torch.einsum("cm,im,md->icd", head.head, slope, head.wide)
        turn = p[:, :, None] * (inner - torch.einsum("ic,icd->id", p, inner)[:, None])
        unknowns = size * dimension
        # float32: a step with four right digits costs half, and the residual is float64's.
        gram = torch.zeros(unknowns, unknowns, dtype=torch.float32, device=x.device)
        right = torch.zeros(unknowns, dtype=x.dtype, device=x.device)

        def gather(rows: Tensor, values: Tensor) -> None:
            flat = rows.reshape(len(rows), unknowns)
            low = flat.float()
            gram.addmm_(low.T, low)
            right.addmv_(flat.T, values)

        split = len(e.head_values)
        for part in torch.arange(split, device=x.device).split(_ROWS):
            c, j = e.head_rows[part], e.head_columns[part]
            first = (delta[:, c] * slope[:, j]).T[:, :, None] * head.wide[j][:, None]
            second = hidden[:, j].T[:, :, None] * turn[:, c].movedim(0, 1)
            gather((first + second) / (head_norm * size), left[part])
        back = delta @ head.head
        for part in torch.arange(len(e.wide_values), device=x.device).split(_ROWS):
            j, k = e.wide_rows[part], e.wide_columns[part]
            through = torch.einsum("cn,icd->nid", head.head[:, j], turn) * slope[:, j].T[:, :, None]
            bent = (back[:, j] * head.activation.bend(u[:, j])).T[:, :, None] * head.wide[j][:, None]
            rows = x[:, k].T[:, :, None] * (through + bent)
            rows[torch.arange(len(part), device=x.device), :, k] += (back[:, j] * slope[:, j]).T
            gather(rows / (wide_norm * size), left[split + part])
        return gram.double(), right


def _norms(entries: Entries) -> tuple[float, float]:
    return (
        float(entries.head_values.norm().clamp_min(1e-300)),
        float(entries.wide_values.norm().clamp_min(1e-300)),
    )


def targets(entries: Entries) -> Tensor:
    """The entries' values, each block over its norm: what :class:`Model` should answer."""
    head_norm, wide_norm = _norms(entries)
    return torch.cat([entries.head_values / head_norm, entries.wide_values / wide_norm])


def fit(
    function: Model, wanted: Tensor, start: Tensor, iterations: int, settled: float = 1e-7
) -> tuple[Tensor, float]:
    """Minimise |function(x) - wanted| from `start` by Levenberg-Marquardt; x, and what is left over |wanted|.

    The normal equations are formed for up to :data:`DIRECT` unknowns, and solved by conjugate gradients beyond.
    """

    def linearise(x: Tensor) -> tuple[Tensor, Callable[[float], Step]]:
        value, push, pull = function.at(x)
        left = wanted - value

        def prepare(gained: float) -> Step:
            if x.numel() > DIRECT:
                # Far from a solution an exact step is wasted.
                return _iterated(push, pull, left, 1e-2 if gained < 0.5 else 1e-3)
            gram, right = function.normal_equations(x, left)
            return normal_steps(gram, right, x.shape)

        return left, prepare

    norm = float(wanted.norm())
    x, left, _ = levenberg_marquardt(
        linearise, start, iterations, _DAMPING, settled=settled * norm, trusted=1e-3
    )
    return x, float(left.norm()) / norm


def _iterated(push: Function, pull: Function, left: Tensor, tolerance: float) -> Step:
    """Steps by conjugate gradients on (J'J + damping s I) step = J' left, s the mean diagonal of J'J by one probe."""
    right = pull(left)
    probe = torch.where(torch.arange(right.numel(), device=right.device) % 2 == 0, 1.0, -1.0)
    scale = float(push(probe.to(right).reshape(right.shape)).square().sum()) / right.numel()

    def step(damping: float) -> Tensor:
        def system(v: Tensor) -> Tensor:
            return pull(push(v)) + damping * scale * v

        return conjugate_gradients(system, right, 100, tolerance)[0]

    return step


def foundation(
    function: Model, x: Tensor, left: Tensor, noise: Tensor, generator: torch.Generator, probes: int = 2
) -> tuple[float, Tensor]:
    """How well the entries found x: the share of a random step that none notices, and predicted errors (B,), rms.

    More entries than unknowns do not determine all unknowns: where the entries of a column were not sent, its
    inputs enter hardly any equation, and a residual of zero says nothing about them. Least squares recovers from J
    v all of a step v but what lies in the Jacobian's null space; and it says how far noise in the entries, of
    deviation `noise` (k,), and what is `left` of them (k,) move the inputs.
    """
    solve = _least_squares(function, x)
    _, push, _ = function.at(x)
    worst = 0.0
    for _ in range(probes):
        hidden = torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)
        worst = max(worst, float((hidden - solve(push(hidden))).norm() / hidden.norm()))
    draws = torch.randn(noise.shape, dtype=noise.dtype, generator=generator).to(noise.device)
    return min(worst, 1.0), solve(left + noise * draws).square().mean(1).sqrt()


def _least_squares(function: Model, x: Tensor) -> Function:
    """Values (k,) -> the step (B, d) whose image under the Jacobian at x comes nearest, by conjugate gradients."""
    _, push, pull = function.at(x)
    factor: Tensor | None = None
    if x.numel() <= DIRECT:
        gram, _ = function.normal_equations(x, function(x))
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(gram)
        factor = None if int(failed) else factor

    def precondition(g: Tensor) -> Tensor:
        return g if factor is None else torch.cholesky_solve(g.reshape(-1, 1), factor).reshape(x.shape)

    def solve(values: Tensor) -> Tensor:
        # Nothing more comes in where only the null space is left.
        return conjugate_gradients(
            lambda v: pull(push(v)), pull(values), _MOST_STEPS, 1e-10, precondition, stalled=1e-4
        )[0]

    return solve


def guess_labels(head: TwoLayerHead, entries: Entries, samples: int, most: int) -> list[Tensor]:
    """Labels (samples,) from the head's entries, the likeliest of at most `most` guesses first.

    A class's row is ``sum_i delta_ic s(W x_i)'`` with delta_ic negative only where x_i has that label, and s is
    positive on average: a row with a negative sum has a label for sure. So may the row that the head's output goes
    into, whatever its sum, for its probability is not small. Labels left over are dealt to these rows such that the
    sums fit best.
    """
    totals = torch.zeros(head.classes, dtype=head.wide.dtype, device=head.wide.device)
    totals.index_add_(0, entries.head_rows, entries.head_values)
    totals = totals.cpu()
    order = totals.argsort()
    sure = [int(c) for c in order if float(totals[c]) < 0][:samples] or [int(order[0])]
    own = int(head.row.abs().argmax())
    pool = sure if own in sure else [*sure, own]
    ways = list(itertools.islice(itertools.combinations_with_replacement(pool, samples - len(sure)), 10_000))
    guesses = [torch.tensor(sorted([*sure, *extra]), dtype=torch.int64) for extra in ways]
    whole = entries.whole(head)

    def misfit(labels: Tensor) -> float:
        counts = torch.bincount(labels, minlength=head.classes).to(totals.dtype)
        # Samples of equal strength S: a total is S (B p_c - n_c), and all classes but the head's own have one p.
        mean = torch.full_like(totals, samples / (head.classes - 1))
        mean[own] = 0.0
        shift = -mean
        shift[own] = samples
        if whole:
            design = torch.stack([mean - counts, shift], 1)
            left = totals - design @ torch.linalg.lstsq(design, totals[:, None]).solution[:, 0]
            return float(left.norm())
        # Of sparse rows only the negative entries, the largest, are there to be compared.
        rows = torch.tensor([c for c in sure if c != own], dtype=torch.int64)
        seen, wanted = -totals[rows].clamp(max=0), counts[rows]
        apart = wanted / wanted.sum().clamp_min(1) - seen / seen.sum().clamp_min(1e-300)
        return float(apart.square().sum())

    guesses.sort(key=misfit)
    return [labels.to(head.wide.device) for labels in guesses[:most]]


def starts(
    head: TwoLayerHead, entries: Entries, labels: Tensor, generator: torch.Generator
) -> Iterator[Tensor]:
    """Starting inputs (B, d), the best guess first; later starts disturb the first.

    By Stein's lemma the average of g_j w_j over the neurons of a class's row points to the mean of the samples that
    dominate it: those of that label. Samples that share a label start on both sides of their mean, along the row's
    second moment.
    """
    dimension, samples = head.inputs, len(labels)
    sigma = float(head.wide.square().mean().sqrt())
    typical = 1.0 / sigma
    base = torch.zeros(samples, dimension, dtype=head.wide.dtype, device=head.wide.device)
    spread = torch.zeros_like(base)
    for label in labels.unique().tolist():
        where = entries.head_rows == label
        columns, values = entries.head_columns[where], -entries.head_values[where]
        if not len(values):
            continue
        mean = values @ head.wide[columns]
        direction = mean / mean.norm().clamp_min(1e-300)
        members = torch.nonzero(labels == label).flatten()
        base[members] = direction
        if len(members) > 1:
            w = head.wide[columns] / sigma
            probe = torch.randn(dimension, len(members) + 2, dtype=w.dtype, generator=generator).to(w.device)
            for _ in range(6):
                probe = torch.linalg.qr(w.T @ (values[:, None] * (w @ probe)) - values.sum() * probe).Q
            probe = probe - torch.outer(direction, direction @ probe)
            probe = torch.linalg.qr(probe).Q
            for place, member in enumerate(members.tolist()):
                sign = 1.0 if place % 2 == 0 else -1.0
                spread[member] = sign * probe[:, place // 2]
    if len(labels.unique()) < len(labels):
        yield _parted(head, entries, labels, typical * base, generator)
    yield typical * (base + 0.6 * spread)
    while True:
        noise = torch.randn(samples, dimension, dtype=base.dtype, generator=generator).to(base.device)
        noise = noise / noise.norm(dim=1, keepdim=True)
        mix = torch.rand(samples, 1, dtype=base.dtype, generator=generator).to(base.device)
        point = base + (2 * mix - 1) * spread + 0.7 * noise
        yield typical * point / point.norm(dim=1, keepdim=True).clamp_min(1e-300)


def _parted(
    head: TwoLayerHead, entries: Entries, labels: Tensor, start: Tensor, generator: torch.Generator
) -> Tensor:
    """Samples of one label taken apart from their mean, which Gauss-Newton finds as one input.

    What that leaves is of second order in the samples' differences d, ``s''(w . mean) (w . d)^2``: their direction
    is the leading eigenvector of the neurons' second moment with these weights.
    """
    function, wanted = Model(head, entries, labels), targets(entries)
    together, _ = fit(function, wanted, _scaled(function, wanted, start), 10)
    left = (wanted - function(together))[: len(entries.head_values)]
    apart = together.clone()
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        if len(members) < 2:
            continue
        mean = together[members[0]]
        where = entries.head_rows == label
        w = head.wide[entries.head_columns[where]]
        weights = -left[where] * head.activation.bend(w @ mean)
        weights = weights - weights.mean()
        probe = torch.randn(head.inputs, len(members) + 3, dtype=w.dtype, generator=generator).to(w)
        for _ in range(30):
            probe = torch.linalg.qr(w.T @ (weights[:, None] * (w @ probe))).Q
        values = ((w @ probe).square() * weights[:, None]).sum(0)
        probe = probe[:, values.argsort(descending=True)]
        for place, member in enumerate(members.tolist()):
            apart[member] = (1.0 if place % 2 == 0 else -1.0) * probe[:, place // 2]
    still = torch.isin(labels, labels.unique()[torch.bincount(labels)[labels.unique()] < 2])
    direction = torch.where(still[:, None], torch.zeros_like(apart), apart)
    scale = float(together.norm(dim=1).mean())
    tried = [together + size * scale * direction for size in (0.2, 0.35, 0.5, 0.7, 0.9)]
    return min(tried, key=lambda x: float((function(x) - wanted).norm()))


def solve(
    head: TwoLayerHead,
    entries: Entries,
    samples: int,
    restarts: int,
    generator: torch.Generator,
    certified: float,
    safety: float,
    ladder: Sequence[Tensor],
    first: tuple[Tensor, Tensor] | None,
    progress: Callable[[float], None],
) -> Solution:
    """Inputs and labels from the entries: of all starts the first with residual `certified`, else the lowest.

    What the entries leave open is measured where the residual could be taken for a certificate; their noise may be
    `safety` times what is left of them. Labels and inputs that are known already come `first`; each guess of the
    labels is tried in the spaces of `ladder` first, see :func:`climbed`.
    """
    wanted = targets(entries)
    best: Solution | None = None
    guessed = _attempts(head, entries, samples, restarts, generator, ladder)
    tried = guessed if first is None else itertools.chain([first], guessed)
    for attempt, (labels, start) in enumerate(tried):
        function = Model(head, entries, labels)
        x, _ = fit(function, wanted, start, _STEPS)
        blocks = (wanted - function(x)).tensor_split([len(entries.head_values)])
        parts = {name: float(block.norm()) for name, block in zip(("head", "wide"), blocks, strict=True)}
        if best is None or max(parts.values()) < best.residual:
            best = Solution(x, labels, max(parts.values()), parts)
        progress(min(1.0, (attempt + 1) / restarts))
        if best.residual <= certified:
            break
    assert best is not None
    if best.residual > certified:
        return best
    function = Model(head, entries, best.labels)
    left = wanted - function(best.inputs)
    blocks = left.tensor_split([len(entries.head_values)])
    noise = torch.cat([part.square().mean().sqrt().expand(len(part)) for part in blocks])
    unseen, found = foundation(function, best.inputs, left, safety * noise, generator)
    return replace(best, unseen=unseen, error=float(found.max()))


def _attempts(
    head: TwoLayerHead,
    entries: Entries,
    samples: int,
    restarts: int,
    generator: torch.Generator,
    ladder: Sequence[Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Guessed labels (B,) and starting inputs (B, d)."""
    guesses = guess_labels(head, entries, samples, restarts)
    sources = [_sources(head, entries, labels, ladder, generator) for labels in guesses]
    for attempt in range(restarts):
        labels = guesses[attempt % len(guesses)]
        function = Model(head, entries, labels)
        yield labels, _scaled(function, targets(entries), next(sources[attempt % len(guesses)]))


def _sources(
    head: TwoLayerHead, entries: Entries, labels: Tensor, ladder: Sequence[Tensor], generator: torch.Generator
) -> Iterator[Tensor]:
    enough = [b for b in ladder if len(entries.head_values) >= SPARE_COARSE * len(labels) * b.shape[1]]
    if enough:
        yield climbed(head, entries, labels, enough, generator)
    yield from starts(head, entries, labels, generator)


def climbed(
    head: TwoLayerHead, entries: Entries, labels: Tensor, ladder: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """Starting inputs (B, d) found in small spaces first, from the head's entries, which see w.x only.

    `ladder`: orthonormal bases (d, q) of ever larger spaces that hold most of an input. Few unknowns make the
    moments that starts are drawn from sharp, and steps cheap: several starts are tried in the smallest space, and
    the best is carried from space to space. What an input has outside of it is noise there.
    """
    none = {name: getattr(entries, name)[:0] for name in ("wide_rows", "wide_columns", "wide_values")}
    bare = replace(entries, **none)
    wanted = targets(bare)
    point: Tensor | None = None
    for basis in ladder:
        small = replace(head, wide=head.wide @ basis)
        function = Model(small, bare, labels)
        if point is None:
            tried = itertools.islice(starts(small, bare, labels, generator), _COARSE_STARTS)
            ends = [fit(function, wanted, _scaled(function, wanted, start), _COARSE_STEPS) for start in tried]
            inside = min(ends, key=lambda end: end[1])[0]
        else:
            inside, _ = fit(function, wanted, point @ basis, _COARSE_STEPS)
        point = inside @ basis.T
    assert point is not None
    return point


def _scaled(function: Model, wanted: Tensor, start: Tensor) -> Tensor:
    """`start` times the one common factor that explains the entries best."""
    factors = torch.logspace(-0.5, 0.5, 11, dtype=start.dtype).tolist()
    misfits = [float((function(factor * start) - wanted).norm()) for factor in factors]
    return start * factors[misfits.index(min(misfits))]
