"""iDLG: DLG with the label read from the gradient's signs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from adversaries.needs import Needs
from adversaries.reconstruction.matching.base import OptimisationAttack
from adversaries.reconstruction.matching.recipes import BACKTRACKING, Recipe, torch_lbfgs


@dataclass
class IDLG(OptimisationAttack):
    """iDLG: the label from the last layer's signs, then DLG's search for the image alone (Zhao et al. 2020).

    Batch 1 only, as published; ``idlg.labels = "auto"`` lifts that. Presets and deviations as for
    :class:`~adversaries.reconstruction.matching.dlg.DLG`.

    References
    ----------
    Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020.
    """

    needs: ClassVar[Needs] = dataclasses.replace(OptimisationAttack.needs, labels="idlg", images=1)
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "published": Recipe(torch_lbfgs(300, learning_rate=1.0), labels="idlg"),
        "backtracking": Recipe(BACKTRACKING, labels="idlg"),
    }
