"""From the gradient of a wide layer to the inputs of a batch: span, tensor, directions, norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adversaries.inversion.gradients.activations import (
    hermite_coefficients,
    homogeneous,
    is_polynomial,
    stein_order,
)
from adversaries.inversion.solvers.span import CLEAR, DEPENDENT, NOISY, rank_under_noise, row_space
from adversaries.reconstruction.tensor import decompose, moments
from adversaries.reconstruction.tensor.decompose import Decomposer, simdiag, slices, symmetric
from adversaries.reconstruction.tensor.head import TwoLayerHead, golden_section
from adversaries.reconstruction.tensor.moments import feature_count, regress
from fedattack.errors import NotApplicable

_TRIED = 3
"""Ranks tried where the last directions hardly stand out of the noise."""

_MOST_DEGREE = 4
_MOST_FEATURES = 1200
"""Features of higher degree than needed only lessen the noise; beyond this many they cost more than they give."""


@dataclass
class Estimate:
    """Inputs (B, d) up to refinement with weights r (B,), warnings for a person, and JSON-able figures of the way."""

    inputs: Tensor
    weights: Tensor
    notes: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Whitened:
    """Coordinates in a span, orthonormal `basis` Q (d, B), in which the neurons' weights u (m, B) are white.

    ``w . x = u . c`` with ``c = L' Q' x`` and `factor` L (B, B).
    """

    basis: Tensor
    u: Tensor
    factor: Tensor

    @classmethod
    def of(cls, wide: Tensor, basis: Tensor) -> Whitened:
        """Of neurons W (m, d) and an orthonormal basis (d, B)."""
        raw = wide @ basis
        factor = torch.linalg.cholesky(raw.T @ raw / len(raw))
        return cls(basis, torch.linalg.solve_triangular(factor, raw.T, upper=False).T.contiguous(), factor)

    def inside(self, gradient: Tensor) -> Tensor:
        """Rows (m, d) in the span as (m, B), in the coordinates of c."""
        return gradient @ self.basis @ self.factor

    def outside(self, c: Tensor) -> Tensor:
        """Coordinates (B, B) as inputs (B, d)."""
        return torch.linalg.solve_triangular(self.factor.T, c.T, upper=True).T @ self.basis.T


def find_span(
    head: TwoLayerHead, gradient: Tensor, batch: int | None, declared: int, generator: torch.Generator
) -> tuple[list[Tensor], list[str]]:
    """Orthonormal bases (d, B) of the span of the batch's `gradient` (m, d), likeliest first, and warnings.

    `batch` overrides the number of samples; None: as many as stand out of the gradient's noise, `declared` at most,
    and then as many as precede a wide gap, for hardly different samples are better found as copies of one.
    """
    if not float(gradient.norm()) > 0:
        raise NotApplicable("the wide layer's gradient is zero: nothing of the batch is in it")
    most = min(max(declared, batch or 0) + 1, *gradient.shape)
    span = row_space(gradient, most, generator)
    notes: list[str] = []
    if batch is None:
        rank, edge = rank_under_noise(gradient, span, declared, generator)
        size = max(1, rank)
        if edge > NOISY * float(span.values[0]):
            notes.append(
                f"noise in the gradient, up to {edge / float(span.values[0]):.0e} of its largest singular value"
            )
    else:
        size = batch
    largest = min(head.inputs, len(span.values))
    if size >= largest and declared > largest:
        size = declared
    if size > largest:
        raise NotApplicable(
            f"batch {size} > input dimension {largest}: the samples' span is the whole space and singles out none"
        )
    if size < declared:
        notes.append(
            f"batch {declared}, rank {size}: equal or dependent samples (or black ones, or some below the noise)"
        )
    if float(span.values[size - 1]) < DEPENDENT * float(span.values[0]):
        share = float(span.values[size - 1] / span.values[0])
        notes.append(f"samples dependent: s_B / s_1 = {share:.1e} < {DEPENDENT:.0e}")
    sizes = [size]
    if batch is None and size == rank:
        # Rounding is not quite noise: a direction or two of it may have been taken for samples.
        sizes += list(range(size - 1, max(span.above(CLEAR * edge, declared), size - _TRIED, 1) - 1, -1))
        wide = span.rank(declared)
        sizes += [wide] if wide is not None and wide < sizes[-1] else []
    return [span.basis[:, :count] for count in sizes], notes


def degree_for(head: TwoLayerHead, batch: int) -> int:
    """Degree of the features for a full gradient; NotApplicable if the width does not allow any."""
    least = stein_order(head.activation) - 1
    needed = feature_count(batch, least)
    if head.width < needed:
        formula = "(B+1)(B+2)/2" if least == 2 else "(B+1)(B+2)(B+3)/6"
        raise NotApplicable(
            f"width {head.width} < {needed}: the regression for B = {batch} samples with {head.name} needs at least "
            f"{formula} = {needed} neurons; raise model.width or lower training.batch_size"
        )
    if is_polynomial(head.name):
        return least
    degree, most = least, min(head.width // 3, _MOST_FEATURES)
    while degree < _MOST_DEGREE and feature_count(batch, degree + 1) <= most:
        degree += 1
    return degree


def from_wide(
    head: TwoLayerHead,
    y: Tensor,
    basis: Tensor,
    decomposer: Decomposer,
    generator: torch.Generator,
    seed: int,
) -> Estimate:
    """Inputs from the wide layer's gradient `y` (m, d), ``sum_i r_i s'(W x_i) x_i'``."""
    order = stein_order(head.activation)
    degree = degree_for(head, basis.shape[1])
    coordinates = Whitened.of(head.wide, basis)
    inside = coordinates.inside(y)
    found, unexplained = regress(coordinates.u, inside, degree)
    tensor = symmetric(found[order - 1])
    second = symmetric(found[1]) if abs(hermite_coefficients(head.activation)[2]) > 1e-6 else None
    directions, notes = decompose.decompose(decomposer, tensor, second, generator, seed)
    dual = torch.linalg.inv(directions)
    curves = inside @ dual.T  # column i: r_i n_i s'(n_i v_i) of the unit direction i
    v = coordinates.u @ directions
    norms, weights = _fit_curves(head, v, curves)
    if order == 4:
        notes.insert(0, f"activation {head.name} has a zero third Hermite coefficient; using order 4")
    inputs, weights = _upright(coordinates.outside((directions * norms).T), weights, head)
    figures: dict[str, object] = {"order": order, "degree": degree, "regression_residual": unexplained}
    figures["off_diagonal"] = decompose.off_diagonal(slices(tensor), directions)
    return Estimate(inputs, weights, notes, figures)


def from_head(
    head: TwoLayerHead, gradient: Tensor, basis: Tensor, decomposer: Decomposer, generator: torch.Generator
) -> Estimate:
    """Inputs from the head's gradient (C, m), ``sum_i delta_i s(W x_i)'`` up to a factor, in the wide layer's span.

    What several local steps leave: the wide layer's change still spans the samples, but its moments drift with the
    head, whose own change stays close to a multiple of one gradient.
    """
    order, batch = stein_order(head.activation), basis.shape[1]
    needed = feature_count(batch, order)
    if head.width < needed:
        raise NotApplicable(
            f"width {head.width} < {needed}: reading B = {batch} samples off the head's change needs at least that "
            f"many neurons (B+{order} choose {order})"
        )
    coordinates = Whitened.of(head.wide, basis)
    # The classes' mixtures all share the samples' directions: one stack of slices for all of them.
    values = gradient.T
    _, strength, mixtures = torch.linalg.svd(values, full_matrices=False)
    kept = max(1, min(batch, int((strength > 1e-7 * strength[0]).sum())))
    found, unexplained = regress(coordinates.u, values @ mixtures[:kept].T, order)
    stack = found[order].movedim(-1, 0).reshape(-1, batch, batch)
    directions, notes = _decompose_stack(stack, found, decomposer, generator)
    norms = _profile_norms(head, found, directions)
    inputs = coordinates.outside((directions * norms).T)
    inputs, _ = _upright(inputs, torch.ones(batch, dtype=inputs.dtype, device=inputs.device), head)
    hidden = head.activation.value(inputs @ head.wide.T)
    delta = torch.linalg.lstsq(hidden.T, values).solution
    return Estimate(
        inputs, delta @ head.row, notes, {"order": order, "degree": order, "regression_residual": unexplained}
    )


def _decompose_stack(
    stack: Tensor, found: dict[int, Tensor], decomposer: Decomposer, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    if decomposer == "jennrich":
        return decompose.jennrich(stack, generator), []
    notes = []
    if decomposer != "simdiag":
        notes.append(
            f"decomposer {decomposer!r} takes one tensor and the head's change gives one per class: simdiag was used"
        )
    second = found[2].movedim(-1, 0)
    typical, other = (part.square().sum((1, 2)).mean().sqrt() for part in (stack, second))
    scale = typical / other.clamp_min(1e-300)
    return simdiag(torch.cat([stack, second * scale]) if float(scale) < 1e6 else stack, generator), notes


def _fit_curves(head: TwoLayerHead, v: Tensor, curves: Tensor) -> tuple[Tensor, Tensor]:
    """Norms n (with sign) and weights r with ``curves_i = r_i n_i s'(n_i v_i)``.

    Closed form for the cubic, whose two coefficients have the ratio 3 n / 2; else a search over n with r by least
    squares. A homogeneous activation gives r n only: n is set to 1, its sign decided.
    """
    act = head.activation
    if head.name == "poly3":
        design = torch.stack([v, v.square()], 2).movedim(1, 0)
        solved = torch.linalg.lstsq(design, curves.T[:, :, None]).solution[:, :, 0]
        first, second = solved.T
        norms = torch.where(first.abs() > 0, 2 * second / (3 * first), torch.ones_like(first))
        norms = torch.where(torch.isfinite(norms) & (norms.abs() > 1e-6), norms, torch.ones_like(norms))
        return norms, first / (2 * norms.square())
    if homogeneous(head.name):
        grid = torch.ones(1, dtype=v.dtype, device=v.device)
    else:
        grid = torch.logspace(-2, 1.5, 141, dtype=v.dtype, device=v.device)
    grid = torch.cat([grid, -grid])

    def explained(n: Tensor) -> Tensor:
        """Share of each curve's energy for n (B,)."""
        slope = act.slope(n * v)
        return (slope * curves).sum(0).square() / slope.square().sum(0).clamp_min(1e-300)

    scores = torch.stack([explained(n.expand(v.shape[1])) for n in grid])
    best = grid[scores.argmax(0)]
    if not homogeneous(head.name):
        step = 10 ** (3.5 / 140)
        best = golden_section(lambda n: -explained(n), best / step, best * step, 40)
    slope = act.slope(best * v)
    return best, (slope * curves).sum(0) / slope.square().sum(0).clamp_min(1e-300) / best


def _profile_norms(head: TwoLayerHead, found: dict[int, Tensor], directions: Tensor) -> Tensor:
    """Norms (with sign) from how a sample's coefficients ``delta_i h_q(n_i)``, h_q Hermite's, fall with q."""
    dual = torch.linalg.inv(directions)
    orders = [q for q in found if q <= 3 or q == max(found)]
    seen = []
    for q in orders:
        letters = "abcd"[:q]
        spec = ",".join(["i" + letter for letter in letters])
        seen.append(torch.einsum(f"{letters}k,{spec}->ik", found[q], *[dual] * q))
    measured = torch.stack(seen, 1)  # (B, orders, mixtures)
    grid = torch.logspace(-2, 1.5, 701, dtype=dual.dtype).tolist()
    profiles = torch.tensor(
        [
            [hermite_coefficients(head.activation, sign * n)[q] for q in orders]
            for sign in (1, -1)
            for n in grid
        ],
        dtype=dual.dtype,
        device=dual.device,
    )
    unit = profiles / profiles.norm(dim=1, keepdim=True).clamp_min(1e-300)
    scores = torch.einsum("gq,iqk->gik", unit, measured).square().sum(2)
    signed = torch.tensor([*grid, *(-n for n in grid)], dtype=dual.dtype, device=dual.device)
    return signed[scores.argmax(0)]


def _upright(inputs: Tensor, weights: Tensor, head: TwoLayerHead) -> tuple[Tensor, Tensor]:
    """Turn inputs to a positive sum, as pixels have, where the gradient is the same for -x and -r (an even s')."""
    slope = head.activation.slope
    probe = torch.linspace(0.1, 3, 30, dtype=torch.float64)
    if not torch.allclose(slope(probe), slope(-probe), rtol=1e-9, atol=1e-12):
        return inputs, weights
    sign = torch.where(inputs.sum(1) < 0, -1.0, 1.0).to(inputs)
    return inputs * sign[:, None], weights * sign


def published(
    head: TwoLayerHead, gradient: Tensor, wide: Tensor | None, batch: int, generator: torch.Generator
) -> Estimate:
    """The estimator as published: averages over Gaussian neurons, from the head's gradient or the wide layer's.

    `gradient` is g (m,), ``sum_i r_i s(w_j . x_i)``, and `wide` (m, d) is ``sum_i r_i s'(w_j . x_i) x_i``; None: the
    last layer's view. The activation's second and third Hermite coefficients must not be zero.

    References
    ----------
    Wang, Lee, Lei, "Reconstructing Training Data from Model Gradient, Provably", AISTATS 2023, alg. 1, app. B.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    coefficients = hermite_coefficients(head.activation)
    if min(abs(coefficients[2]), abs(coefficients[3])) < 1e-6:
        raise NotApplicable(
            f"method 'published' with {head.name}: its second or third Hermite coefficient is zero; use "
            "method 'exact'"
        )
    scale = float(head.wide.square().mean().sqrt())
    w = head.wide / scale
    m = len(w)
    half = None if wide is None else wide.T @ w / m

    def product(vector: object) -> object:
        x = torch.as_tensor(vector, dtype=torch.float64, device=w.device).flatten()
        if half is not None:
            return ((half @ x + half.T @ x) / 2).cpu().numpy()
        return ((w.T @ (gradient * (w @ x))) / m - gradient.mean() * x).cpu().numpy()

    d = w.shape[1]
    start = torch.randn(d, dtype=torch.float64, generator=generator).numpy()
    operator = LinearOperator((d, d), matvec=product, dtype=float)
    _, vectors = eigsh(operator, k=batch, which="LM", v0=start)
    basis = torch.linalg.qr(torch.from_numpy(vectors).to(w)).Q
    v = w @ basis
    if wide is None:
        second = moments.stein_second(v, gradient)
        third = moments.stein_third(v, gradient)
    else:
        inside = wide @ basis
        second = symmetric(v.T @ inside / m)
        eye = torch.eye(batch, dtype=v.dtype, device=v.device)
        third = symmetric(torch.einsum("ja,jb,jc->abc", v, v, inside) / m - eye[:, :, None] * inside.mean(0))
    directions = simdiag(slices(third), generator)
    dual = torch.linalg.inv(directions)
    p = torch.einsum("ab,ia,ib->i", second, dual, dual)
    t = torch.einsum("abc,ia,ib,ic->i", third, dual, dual, dual)
    # n t / p follows from E s''' / E s'' at the typical |w.x| = n scale; exact for the cubic.
    grid = torch.logspace(-3, 3, 1201, dtype=torch.float64)
    ratios = torch.tensor([_ratio(head, float(n)) for n in grid], dtype=torch.float64)
    wanted = (t / p).cpu()
    nearest = (ratios[None] - wanted.abs()[:, None]).abs().argmin(1)
    norms = grid[nearest].to(w) * torch.sign(wanted).to(w)
    inputs = (basis @ (directions * norms)).T / scale
    inputs, weights = _upright(inputs, p, head)
    sign = torch.where(inputs.sum(1) < 0, -1.0, 1.0).to(inputs)
    return Estimate(inputs * sign[:, None], weights, [], {"order": 3})


def _ratio(head: TwoLayerHead, n: float) -> float:
    coefficients = hermite_coefficients(head.activation, n)
    second, third = coefficients[2] * math.sqrt(2), coefficients[3] * math.sqrt(6)
    return abs(third / second) if second else math.inf
