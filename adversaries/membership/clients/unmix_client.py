"""A client that explains every step of the global model by the candidates."""

from __future__ import annotations

from dataclasses import dataclass

from adversaries.membership.clients.steps import ReadsSteps


@dataclass
class UnmixClient(ReadsSteps):
    """Each step of the global model that a client is sent, explained by all candidates at once; passive.

    What the server does to one client's update, a client does to the mean of all: it sees both ends of the step.
    """
