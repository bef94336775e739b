"""Secure aggregation: the server sees the sum of a round's updates and none of them alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedattack.defenses.base import Defense


@dataclass
class SecureAggregation(Defense):
    """Let only the sum over a round's clients reach the server: one observation a round, of everyone.

    The sum is weighted by the clients' examples, so that under fedsgd it is the gradient over all their batches
    together; sparse updates are summed on the union of what was sent. Masks, key agreement and recovery from dropouts
    are not simulated: what is left of them for the server is the sum over those that answered.

    References
    ----------
    Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, 2017.
    """

    aggregates: ClassVar[bool] = True
