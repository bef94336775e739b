"""Whether samples were trained on."""

from __future__ import annotations

from dataclasses import dataclass

from fedattack.unlearning.gates.base import Desk, Gate
from fedattack.unlearning.requests import Deletion


@dataclass
class Digest(Gate):
    """Refuses samples that are not, or not as often, or no longer, among the client's by salted digest and label.

    Members that were chosen to do harm, and planted ones, pass: they are members.
    """

    def before(self, deletion: Deletion, desk: Desk) -> str | None:
        """See the class."""
        if deletion.images is None or deletion.labels is None:
            return None
        gone = desk.forgotten.get(deletion.client, ())
        places = desk.registered(deletion.client).find(deletion.images, deletion.labels, gone)
        lost = places.count(None)
        return (
            f"{lost} of {len(places)} samples are none of the client's by their digest and label"
            if lost
            else None
        )
