"""Forgetting by walking through the training again, with gradients that are mostly estimated from the kept ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Scenario
from fedattack.training import weight_step
from fedattack.unlearning.curvature import CompactBFGS
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.mechanism import Excluded, Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion
from fedattack.unlearning.trajectory import Part, parts, recorded, refuse_defended, saved


@dataclass
class DeltaGrad(Mechanism):
    """DeltaGrad (Wu, Dobriban and Davidson, 2020): the training again, its gradients by quasi-Newton estimates.

    Every step's weights w_t and batch gradient g_t are kept. On the way without the forgotten samples a step costs
    the gradients of those in its batch alone: the rest is ``B (H (w - w_t) + g_t)``, H the compact L-BFGS matrix of
    the last exact steps (algorithms 1 and 2; the new way is kept in its turn for the next deletion, algorithm 3).
    Until a forgotten sample is met the kept steps are taken as they are. Exact are the first steps after it, every
    `period`-th, and all for which there is no pair: one that curves downwards, or more than SGD at its rate can
    follow (2 / rate), empties the memory, as may happen in a deep model. A batch of which nothing is left moves
    nothing. The batches are those of the training, whatever ``unlearning.draws`` says. The smaller they are, the
    less the last steps tell of the next one's curvature.

    Parameters
    ----------
    period : int
        T0: steps from one exact gradient to the next.
    first : int
        j0: exact steps after the first forgotten sample is met.
    memory : int
        m: pairs that make up the L-BFGS matrix.
    """

    runs: ClassVar[Literal["server", "central"]] = "central"
    period: Annotated[int, Field(ge=1)] = 8
    first: Annotated[int, Field(ge=1)] = 10
    memory: Annotated[int, Field(ge=1)] = 8

    def check(self, name: str, scenario: Scenario, clients: int) -> None:
        """Refuse (NotApplicable) steps that are not SGD's, and BatchNorm, whose batch has no sum of gradients."""
        super().check(name, scenario, clients)
        refuse_defended(name, scenario)
        parts = build_model(scenario.model).modules()
        if scenario.training.batch_norm == "train" and any(
            isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts
        ):
            raise NotApplicable(
                f"setting 'training.batch_norm' = 'train': with a batch's own statistics its gradient is no sum over "
                f"samples, which {name!r} needs; use 'eval', or another model"
            )

    def prepare(self, excluded: Excluded, history: History, trainer: Trainer) -> Weights:
        """Keep the steps of the training, walked again."""

        def rows(one: Part) -> dict[str, Tensor]:
            begins = torch.tensor(one.begins)
            return {"weights": one.weights, "gradients": one.gradients, "begins": begins}

        return recorded(trainer.central(), history, "deltagrad", excluded.get(0, frozenset()), rows)

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`."""
        excluded, before = merged(history.excluded, deletions), history.excluded.get(0, frozenset())
        after = excluded.get(0, frozenset())
        central, training, base = trainer.central(), history.scenario.training, history.weights
        fedavg = training.protocol == "fedavg"
        rate = training.learning_rate if fedavg else -weight_step(training, "gradient")
        decay, momentum = (training.weight_decay, training.momentum) if fedavg else (0.0, 0.0)
        new, pairs = np.array(sorted(after - before), np.int64), CompactBFGS(self.memory)
        w = central.flat(history.checkpoint(0))
        since, exact, size = 0, 0, 0  # steps since a forgotten sample was met; exact gradients; bytes

        def summed(positions: Collection[int]) -> Tensor:
            return central.gradient(w, base, np.asarray(positions, np.int64))

        velocity: Tensor | None = None
        for number, batches, kept in parts(history.folder, "deltagrad", before):
            velocity = None if kept["begins"] else velocity
            weights, gradients, left = [], [], []
            for batch, w_t, g_t in zip(batches, kept["weights"], kept["gradients"], strict=False):
                lost = np.isin(batch, new)
                weights.append(w)
                left.append(batch[~lost])
                away = w - w_t
                if lost.all():  # emptied, now or before
                    gradients.append(torch.zeros_like(w))
                    continue
                if since or lost.any():
                    since += 1
                if not away.any():
                    whole = len(batch) * g_t
                elif since <= self.first or (since - self.first) % self.period == 0 or not pairs.pairs:
                    whole, exact = summed(batch), exact + 1
                    if not pairs.add(away, whole / len(batch) - g_t, 2 / rate):
                        pairs.pairs.clear()
                else:
                    whole = len(batch) * (pairs.product(away) + g_t)
                mean = (whole - summed(batch[lost])) / int((~lost).sum())
                gradients.append(mean)
                slope = mean + decay * w
                velocity = slope if velocity is None else momentum * velocity + slope
                w = w - rate * velocity
            rows = {"weights": torch.stack([*weights, w]), "gradients": torch.stack(gradients)}
            rows["begins"] = kept["begins"]
            size += saved(history.folder, "deltagrad", after, number, left, **rows)
        details = {"exact_steps": exact, "bytes_kept": size}
        return Forgotten(central.weights(w, base), excluded, 0, details=details)
