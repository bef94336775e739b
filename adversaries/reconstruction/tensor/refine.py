"""Gauss-Newton on the exact model of the wide layer's gradient: ``Y = sum_i r_i s'(W x_i) x_i'``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.inversion.solvers.conjugate_gradients import conjugate_gradients
from adversaries.inversion.solvers.levenberg_marquardt import Damping, Step, levenberg_marquardt
from adversaries.reconstruction.tensor.head import TwoLayerHead

_DIRECT, _NEAR = 4500, 1e-3
"""Unknowns and residual up to which the normal equations in the span are factored: farther off, steps lead astray."""

_ROUNDED = 1e-6

_CHORDS = 8
"""Steps with one factor."""


@dataclass(frozen=True)
class Fit:
    """Inputs x (B, d) with weights r (B,), and |Y - model| / |Y|."""

    inputs: Tensor
    weights: Tensor
    residual: float


def misfit(head: TwoLayerHead, y: Tensor, inputs: Tensor, weights: Tensor) -> float:
    """|Y - sum_i r_i s'(W x_i) x_i'| / |Y| for Y (m, d)."""
    k = head.activation.slope(head.wide @ inputs.T) * weights
    return float((y - k @ inputs).norm() / y.norm())


def refine(
    head: TwoLayerHead,
    y: Tensor,
    inputs: Tensor,
    weights: Tensor,
    iterations: int = 30,
    settled: float = 3e-9,
    progress: Callable[[float], None] = lambda share: None,
) -> Fit:
    """Levenberg-Marquardt from an estimate, alternating between the span and what lies in it; never worse than that.

    Off the span the model is linear in the inputs, which one least-squares solve with all d columns settles and
    which averages the rounding of float32 over the neurons. In the span there are B^2 + B unknowns, whose normal
    equations cost m B^4; far from the end and for larger batches they are solved by conjugate gradients,
    preconditioned by each sample's own block, with products of cost m B^2. `y` (m, d) is the gradient of W times
    batch size over a; `settled`: a residual that ends it.
    """
    best = Fit(inputs, weights, misfit(head, y, inputs, weights))
    damping, least_damping = 1e-6, 1e-10
    few = len(weights) * (len(weights) + 1) <= _DIRECT
    for iteration in range(iterations):
        before = best.residual
        moved = _off_span(head, y, best)
        basis = torch.linalg.qr(moved.T).Q
        if few and before < _NEAR:
            stepped, least_damping = _in_span_directly(head, y, moved, best.weights, basis, least_damping)
        else:
            stepped, damping = _in_span(head, y, moved, best.weights, basis, damping)
        if stepped.residual < best.residual:
            best = stepped
        progress((iteration + 1) / iterations)
        # At the rounding of float32 a step more costs as much as the first, and brings nothing.
        least = 0.7 if best.residual < _ROUNDED else 1 - 1e-3
        if best.residual > before * least or best.residual < settled:
            break
    return best


def settle(head: TwoLayerHead, y: Tensor, inputs: Tensor, counts: Tensor, iterations: int = 4) -> Tensor:
    """Inputs (B, d) that explain `y` with the weights that their labels, `counts` (B, C), give them; near an answer.

    Without a weight of its own, a sample cannot trade it for what tells it from a hardly different one.
    """
    few = len(inputs) * (len(inputs) + 1) <= _DIRECT
    best = inputs
    least = torch.inf
    for _ in range(iterations if few else 0):
        weights = labelled_weights(head, inputs, counts)
        residual = misfit(head, y, inputs, weights)
        if not residual < 0.7 * least:
            break
        best, least = inputs, residual
        moved = _off_span(head, y, Fit(inputs, weights, residual))
        basis = torch.linalg.qr(moved.T).Q
        inputs = _in_span_directly(head, y, moved, weights, basis, 1e-15, counts)[0].inputs
    return best


def labelled_weights(head: TwoLayerHead, inputs: Tensor, counts: Tensor) -> Tensor:
    """r (B,) of inputs (B, d) with so many samples of each class, `counts` (B, C), at each."""
    return (counts.sum(1, keepdim=True) * head.logits(inputs).softmax(1) - counts) @ head.row


def _off_span(head: TwoLayerHead, y: Tensor, fit: Fit) -> Tensor:
    """The inputs with their part outside their own span solved for."""
    k = head.activation.slope(head.wide @ fit.inputs.T) * fit.weights
    scale = k.norm(dim=0).clamp_min(1e-300)
    q, r = torch.linalg.qr(k / scale)
    if float(r.diagonal().abs().min()) < 1e-10:
        return fit.inputs
    step = torch.linalg.solve_triangular(r, q.T @ (y - k @ fit.inputs), upper=True) / scale[:, None]
    basis = torch.linalg.qr(fit.inputs.T).Q
    return fit.inputs + step - (step @ basis) @ basis.T


def _in_span(
    head: TwoLayerHead, y: Tensor, inputs: Tensor, weights: Tensor, basis: Tensor, damping: float
) -> tuple[Fit, float]:
    u, seen, act = head.wide @ basis, y @ basis, head.activation

    def linearise(x: Tensor) -> tuple[Tensor, Callable[[float], Step]]:
        c, w = x[:, :-1], x[:, -1]
        z = u @ c.T
        slope = act.slope(z)
        k = slope * w
        left = seen - k @ c

        def prepare(gained: float) -> Step:
            del gained
            bend = act.bend(z) * w
            diagonal = _diagonal(u, c, k, slope, bend)

            def adjoint(e: Tensor) -> Tensor:
                onto = e @ c.T
                return torch.cat([k.T @ e + (bend * onto).T @ u, (slope * onto).sum(0)[:, None]], 1)

            def forward(d: Tensor) -> Tensor:
                return k @ d[:, :-1] + (bend * (u @ d[:, :-1].T) + slope * d[:, -1]) @ c

            def step(level: float) -> Tensor:
                factors = _blocks(u, c, k, slope, bend, level)
                return conjugate_gradients(
                    lambda d: adjoint(forward(d)) + level * diagonal * d,
                    adjoint(left),
                    most=300,
                    tolerance=1e-4,
                    precondition=lambda g: torch.cholesky_solve(g[:, :, None], factors)[:, :, 0],
                )[0]

            return step

        return left, prepare

    start = torch.cat([inputs @ basis, weights[:, None]], 1)
    found, _, damping = levenberg_marquardt(linearise, start, 1, Damping(damping, jump=1e-8, tries=8))
    if found is not start:
        inputs, weights = found[:, :-1] @ basis.T, found[:, -1]
    return Fit(inputs, weights, misfit(head, y, inputs, weights)), damping


def _in_span_directly(
    head: TwoLayerHead,
    y: Tensor,
    inputs: Tensor,
    weights: Tensor,
    basis: Tensor,
    damping: float,
    counts: Tensor | None = None,
) -> tuple[Fit, float]:
    """The same with factored normal equations, ill-conditioned as they are; with `counts`, weights follow inputs."""
    u, seen, act = head.wide @ basis, y @ basis, head.activation

    def tied(z: Tensor, w: Tensor) -> Tensor:
        if counts is None:
            return w
        p = (act.value(z) @ head.head.T).softmax(1)
        return (counts.sum(1, keepdim=True) * p - counts) @ head.row

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        c = x[:, :-1]
        z = u @ c.T
        slope, w = act.slope(z), tied(z.T, x[:, -1])
        return c, slope, slope * w, act.bend(z) * w, seen - (slope * w) @ c

    x = torch.cat([inputs @ basis, weights[:, None]], 1)
    c, slope, k, bend, left = parts(x)
    normal = _normal_equations(u, c, k, slope, bend)
    follow = None if counts is None else _weight_slopes(head, u, c, counts)
    if follow is not None:
        normal = _without_weights(normal.reshape(*x.shape, *x.shape), follow)
    scale = normal.diagonal().sqrt().clamp_min(1e-300)
    normal = normal / scale / scale[:, None]
    size, start = float(left.norm()), x
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(normal + damping * torch.eye(len(normal)).to(normal))
        for _ in range(0 if int(failed) else _CHORDS):
            c, slope, k, bend, left = parts(x)
            onto = left @ c.T
            right, of_weights = k.T @ left + (bend * onto).T @ u, (slope * onto).sum(0)[:, None]
            if follow is None:
                right = torch.cat([right, of_weights], 1)
            else:
                right = right + of_weights * follow
            step = torch.cholesky_solve((right.flatten() / scale)[:, None], factor)[:, 0] / scale
            trial = x.clone()
            trial[:, : right.shape[1]] += step.reshape(right.shape)
            trial_size = float(parts(trial)[-1].norm())
            if not trial_size < size:
                break
            slow, size, x = trial_size > 0.9 * size, trial_size, trial
            if slow:
                break
        if x is not start:
            damping = max(0.1 * damping, 1e-13)
            c = x[:, :-1]
            inputs, weights = c @ basis.T, tied(c @ u.T, x[:, -1])
            break
        damping *= 30
    return Fit(inputs, weights, misfit(head, y, inputs, weights)), damping


def _weight_slopes(head: TwoLayerHead, u: Tensor, c: Tensor, counts: Tensor) -> Tensor:
    """How each weight changes with its sample's coordinates, (B, span)."""
    z = c @ u.T
    p = (head.activation.value(z) @ head.head.T).softmax(1)
    along = counts.sum(1, keepdim=True) * p * (head.row - p @ head.row[:, None])
    return ((along @ head.head) * head.activation.slope(z)) @ u


def _without_weights(normal: Tensor, follow: Tensor) -> Tensor:
    """Normal equations (B, span + 1, B, span + 1) of the coordinates alone, which the weights `follow` (B, span)."""
    mixed = normal[:, :-1, :, -1][..., None] * follow
    both = normal[:, -1, :, -1][:, None, :, None] * follow[:, :, None, None] * follow
    full = normal[:, :-1, :, :-1] + mixed + mixed.permute(2, 3, 0, 1) + both
    return full.reshape(follow.numel(), -1)


def _normal_equations(u: Tensor, c: Tensor, k: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    """J'J (B^2 + B, B^2 + B) of the model in the span, each sample's coordinates before its weight."""
    size, span = c.shape
    gram = c @ c.T
    bent = (bend[:, :, None] * u[:, None]).flatten(1)  # (m, B * span)
    full = (bent.T @ bent).reshape(size, span, size, span) * gram[:, None, :, None]
    cross = (bent.T @ k).reshape(size, span, size)[:, :, :, None] * c[:, None, None]  # (i, a, l, b)
    full = full + cross + cross.permute(2, 3, 0, 1)
    full.diagonal(dim1=1, dim2=3).add_((k.T @ k)[:, :, None])
    mixed = (bent.T @ slope).reshape(size, span, size) * gram[:, None] + (k.T @ slope)[:, None] * c.T[None]
    all_ = u.new_empty(size, span + 1, size, span + 1)
    all_[:, :span, :, :span] = full
    all_[:, :span, :, span] = mixed
    all_[:, span, :, :span] = mixed.permute(2, 0, 1)
    all_[:, span, :, span] = (slope.T @ slope) * gram
    return all_.reshape(size * (span + 1), -1)


def _diagonal(u: Tensor, c: Tensor, k: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    """Diagonal of the normal equations, (B, B + 1)."""
    square = c.square().sum(1)
    first = (
        k.square().sum(0)[:, None]
        + 2 * ((k * bend).T @ u) * c
        + square[:, None] * (bend.square().T @ u.square())
    )
    return torch.cat([first, (square * slope.square().sum(0))[:, None]], 1)


def _blocks(u: Tensor, c: Tensor, k: Tensor, slope: Tensor, bend: Tensor, damping: float) -> Tensor:
    """Cholesky factors (B, B + 1, B + 1) of each sample's own block of the normal equations."""
    size, span = c.shape
    blocks = torch.empty(size, span + 1, span + 1, dtype=u.dtype, device=u.device)
    for i in range(size):
        square = c[i].square().sum()
        weighted = u * bend[:, i : i + 1]
        cross = torch.outer(weighted.T @ k[:, i], c[i])
        inner = square * (weighted.T @ weighted) + cross + cross.T
        inner.diagonal().add_(k[:, i].square().sum())
        blocks[i, :span, :span] = inner
        blocks[i, span, :span] = blocks[i, :span, span] = (slope[:, i] @ k[:, i]) * c[i] + square * (
            weighted.T @ slope[:, i]
        )
        blocks[i, span, span] = square * slope[:, i].square().sum()
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1 + max(damping, 1e-10))
    return torch.linalg.cholesky_ex(blocks)[0]


def relu_masks(
    head: TwoLayerHead, y: Tensor, basis: Tensor, products: Tensor, rounds: int = 40
) -> tuple[Tensor, Tensor, float]:
    """r_i x_i (B, d) for ReLU from exact masks, signs of r_i (B,), and the share of neurons explained to rounding.

    In the span, ``Y = M (r_i x_i)`` with M in {0, 1}. The masks of an estimate of the `products` r_i x_i are read
    off twice: from the side of the kink on which w.x lies, and by rounding ``Y (r_i x_i)^-1``. The neurons that
    agree best are solved for by least absolute deviations (a wrong mask is an outlier), and so on until the
    solution explains all neurons to rounding.

    References
    ----------
    Dimitrov et al., "SPEAR: Exact Gradient Inversion of Batches in Federated Learning", NeurIPS 2024.
    """
    inside, neurons = y @ basis, head.wide @ basis
    found = products @ basis
    size, m = len(found), len(y)
    typical = float(inside.square().sum(1).mean().sqrt())
    signs = None
    best, most, stale = found, -1.0, 0
    for _ in range(rounds):
        inverse, failed = torch.linalg.inv_ex(found)
        if int(failed):
            break
        coded = inside @ inverse
        doubt = torch.minimum(coded.abs(), (coded - 1).abs()).amax(1)
        mask = coded > 0.5
        if signs is None:
            # r_i is negative where the coded mask is the one of -x.
            along = neurons @ found.T > 0
            signs = torch.where((along == mask).double().mean(0) >= 0.5, 1.0, -1.0).to(found)
        sides = neurons @ (found * signs[:, None]).T > 0
        doubt = doubt + (sides != mask).double().sum(1)
        share = max(0.3, min(1.0, most + 0.2))
        rows = doubt.argsort()[: max(3 * size, int(share * m))]
        chosen, values = mask[rows].to(y.dtype), inside[rows]
        weights = torch.ones(len(rows), 1, dtype=y.dtype, device=y.device)
        for _ in range(20):
            found = torch.linalg.lstsq(chosen * weights, values * weights).solution
            left = (values - chosen @ found).norm(dim=1, keepdim=True) / typical
            weights = (left.square() + 1e-12).pow(-0.25)
            weights = weights / weights.max()
        sides = (neurons @ (found * signs[:, None]).T > 0).to(y.dtype)
        explained = float(((inside - sides @ found).norm(dim=1) < 1e-5 * typical).double().mean())
        if explained > most + 1e-3:
            best, most, stale = found, explained, 0
        else:
            stale += 1
        if most > 0.999 or stale >= 8:
            break
    if signs is None:
        return products, torch.ones_like(products[:, 0]), 0.0
    sides = (neurons @ (best * signs[:, None]).T > 0).to(y.dtype)
    right = (inside - sides @ best).norm(dim=1) < 1e-5 * typical
    enough = int(right.sum()) >= 2 * size
    best = torch.linalg.lstsq(sides[right], y[right]).solution if enough else best @ basis.T
    return best, signs, max(most, 0.0)
