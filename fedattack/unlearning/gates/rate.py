"""How many samples may be forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from fedattack.config import Count, Fraction
from fedattack.unlearning.gates.base import Desk, Gate
from fedattack.unlearning.requests import Deletion


@dataclass
class Rate(Gate):
    """Refuses what would go beyond so many samples of a client, or of all, earlier grants included.

    Parameters
    ----------
    share
        Of each client's samples.
    total
        Share of all clients' samples.
    limit
        Samples of each client; None: no such limit.
    least
        Samples that go in any case, as far as `limit` lets them: a share of few is none.
    """

    share: Fraction = 0.1
    total: Fraction = 0.05
    limit: Count | None = None
    least: Count = 4

    def before(self, deletion: Deletion, desk: Desk) -> str | None:
        """See the class."""
        client, every = deletion.client, sum(desk.sizes)
        wanted = desk.granted.get(client, 0) + deletion.samples
        together = sum(desk.granted.values()) + deletion.samples
        if self.limit is not None and wanted > self.limit:
            return f"{wanted} samples of this client; gates.rate.limit lets {self.limit} go"
        if wanted > max(self.least, self.share * desk.sizes[client]):
            return (
                f"{wanted} of this client's {desk.sizes[client]} samples; gates.rate.share lets a share of "
                f"{self.share:g} go"
            )
        if together > max(self.least, self.total * every):
            return f"{together} of all {every} samples; gates.rate.total lets a share of {self.total:g} go"
        return None
