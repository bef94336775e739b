"""Named settings of the matching attacks, and those that several of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from adversaries.inversion.matching.settings import Matching

Start = Literal["random", "uniform", "grey", "mean", "tiled"]
LocalSteps = Literal["unrolled", "surrogate", "ignored"]


@dataclass(frozen=True)
class Recipe:
    """One named setting of an attack.

    `tv` is the weight of the mean absolute difference of neighbouring pixels, vertical plus horizontal; of
    standardised pixels where these are what the optimiser turns; the other regularisers are `matching`'s. `labels`:
    a key of :data:`adversaries.inversion.evidence.labels.label_strategies.STRATEGIES`, or "joint": soft labels are
    optimised beside the images. `start`: "random" (N(0, 1) pixels, or standardised ones), "uniform" (U[0, 1]),
    "grey" (0.5), "mean" (of the auxiliary images) or "tiled" (a random quarter four times). `note`: where the
    settings are from and what differs.
    """

    matching: Matching
    tv: float = 0.0
    labels: str = "auto"
    start: Start = "random"
    restarts: int = 1
    note: str = ""

    @property
    def standardised(self) -> bool:
        """Whether the optimiser turns standardised pixels."""
        return self.matching.parametrisation == "standardised"


def torch_lbfgs(calls: int, **others: Any) -> Matching:
    """L-BFGS as ``torch.optim.LBFGS`` runs it by default: `calls` calls of 20 iterations, 100 pairs, full steps."""
    return Matching(
        objective="masked-l2",
        optimiser="lbfgs",
        line_search="none",
        iterations=20 * calls,
        memory=100,
        block=20,
        **others,
    )


BACKTRACKING = Matching(
    objective="masked-l2",
    optimiser="lbfgs",
    line_search="armijo",
    parametrisation="standardised",
    iterations=1200,
)
"""DLG's objective with a line search and a start on the pixels' own scale: it does not diverge."""

ZHU = Recipe(
    torch_lbfgs(50, learning_rate=1e-4, parametrisation="standardised", units="absolute"),
    tv=1e-3,
    restarts=2,
    note="SemSim's --optim zhu, which is not DLG's own setting: known label, learning rate 1e-4, total variation",
)
