"""How much accuracy forgetting may cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedattack.config import Fraction
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Auxiliary
from fedattack.training import sample_logits
from fedattack.unlearning.gates.base import Desk, Gate
from fedattack.unlearning.history import Weights
from fedattack.unlearning.mechanism import Mechanism
from fedattack.unlearning.requests import Deletion


@dataclass
class Guard(Gate):
    """Keeps the old model where forgetting costs accuracy on the server's own labelled images.

    Those are the public auxiliary images, never held-out samples that damage is measured on.

    Parameters
    ----------
    drop
        The accuracy that may be lost, in [0, 1].
    """

    drop: Fraction = 0.02

    def check(self, name: str, mechanism: Mechanism, auxiliary: Auxiliary | None) -> None:
        """A server without labelled images sees no accuracy."""
        if auxiliary is None or auxiliary.labels is None or not len(auxiliary):
            raise NotApplicable(
                f"setting 'gates.names': gate {name!r} watches the accuracy on labelled auxiliary images, and the "
                "server has none; raise data.auxiliary_size, or give labelled ones with data.auxiliary"
            )

    def after(self, deletions: Sequence[Deletion], weights: Weights, desk: Desk) -> str | None:
        """See the class."""
        assert desk.auxiliary is not None, "checked before the first round"
        assert desk.auxiliary.labels is not None
        model, images, labels = (
            build_model(desk.scenario.model).eval(),
            desk.auxiliary.images,
            desk.auxiliary.labels,
        )
        before, now = (
            float((sample_logits(model, state, images).argmax(1) == labels).float().mean())
            for state in (desk.weights, weights)
        )
        if before - now <= self.drop:
            return None
        return (
            f"accuracy on the server's {len(labels)} images would fall from {before:.3f} to {now:.3f}; "
            f"gates.guard.drop is {self.drop:g}"
        )
