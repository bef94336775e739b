"""HCGLA: reconstruction from highly compressed gradients (Yang et al., IEEE TIFS 2023), and what beats it."""

from __future__ import annotations

from adversaries.reconstruction.hcgla.attack import HCGLA

__all__ = ["HCGLA"]
