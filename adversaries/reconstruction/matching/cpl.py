"""CPL: gradient matching with a label regulariser and a patterned start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.inversion.matching.problem import Penalty
from adversaries.reconstruction.matching.base import OptimisationAttack
from adversaries.reconstruction.matching.recipes import BACKTRACKING, Recipe, torch_lbfgs
from fedattack.config import Weight
from fedattack.models import build_model
from fedattack.observation import Observation
from fedattack.training import training_mode


@dataclass
class CPL(OptimisationAttack):
    """CPL: squared distance plus the squared error of the predicted label, from a tiled start (Wei et al. 2020).

    The client privacy leakage attack: L-BFGS with learning rate 1 and 300 calls as DLG's, from a random quarter
    repeated four times, which the paper found to start nearer to natural images than noise.

    Deviations: the weight of the label term is not published. On an untrained network the true image does not
    predict its label either, so that the term works against the answer; 1e-3 keeps it from deciding. Otherwise as
    for :class:`~adversaries.reconstruction.matching.dlg.DLG`, with labels inferred.

    Parameters
    ----------
    label_weight : float
        Of the mean over the batch of |softmax(z) - e_y|^2, in units of the update's squared norm.

    References
    ----------
    Wei et al., "A Framework for Evaluating Gradient Leakage Attacks in Federated Learning", ESORICS 2020.
    """

    recipes: ClassVar[Mapping[str, Recipe]] = {
        "published": Recipe(torch_lbfgs(300, learning_rate=1.0), start="tiled"),
        "backtracking": Recipe(BACKTRACKING, start="tiled"),
    }

    label_weight: Weight = 1e-3

    def penalty(
        self, observations: Sequence[Observation], labels: Tensor, device: torch.device
    ) -> Penalty | None:
        """The label regulariser."""
        if not self.label_weight:
            return None
        first = observations[0]
        how = self.recipe().matching.batch_norm or first.scenario.training.batch_norm
        module = training_mode(build_model(first.scenario.model).to(device), how)
        module.load_state_dict(dict(first.weights))
        module.requires_grad_(False)
        targets = F.one_hot(labels, first.scenario.model.classes or -1).float().to(device)

        def penalty(images: Tensor, shares: Tensor | None, rows: slice) -> Tensor:
            victims = torch.arange(rows.start, rows.stop, device=device) % len(targets)
            wanted = targets[victims] if shares is None else shares
            # One batch at a time: BatchNorm must not see other victims.
            predicted = torch.stack([module(batch).softmax(1) for batch in images])
            return self.label_weight * (predicted - wanted).square().sum(2).mean(1)

        return penalty
