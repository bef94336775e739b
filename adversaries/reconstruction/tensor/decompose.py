"""Symmetric tensor decomposition: directions c_i with ``T = sum_i t_i c_i^(3)`` (or (4)), not orthogonal.

All methods take the slices of the tensor, a stack of matrices ``M_k = C diag(a_k) C'`` (K, B, B), and answer C with
unit columns in any order and sign.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedattack.errors import ConfigError

Decomposer = Literal["simdiag", "jennrich", "als", "tensorly_power"]

_TRIALS = 20
_SWEEPS = 200
_SETTLED = 1e-14


def slices(tensor: Tensor) -> Tensor:
    """The slices (K, B, B) of a symmetric tensor of order 2, 3 or 4 over its last two modes."""
    return tensor.reshape(-1, *tensor.shape[-2:])


def symmetric(tensor: Tensor) -> Tensor:
    """The mean over the places of the last mode, of a tensor that is symmetric in the others."""
    return torch.stack([tensor.movedim(-1, place) for place in range(tensor.ndim)]).mean(0)


def off_diagonal(stack: Tensor, directions: Tensor) -> float:
    """Share of the stack's energy off the diagonal in the basis of `directions` (B, B); 0: diagonalised."""
    dual = _inverse(directions)
    if dual is None:
        return 1.0
    seen = dual @ stack @ dual.T
    total = float(seen.square().sum())
    diagonal = float(seen.diagonal(dim1=1, dim2=2).square().sum())
    return 1.0 - diagonal / max(total, 1e-300)


def jennrich(stack: Tensor, generator: torch.Generator, trials: int = _TRIALS) -> Tensor:
    """Eigenvectors of one random combination of slices over another; of `trials` draws, the best diagonaliser of all.

    References
    ----------
    Leurgans, Ross, Abel, "A decomposition for three-way arrays", SIAM J. Matrix Anal. Appl. 1993 (Jennrich's).
    """
    flat = stack.reshape(len(stack), -1)
    size = stack.shape[1]
    best, least = torch.eye(size, dtype=stack.dtype, device=stack.device), float("inf")
    for _ in range(trials):
        draws = torch.randn(2, len(stack), dtype=stack.dtype, generator=generator).to(stack.device)
        first, second = (draws @ flat).reshape(2, size, size)
        quotient, failed = torch.linalg.solve_ex(second.T, first.T)
        if int(failed):
            continue
        vectors = torch.linalg.eig(quotient.T).eigenvectors
        # Complex pairs are noise: their real and imaginary parts span the same plane.
        real = torch.where(vectors.imag.abs().amax(0) > 0, _split(vectors), vectors.real)
        real = real / real.norm(dim=0)
        share = off_diagonal(stack, real)
        if share < least:
            best, least = real, share
        if least < 1e-20:
            break
    return best


def _split(vectors: Tensor) -> Tensor:
    """Real parts of complex eigenvectors, and imaginary parts of their conjugates."""
    first = torch.zeros(vectors.shape[1], dtype=torch.bool, device=vectors.device)
    seen = False
    for column in range(vectors.shape[1]):
        if bool(vectors[:, column].imag.abs().max() > 0):
            first[column] = not seen
            seen = not seen
    return torch.where(first, vectors.real, vectors.imag)


def simultaneous_diagonalisation(stack: Tensor, start: Tensor, sweeps: int = _SWEEPS) -> Tensor:
    """Non-orthogonal joint diagonalisation by fast Frobenius steps, from directions (B, B).

    References
    ----------
    Ziehe, Laskov, Nolte, Mueller, "A fast algorithm for joint diagonalization with non-orthogonal transformations",
    JMLR 2004.
    """
    found = start / start.norm(dim=0)
    dual = _inverse(found)
    if dual is None:
        return found
    size = stack.shape[1]
    diagonal = torch.eye(size, dtype=torch.bool, device=stack.device)
    best, least = found, off_diagonal(stack, found)
    for _ in range(sweeps):
        seen = dual @ stack @ dual.T
        scale = seen.square().sum(0).diagonal().sqrt().sqrt().clamp_min(1e-150)
        dual = dual / scale[:, None]
        seen = seen / (scale[:, None] * scale[None, :])
        d = seen.diagonal(dim1=1, dim2=2)
        z = d.T @ d
        y = torch.einsum("kj,kij->ij", d, (seen + seen.transpose(1, 2)) / 2)
        square = torch.outer(z.diagonal(), z.diagonal()) - z.square()
        step = (z * y.T - z.diagonal()[:, None] * y) / square.masked_fill(diagonal, 1.0).clamp_min(1e-12)
        step = step.masked_fill(diagonal, 0.0)
        size_of_step = float(step.norm())
        if size_of_step > 0.9:
            step = step * (0.9 / size_of_step)
        dual = dual + step @ dual
        candidate = _inverse(dual)
        if candidate is None or not bool(torch.isfinite(candidate).all()):
            break
        candidate = candidate / candidate.norm(dim=0)
        share = off_diagonal(stack, candidate)
        if share < least:
            best, least = candidate, share
        if size_of_step < _SETTLED * size or least < 1e-28:
            break
    return best


def simdiag(stack: Tensor, generator: torch.Generator) -> Tensor:
    """Joint diagonalisation in two stages: from Jennrich's start on all slices, then on the slices it points to.

    The second contracts the stack with the directions found, so that one sample dominates each matrix (the plug-in
    contractions of Kuleshov, Chaganty, Liang, AISTATS 2015).
    """
    first = simultaneous_diagonalisation(stack, jennrich(stack, generator))
    dual = _inverse(first)
    if dual is None:
        return first
    weights = (dual @ stack @ dual.T).diagonal(dim1=1, dim2=2)
    weights = weights / weights.norm(dim=0).clamp_min(1e-300)
    plugged = torch.einsum("ki,kab->iab", weights, stack)
    second = simultaneous_diagonalisation(plugged, first)
    return second if off_diagonal(stack, second) <= 4 * off_diagonal(stack, first) else first


def als(stack: Tensor, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """tensorly's alternating least squares from Jennrich's directions: steady on noise, slow at the end without."""
    from tensorly import backend_context
    from tensorly.cp_tensor import CPTensor
    from tensorly.decomposition import parafac

    start = jennrich(stack, generator).cpu().numpy()
    array = tensor.cpu().numpy()
    size = array.shape[0]
    initial = CPTensor((np.ones(size), [start.copy() for _ in range(array.ndim)]))
    with warnings.catch_warnings(), backend_context("numpy"):  # whatever the environment asks for
        warnings.simplefilter("ignore")
        found = parafac(array, size, n_iter_max=500, tol=1e-12, init=initial, normalize_factors=True)
    factors = torch.from_numpy(np.array(found.factors[0])).to(stack)
    return factors / factors.norm(dim=0).clamp_min(1e-300)


def tensorly_power(tensor: Tensor, whitener: Tensor, seed: int) -> Tensor:
    """tensorly's symmetric power iteration on the tensor (B, B, B), whitened; NumPy's generator is restored."""
    from tensorly import backend_context
    from tensorly.decomposition import symmetric_parafac_power_iteration

    white = torch.einsum("abc,ai,bj,ck->ijk", tensor, whitener, whitener, whitener)
    size = len(whitener)
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        with backend_context("numpy"):
            _, factor = symmetric_parafac_power_iteration(
                white.cpu().numpy(), size, n_repeat=20, n_iteration=50, verbose=False
            )
    finally:
        np.random.set_state(state)  # noqa: NPY002
    factor = torch.from_numpy(np.array(factor)).to(tensor)
    back = torch.linalg.solve(whitener.T, factor)
    return back / back.norm(dim=0).clamp_min(1e-300)


def whitener_of(second: Tensor) -> Tensor | None:
    """W with ``W' P W = I``, or -I for a negative definite P (B, B); None for an indefinite one."""
    values, vectors = torch.linalg.eigh(second)
    if float(values.max()) < 0:
        values = -values
    if float(values.min()) <= 1e-12 * float(values.max()):
        return None
    return vectors / values.sqrt()


def decompose(
    method: Decomposer, tensor: Tensor, second: Tensor | None, generator: torch.Generator, seed: int
) -> tuple[Tensor, list[str]]:
    """Directions (B, B) of a symmetric tensor of order 3 or 4, float64, and warnings for a person.

    `second`, the second-order moment (B, B), is one more slice for "simdiag", and the whitening of "tensorly_power".
    """
    stack = slices(tensor)
    if method == "simdiag":
        if second is not None:
            typical = stack.square().sum((1, 2)).mean().sqrt()
            stack = torch.cat([stack, (second * (typical / second.norm().clamp_min(1e-300)))[None]])
        return simdiag(stack, generator), []
    if method == "jennrich":
        return jennrich(stack, generator), []
    if method == "als":
        return als(stack, tensor, generator), []
    if tensor.ndim != 3 or second is None:
        raise ConfigError(
            "setting 'tensor.decomposer' = 'tensorly_power': needs whitening by a second-order moment, which this "
            "activation does not give; use 'simdiag'"
        )
    whitener = whitener_of(second)
    if whitener is not None:
        return tensorly_power(tensor, whitener, seed), []
    note = (
        "P indefinite: whitening disabled; the power iteration is wrong on components that are not orthogonal"
    )
    return tensorly_power(tensor, torch.eye(len(second)).to(second), seed), [note]


def _inverse(matrix: Tensor) -> Tensor | None:
    inverse, failed = torch.linalg.inv_ex(matrix)
    return None if int(failed) or not bool(torch.isfinite(inverse).all()) else inverse
