"""Matrix-free Gauss-Newton: any differentiable network's gradient, inverted by second-order steps."""

from adversaries.reconstruction.gauss_newton.attack import GaussNewton

__all__ = ["GaussNewton"]
