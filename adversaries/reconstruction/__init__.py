"""Reconstruction attacks: private images from one client's update.

:mod:`~adversaries.reconstruction.engine` matches gradients, whatever the model; an attack over it chooses its
:mod:`~adversaries.reconstruction.settings` (:mod:`~adversaries.reconstruction.objectives`,
:mod:`~adversaries.reconstruction.regularisers`, optimiser), a start, and what the optimiser turns
(:mod:`~adversaries.reconstruction.parametrise`, :mod:`~adversaries.reconstruction.charts`).
:mod:`~adversaries.reconstruction.hcgla` is the attack on compressed updates.
"""
