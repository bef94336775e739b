"""Reconstruction attacks: private images from one client's update.

:mod:`~adversaries.inversion.matching.match` matches gradients, whatever the model; an attack over it chooses its
:mod:`~adversaries.inversion.matching.settings` (:mod:`~adversaries.inversion.matching.objectives`,
:mod:`~adversaries.inversion.matching.regularisers`, optimiser), a start, and what the optimiser turns
(:mod:`~adversaries.inversion.matching.pixels`, :mod:`~adversaries.inversion.matching.charts`).
:mod:`~adversaries.reconstruction.hcgla` is the attack on compressed updates.
"""
