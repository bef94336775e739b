"""Whose the samples are."""

from __future__ import annotations

from dataclasses import dataclass

from fedattack.unlearning.gates.base import Desk, Gate
from fedattack.unlearning.requests import Deletion


@dataclass
class Ownership(Gate):
    """Refuses samples whose pixels the client did not register, whatever their label.

    Positions name samples that it registered.
    """

    def before(self, deletion: Deletion, desk: Desk) -> str | None:
        """See the class."""
        if deletion.images is None:
            return None
        registered = desk.registered(deletion.client)
        own = set(registered.pixels)
        foreign = sum(digest not in own for digest in registered.digests(deletion.images))
        return (
            f"{foreign} of {deletion.samples} samples were not registered by this client" if foreign else None
        )
