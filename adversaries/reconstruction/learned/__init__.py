"""Attacks that learn to invert on public images."""
