"""Whether the model does unusually badly on what is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from fedattack.config import Strength
from fedattack.unlearning.gates.base import Desk, Gate
from fedattack.unlearning.requests import Deletion


@dataclass
class Loss(Gate):
    """Refuses samples whose mean loss is far above that of the client's other samples.

    Of samples that the request brings the server computes the loss. Of positions, and of the others, it has the
    client's word: the client is asked for its mean loss over all samples, and without those.

    Parameters
    ----------
    factor
        How many times the others' mean loss is too much.
    """

    factor: Strength = 3.0

    def before(self, deletion: Deletion, desk: Desk) -> str | None:
        """See the class."""
        client = deletion.client
        gone = set(desk.forgotten.get(client, ()))
        others = desk.mean_loss(client, gone | deletion.positions)
        if deletion.images is not None and deletion.labels is not None:
            mean: float | None = float(desk.losses(desk.weights, deletion.images, deletion.labels).mean())
        else:
            mean = desk.mean_loss_of(client, deletion.positions)
        if mean is None or others is None:
            return "the client has no other samples to compare their loss with"
        if not mean <= self.factor * others:
            return (
                f"mean loss {mean:.3g}, that of the client's others {others:.3g}; "
                f"gates.loss.factor is {self.factor:g}"
            )
        return None
