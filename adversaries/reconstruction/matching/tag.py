"""TAG-style weighting: squared plus absolute differences, layers near the input counting more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from adversaries.inversion.matching.settings import Matching
from adversaries.reconstruction.matching.base import OptimisationAttack
from adversaries.reconstruction.matching.recipes import Recipe


@dataclass
class TAG(OptimisationAttack):
    """TAG: squared differences plus alpha(layer) times absolute ones (Deng et al. 2021).

    alpha falls linearly from 0.1 at the first layer to 0.1 / L at the last, so that small gradients of early layers
    are not drowned.

    Deviations: the paper recovers tokens of a transformer, this is its distance on images; it gives alpha's form but
    not its values, which are ours, as are the optimiser's: Adam, learning rate 0.05 with decay, from N(0, 1), with
    labels inferred.

    References
    ----------
    Deng et al., "TAG: Gradient Attack on Transformer-based Language Models", Findings of EMNLP 2021.
    """

    recipes: ClassVar[Mapping[str, Recipe]] = {
        "published": Recipe(
            Matching(
                objective="l2-l1",
                parametrisation="standardised",
                layer_weights="falling",
                l1_share=0.1,
                optimiser="adam",
                learning_rate=0.05,
                iterations=4000,
            )
        )
    }
