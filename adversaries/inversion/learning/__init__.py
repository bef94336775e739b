"""Generators and denoisers trained on public images."""
