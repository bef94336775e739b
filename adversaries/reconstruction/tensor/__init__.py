"""Reconstruction of whole batches by tensor decomposition (Wang, Lee, Lei, AISTATS 2023), made exact."""

from __future__ import annotations

from adversaries.reconstruction.tensor.attack import TensorAttack

__all__ = ["TensorAttack"]
