"""Reconstruction of whole batches by tensor decomposition (Wang, Lee, Lei, AISTATS 2023), made exact."""

from adversaries.reconstruction.tensor.attack import TensorAttack

__all__ = ["TensorAttack"]
