"""How far forgetting may move the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedattack.config import Strength
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Auxiliary
from fedattack.task import trained_parameters
from fedattack.unlearning.gates.base import Desk, Gate, distance
from fedattack.unlearning.history import Weights
from fedattack.unlearning.mechanism import Mechanism
from fedattack.unlearning.requests import Deletion


@dataclass
class Cap(Gate):
    """Keeps the old model where forgetting moves the weights further than random deletions do.

    What those would do, the server finds out: it forgets as many random samples of the same clients, which costs as
    much again.

    Parameters
    ----------
    factor
        How many times that distance is too much.
    limit
        A distance instead (Euclidean, over all trained parameters); None: `factor` holds.
    """

    factor: Strength = 2.0
    limit: Strength | None = None

    def check(self, name: str, mechanism: Mechanism, auxiliary: Auxiliary | None) -> None:
        """A server without the samples cannot draw some."""
        if self.limit is None and not mechanism.by_positions:
            raise NotApplicable(
                f"setting 'gates.names': gate {name!r} forgets random samples beside those asked for, and this "
                "mechanism has to be sent the samples; set gates.cap.limit, the distance that is too much"
            )

    def after(self, deletions: Sequence[Deletion], weights: Weights, desk: Desk) -> str | None:
        """See the class."""
        names = list(trained_parameters(build_model(desk.scenario.model)))
        moved = distance(weights, desk.weights, names)
        if self.limit is not None:
            if moved <= self.limit:
                return None
            return f"the weights would move by {moved:.3g}; gates.cap.limit is {self.limit:g}"
        usual = distance(desk.control(deletions), desk.weights, names)
        if moved <= self.factor * usual:
            return None
        return (
            f"the weights would move by {moved:.3g}, by {usual:.3g} if as many random samples were forgotten; "
            f"gates.cap.factor is {self.factor:g}"
        )
