"""Inverting Gradients, with the settings of its authors and of the SemSim benchmark by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from adversaries.inversion.matching.settings import Matching
from adversaries.reconstruction.matching.base import OptimisationAttack
from adversaries.reconstruction.matching.recipes import ZHU, Recipe, torch_lbfgs

_RATE = "learning rate 0.1, whatever its name says"


def _recipe(
    iterations: int, tv: float, restarts: int = 1, start: Any = "random", note: str = "", **others: Any
) -> Recipe:
    """The published method: cosine, Adam on signs with learning rate 0.1 and decay, pixels in their box."""
    settings: dict[str, Any] = {
        "objective": "cosine",
        "parametrisation": "standardised",
        "optimiser": "signed-adam",
        "learning_rate": 0.1,
        "clamp": True,
        "units": "absolute",
        "iterations": iterations,
    }
    return Recipe(Matching(**settings | others), tv=tv, start=start, restarts=restarts, note=note)


def _lbfgs() -> Recipe:
    matching = dataclasses.replace(
        torch_lbfgs(300, learning_rate=1e-4),
        objective="cosine",
        parametrisation="standardised",
        optimiser="signed-lbfgs",
        clamp=True,
    )
    return Recipe(matching, tv=1e-4, restarts=16, note="L-BFGS is shown the gradient's signs")


SEMSIM: dict[str, Recipe] = {
    "inversed": _recipe(8000, 1e-4),
    "inversed-zero": _recipe(4800, 1e-4, start="grey"),
    "inversed-sim-out": _recipe(4800, 1e-4, start="grey", objective="row-cosine"),
    "inversed-sgd-sim": _recipe(4800, 1e-4, optimiser="signed-sgd", learning_rate=0.01, momentum=0.9),
    "inversed-LBFGS-sim": _lbfgs(),
    "inversed-adam-L1": _recipe(4800, 1e-4, objective="l1"),
    "inversed-adam-L2": _recipe(4800, 1e-4, objective="masked-l2"),
    "zhu": ZHU,
    "inversed_large": _recipe(12_000, 1e-2),
    "inversed_large_24000_3_lr1": _recipe(24_000, 1e-1, 4, note=f"4 restarts and {_RATE}"),
    "inversed_large_12000_3_lr1": _recipe(12_000, 1e-1, 3, note=_RATE),
    "inversed_large_8000_3_lr1": _recipe(8000, 1e-1, 3, note=_RATE),
    "inversed_cele": _recipe(12_000, 1e-1, restarts=3),
}
"""The settings behind every ``--optim`` of the SemSim benchmark."""


@dataclass
class InvertingGradients(OptimisationAttack):
    """Inverting Gradients: the direction of the gradient and smooth images (Geiping et al. 2020).

    One minus the cosine between predicted and sent entries plus total variation, by Adam on the sign of the slope
    (learning rate 0.1 on standardised pixels, a tenth after 3/8, 5/8 and 7/8), pixels clamped to their range after
    each step.

    Presets: "published", the authors' for 32x32 images: 4,800 iterations, total variation 1e-4, one start;
    "published-large", for large ones: 24,000, 0.1, 8 starts; "backtracking", ours: the same cost by L-BFGS with
    a line search, 1,200 iterations, total variation 1e-3, two starts; "inversed", ..., "zhu", ..., "inversed_cele":
    every ``--optim`` of the SemSim benchmark, with its real settings where the names say otherwise.

    Deviations: images are standardised by 0.5 and 0.25 in every channel rather than by the data set's statistics; the
    answer is the point of lowest loss, not the last one. SemSim attacks networks in evaluation mode with BatchNorm's
    stored statistics; a client that trains uses its batch's (``ig.batch_norm``). SGD is without Nesterov's momentum.

    References
    ----------
    Geiping, Bauermeister, Dröge, Moeller, "Inverting Gradients: How easy is it to break privacy in federated
    learning?", NeurIPS 2020. Sun et al., "Privacy Assessment on Reconstructed Images: Are Existing Evaluation Metrics
    Faithful to Human Perception?", NeurIPS 2023 (SemSim).
    """

    recipes: ClassVar[Mapping[str, Recipe]] = {
        "published": _recipe(4800, 1e-4),
        "published-large": _recipe(24_000, 1e-1, restarts=8),
        "backtracking": _recipe(1200, 1e-3, restarts=2, optimiser="lbfgs", learning_rate=1.0),
        **SEMSIM,
    }
