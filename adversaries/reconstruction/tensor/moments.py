"""From gradients to symmetric tensors: regression on Hermite polynomials, and the published averages.

Both estimate the coefficients of ``y(u) = sum_i r_i phi(u . c_i) c_i`` in products of orthonormal Hermite
polynomials of u, whose degree-q part is the symmetric tensor ``sum_i r_i E[phi^(q)] c_i^(q+1) / sqrt(q!)``. An
average over random u has an error of sqrt(d / m); least squares has none where y is a polynomial of the degree used.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedattack.errors import NotApplicable

_BLOCK = 1024
"""Rows of the design matrix that are formed at once."""

_LARGE = 1500
"""From this many products on, the Gram matrix is gathered in float32."""

_REFINEMENTS = 12
_SETTLED = 1e-9


def feature_count(dimension: int, degree: int) -> int:
    """Polynomials of `dimension` variables up to `degree`: (B+1)(B+2)/2 for degree 2."""
    return math.comb(dimension + degree, degree)


@dataclass(frozen=True)
class HermiteBasis:
    """Orthonormal products of Hermite polynomials in B variables up to a degree.

    `monomials`: degree q -> int64 (F_q, q), the variables of each product, ascending, repeated by their power;
    `factors`: q -> (variables, power, products), the factors of all products, grouped by power and place.
    """

    dimension: int
    degree: int
    monomials: dict[int, Tensor]
    factors: dict[int, list[tuple[Tensor, int, Tensor]]]

    @classmethod
    def build(cls, dimension: int, degree: int) -> HermiteBasis:
        """All products up to `degree` (at most 4)."""
        chosen: dict[int, Tensor] = {}
        for q in range(1, degree + 1):
            rows = list(itertools.combinations_with_replacement(range(dimension), q))
            chosen[q] = torch.tensor(rows, dtype=torch.int64).reshape(-1, q)
        return cls(dimension, degree, chosen, {q: _factors(rows, q) for q, rows in chosen.items()})

    @property
    def count(self) -> int:
        """Columns of the design matrix."""
        return feature_count(self.dimension, self.degree)

    def columns(self, u: Tensor) -> Tensor:
        """The design matrix (m, F) at u (m, B): constant, then degree 1, 2, ..."""
        one = [torch.ones_like(u), u]
        for q in range(2, self.degree + 1):
            one.append((u * one[-1] - math.sqrt(q - 1) * one[-2]) / math.sqrt(q))
        parts = [torch.ones_like(u[:, :1])]
        for q, monomials in self.monomials.items():
            product = torch.ones(len(u), len(monomials), dtype=u.dtype, device=u.device)
            for variable, power, where in self.factors[q]:
                product[:, where] *= one[power][:, variable]
            parts.append(product)
        return torch.cat(parts, 1)

    def tensors(self, coefficients: Tensor) -> dict[int, Tensor]:
        """Degree q -> full symmetric tensor (B, ..., B, outputs) of regression coefficients (F, outputs).

        Entries are those of ``sum_i w_i c_i^q``; a product with multiplicities a has sqrt(q! / a!) of it.
        """
        found: dict[int, Tensor] = {}
        start = 1
        outputs = coefficients.shape[1]
        for q, monomials in self.monomials.items():
            part = coefficients[start : start + len(monomials)]
            start += len(monomials)
            # How often each variable came up to its place, multiplied: the factorials of the multiplicities.
            factorials = (monomials[:, :, None] == monomials[:, None]).tril().sum(2).prod(1).to(part)
            part = part * (factorials / math.factorial(q)).sqrt()[:, None]
            full = part.new_zeros(*[self.dimension] * q, outputs)
            for order in itertools.permutations(range(q)):
                full[tuple(monomials[:, place] for place in order)] = part
            found[q] = full
        return found


def _factors(monomials: Tensor, q: int) -> list[tuple[Tensor, int, Tensor]]:
    """(variables, power, products) of the runs of equal variables in each product, by place and length."""
    same = monomials[:, :, None] == monomials[:, None]
    begins, lengths = same.tril().sum(2) == 1, same.triu().sum(2)
    factors = []
    for place in range(q):
        for power in range(1, q + 1):
            where = torch.nonzero(begins[:, place] & (lengths[:, place] == power)).flatten()
            if len(where):
                factors.append((monomials[where, place], power, where))
    return factors


def regress(u: Tensor, y: Tensor, degree: int) -> tuple[dict[int, Tensor], float]:
    """Least squares of y (m, outputs) on Hermite products of u (m, B), about white, both float64.

    The design matrix is formed block by block and never kept. Its Gram matrix is gathered and factored in float32
    where it is large: the products are nearly orthonormal, so that a few steps of iterative refinement in float64
    reach float64's accuracy; where they do not, the Gram matrix is formed again in float64. Memory is that of one
    Gram matrix and its factor. Answers degree -> (B, ..., B, outputs), and |y - fit| / |y|.
    """
    basis = HermiteBasis.build(u.shape[1], degree)
    if len(u) < basis.count:
        raise NotApplicable(
            f"width {len(u)} < {basis.count}: regression of degree {degree} for B = {u.shape[1]} samples needs at "
            "least that many neurons ((B+1)(B+2)/2 for degree 2)"
        )
    blocks = list(zip(u.split(_BLOCK), y.split(_BLOCK), strict=True))
    for precision in (torch.float32, torch.float64):
        if precision == torch.float32 and basis.count < _LARGE:
            continue
        gram = torch.zeros(basis.count, basis.count, dtype=precision, device=u.device)
        for rows, _ in blocks:
            design = basis.columns(rows.to(precision))
            gram.addmm_(design.T, design)
        gram.diagonal().add_(torch.finfo(precision).eps * float(gram.diagonal().mean()))
        factor, failed = torch.linalg.cholesky_ex(gram)
        del gram
        if not int(failed):
            solution, unexplained, settled = _refined(basis, blocks, factor)
            if settled or precision == torch.float64:
                return basis.tensors(solution), unexplained
        del factor
    raise NotApplicable(
        f"width {len(u)}: the weights sent do not tell {basis.count} products of degree {degree} apart; they must be "
        "independent draws"
    )


def _refined(
    basis: HermiteBasis, blocks: list[tuple[Tensor, Tensor]], factor: Tensor
) -> tuple[Tensor, float, bool]:
    """Iterative refinement from zero: (solution, unexplained share, whether the steps died out)."""
    outputs = blocks[0][1].shape[1]
    solution = torch.zeros(basis.count, outputs, dtype=torch.float64, device=factor.device)
    total = sum(float(values.square().sum()) for _, values in blocks)
    steps: list[float] = []
    while True:
        defect = torch.zeros_like(solution)
        unexplained = 0.0
        for rows, values in blocks:
            design = basis.columns(rows)
            left = torch.addmm(values, design, solution, alpha=-1) if steps else values
            unexplained += float(left.square().sum())
            defect.addmm_(design.T, left)
        relative = math.sqrt(unexplained / max(total, 1e-300))
        if len(steps) == _REFINEMENTS or (len(steps) > 1 and steps[-1] < _SETTLED * steps[0]):
            return solution, relative, steps[-1] < _SETTLED * steps[0]
        step = torch.cholesky_solve(defect.to(factor.dtype), factor).double()
        solution += step
        steps.append(float(step.norm()))
        if not math.isfinite(steps[-1]) or steps[-1] > 2 * steps[0]:
            return solution, relative, False


def stein_second(w: Tensor, g: Tensor) -> Tensor:
    """The published order-2 average ``(1/m) sum_j g_j (w_j w_j' - I)``: w (m, d) normal, g (m,) -> (d, d)."""
    moment = (w * g[:, None]).T @ w / len(w)
    moment.diagonal().sub_(g.mean())
    return moment


def stein_third(v: Tensor, g: Tensor) -> Tensor:
    """The published order-3 average of g_j H_3(v_j) for v (m, B) standard normal and g (m,): (B, B, B).

    H_3(v) = v^(3) minus the symmetrisation of v and I (Wang, Lee, Lei 2023, section 4).
    """
    m, size = v.shape
    weighted = v * g[:, None]
    tensor = torch.einsum("ma,mb,mc->abc", weighted, v, v) / m
    mean = weighted.mean(0)
    eye = torch.eye(size, dtype=v.dtype, device=v.device)
    for spec in ("a,bc->abc", "b,ac->abc", "c,ab->abc"):
        tensor -= torch.einsum(spec, mean, eye)
    return tensor
