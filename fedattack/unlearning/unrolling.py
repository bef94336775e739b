"""Forgetting by one gradient at the initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from fedattack.observation import Scenario
from fedattack.training import weight_step
from fedattack.unlearning.central import Central
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion
from fedattack.unlearning.trajectory import refuse_defended


@dataclass
class Unrolling(Mechanism):
    """Single-gradient unlearning (Thudi et al., Unrolling SGD, 2022): add back what the samples took at the start.

    To first order SGD moves from w_0 by the sum of the gradients *at w_0*: a sample's part is its gradient there
    times the learning rate over the batch size, once for each batch that held it (section 4). What the gradients
    changed on the way is neglected; `predict` says how much that may be, ``rate |w_T - w_0| / T * s * (T^2 - T) / 2``
    with s the largest singular value of the Hessian, a mean of the start's and the end's (section 5). The training
    loss by which the authors keep s small is not part of the mechanism.

    Parameters
    ----------
    predict : int
        Samples, drawn, on which s is found, at some dozens of gradients over them; 0: no prediction.
    """

    runs: ClassVar[Literal["server", "central"]] = "central"
    predict: Annotated[int, Field(ge=0)] = 0

    def check(self, name: str, scenario: Scenario, clients: int) -> None:
        """Refuse (NotApplicable) steps that are not SGD's."""
        super().check(name, scenario, clients)
        refuse_defended(name, scenario)

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`."""
        excluded, before = merged(history.excluded, deletions), history.excluded.get(0, frozenset())
        central, training = trainer.central(), history.scenario.training
        fedavg = training.protocol == "fedavg"
        rate = training.learning_rate if fedavg else -weight_step(training, "gradient")
        new, first = excluded.get(0, frozenset()) - before, history.checkpoint(0)
        parts, steps = np.zeros(len(central)), 0
        for round in range(1, history.rounds + 1):
            for batch in central.batches(round, before):
                steps += bool(len(batch))
                parts[batch] += rate / max(1, len(batch))
        start, end = central.flat(first), central.flat(history.weights)
        back = torch.zeros_like(end)
        lost = np.array(sorted(new), np.int64)
        for part in np.unique(parts[lost]):
            back += part * central.gradient(start, first, lost[parts[lost] == part])
        details: dict[str, float] = {"distance": float(back.norm())}
        if self.predict:
            left = central.retained(excluded.get(0, frozenset()))
            drawn = torch.randperm(len(left), generator=central.rng("unrolling"))[: self.predict].numpy()
            curves = [_curvature(central, flat, first, left[np.sort(drawn)]) for flat in (start, end)]
            moved = float((end - start).norm()) / steps
            details["predicted_error"] = rate * moved * sum(curves) / 2 * (steps**2 - steps) / 2
        return Forgotten(central.weights(end + back, history.weights), excluded, 0, details=details)


def _curvature(central: Central, flat: Tensor, base: Weights, positions: np.ndarray) -> float:
    """Largest singular value of the mean loss's Hessian."""

    def product(vector: np.ndarray) -> np.ndarray:
        found = central.product(flat, base, torch.from_numpy(vector.reshape(-1)).to(flat), positions)
        return found.numpy() / len(positions)

    operator = LinearOperator((len(flat), len(flat)), matvec=product, dtype=np.float64)
    draws = torch.randn(len(flat), generator=central.rng("curvature")).double().numpy()
    return float(np.abs(eigsh(operator, k=1, tol=1e-2, v0=draws, return_eigenvectors=False)[0]))
