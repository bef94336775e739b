"""Reconstruction attacks: private images from one client's update.

:mod:`~adversaries.reconstruction.engine` matches gradients, whatever the model; an attack over it chooses objective,
start and optimiser. :mod:`~adversaries.reconstruction.hcgla` is the attack on compressed updates.
"""
