"""Which moment of the gradient names the samples: Hermite coefficients of the activation."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from adversaries.inversion.gradients import closed_form
from adversaries.inversion.gradients.closed_form import Activation
from fedattack.errors import NotApplicable

ACTIVATIONS: dict[str, Activation] = {
    **closed_form.ACTIVATIONS,
    "poly3": Activation(lambda u: u * u * (1 + u), lambda u: u * (2 + 3 * u), lambda u: 2 + 6 * u),
}
"""By the name used in the configuration."""

MAX_ORDER = 5
_NODES = 200
_ZERO = 1e-6


def hermite_coefficients(activation: Activation, scale: float = 1.0) -> list[float]:
    """Coefficients E[s(scale Z) h_p(Z)] of an activation, p = 0 .. :data:`MAX_ORDER`, Z standard normal.

    h_p is the orthonormal (probabilists') Hermite polynomial; by Stein's lemma the p-th coefficient is
    ``scale^p E[s^(p)(scale Z)] / sqrt(p!)``. Gauss-Hermite quadrature: exact for polynomials, and its symmetric nodes
    keep the coefficients that vanish by parity at rounding level.
    """
    nodes, weighted_basis = _quadrature()
    values = activation.value(torch.from_numpy(scale * nodes)).numpy()
    return [float(c) for c in values @ weighted_basis]


@lru_cache(maxsize=1)
def _quadrature() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes (n,) and orthonormal polynomials there times the weights, (n, orders)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    basis = np.polynomial.hermite_e.hermevander(nodes, MAX_ORDER)
    norms = np.sqrt([math.factorial(p) for p in range(MAX_ORDER + 1)])
    return nodes, weights[:, None] * basis / norms / math.sqrt(2 * math.pi)


def stein_order(activation: Activation) -> int:
    """The order of the tensor to decompose: 3, or 4 where the third Hermite coefficient vanishes.

    NotApplicable where both vanish, as for linear and quadratic activations: then only sums over the batch leak.
    """
    coefficients = hermite_coefficients(activation)
    scale = max(abs(c) for c in coefficients)
    for order in (3, 4):
        if abs(coefficients[order]) > _ZERO * scale:
            return order
    raise NotApplicable(
        "linear or quadratic activation: the third and fourth Hermite coefficients are zero, so that the gradient "
        "holds only sums over the batch and single samples are not identifiable; use poly3, tanh, sigmoid, gelu, "
        "softplus or relu"
    )


def is_polynomial(name: str) -> bool:
    """Whether regression on polynomials of the weights is an identity for this activation."""
    return name == "poly3"


def homogeneous(name: str) -> bool:
    """Whether s(c u) = c s(u) for c > 0, so that weights and scales of the samples cannot be told apart."""
    return name == "relu"
