"""Whether samples bear the label under which they were registered."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from fedattack.unlearning.gates.base import Desk, Gate
from fedattack.unlearning.requests import Deletion


@dataclass
class Label(Gate):
    """Refuses samples whose pixels the client registered under another label; unknown pixels pass."""

    def before(self, deletion: Deletion, desk: Desk) -> str | None:
        """See the class."""
        if deletion.images is None or deletion.labels is None:
            return None
        registered = desk.registered(deletion.client)
        known: defaultdict[bytes, set[int]] = defaultdict(set)
        for digest, label in zip(registered.pixels, registered.labels, strict=True):
            known[digest].add(label)
        asked = zip(registered.digests(deletion.images), deletion.labels.tolist(), strict=True)
        wrong = sum(digest in known and label not in known[digest] for digest, label in asked)
        return f"{wrong} of {deletion.samples} samples were registered under another label" if wrong else None
