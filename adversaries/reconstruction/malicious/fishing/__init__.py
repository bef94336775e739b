"""Fishing for user data: one image of a batch is isolated by a head of the server's own."""

from adversaries.reconstruction.malicious.fishing.attack import Fishing

__all__ = ["Fishing"]
