"""Who sits where: an attack names one seat of these and one family's base, in any combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from adversaries.base import Attack
from fedattack.errors import RunFailed
from fedattack.observation import Auxiliary, Candidates, Observation, Scenario, UnlearningRequest


@dataclass
class CuriousServer(Attack):
    """Aggregates honestly and reads the observations; also the seat of an attack that names none."""

    seat = "curious server"


@dataclass
class MaliciousServer(Attack):
    """Sends weights of its own in the armed rounds, and reads what comes back.

    `adapts`: whether :meth:`tailor` asks what earlier rounds showed. `aggregates`: whether the armed weights and the
    replies to them become the global model; else it skips armed rounds.
    """

    seat = "malicious server"
    adapts: ClassVar[bool] = False
    aggregates: ClassVar[bool] = False

    def arm(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        seed: int,
        auxiliary: Auxiliary | None,
        candidates: Candidates | None = None,
        turn: int = 0,
    ) -> dict[str, Tensor]:
        """What is sent instead of the global model in an armed round: the same names, shapes and types.

        `weights` is the global state dict, not to be modified; `seed` seeds every draw and differs from round
        to round; `candidates` are the samples it will be asked about, where its question has some; `turn`: how many
        armed rounds lie before this one.
        """
        return weights

    def tailor(
        self, scenario: Scenario, weights: dict[str, Tensor], place: int, earlier: Sequence[Observation]
    ) -> dict[str, Tensor]:
        """What one client is sent differently in an armed round: a server may send each its own model.

        `weights` are those of :meth:`arm`, not to be modified; an observation of a sum over clients holds them.
        `place` is the client's among those drawn in the round, from 0, ascending. `earlier`: where :attr:`adapts`
        is set, what was seen of this client (of everyone, under secure aggregation) in earlier armed rounds, the
        latest last. Returns the tensors that differ, of the same shapes and types; none: all clients get
        `weights`.
        """
        return {}


class Oracle:
    """The global model as a service that answers at most `limit` images, and is no way to its weights."""

    def __init__(self, answer: Callable[[Tensor], Tensor], limit: int) -> None:
        self._answer, self.limit, self.used = answer, limit, 0

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities float32 (n, classes) of images (n, C, H, W); RunFailed where that is beyond the limit."""
        if self.used + len(images) > self.limit:
            raise RunFailed(f"asked {self.used + len(images)} queries of the model, granted are {self.limit}")
        self.used += len(images)
        return self._answer(images)


@dataclass(frozen=True)
class ClientView:
    """What a malicious client has before it.

    Parameters
    ----------
    round, client : int
        The round (the last one when it is asked at the end), and the client's own number.
    weights : dict of str to Tensor
        The global model that it was sent; not to be modified. Empty where :attr:`MaliciousClient.access` is not
        "weights".
    seed : int
        Seeds every draw; differs from round to round and client to client.
    memory : dict of str to Tensor
        Kept between rounds, to be written to; empty at first. Needs :attr:`MaliciousClient.keeps_memory`.
    requests : int
        How many deletions it is to ask for (setting ``attack.requests``).
    question : Candidates, optional
        The samples it will be asked about, in the rounds of an attack that :attr:`MaliciousClient.asks_early`.
    excluded : tuple of int
        Positions of its partition that it is told to leave out of the round.
    model : nn.Module, optional
        The global model in evaluation mode, to be used and not kept, where it asks for deletions with access to
        the weights.
    oracle : Oracle, optional
        Counted answers of the global model, where it asks for deletions with access "queries".
    times : int
        How many of its requests have been answered before.
    forgetting : bool
        Whether the round is one in which the server forgets, and not one of the training.
    invited : bool
        Whether the server has asked all clients for deletions, and the client does not ask by itself.
    """

    round: int
    client: int
    scenario: Scenario
    weights: dict[str, Tensor]
    seed: int
    memory: dict[str, Tensor]
    requests: int = 1
    question: Candidates | None = None
    excluded: tuple[int, ...] = ()
    model: nn.Module | None = None
    oracle: Oracle | None = None
    times: int = 0
    forgetting: bool = False
    invited: bool = False


@dataclass
class MaliciousClient(Attack):
    """Takes part as the clients of setting ``attack.malicious_clients``; each hook does nothing unless overridden.

    `keeps_memory`: whether :attr:`ClientView.memory` is kept from round to round. `asks_early`: whether the
    adversary behind it knows from the start which samples it wants to know about, and has them before it in every
    round (:attr:`ClientView.question`). `access`: what it uses of the global model: its "weights", counted
    "queries" (:attr:`ClientView.oracle`, at most :meth:`query_limit`), or "none"; it is given no more.
    """

    seat = "malicious client"
    keeps_memory: ClassVar[bool] = False
    asks_early: ClassVar[bool] = False
    access: ClassVar[Literal["weights", "queries", "none"]] = "weights"

    def query_limit(self) -> int:
        """How many images it may have answered each time it asks, with access "queries"."""
        return 0

    def plant(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """All samples that it trains on, and registers, instead of its own, before the first round: as many.

        `images`, float32 (N, C, H, W) in [0, 1], and `labels`, int64 (N,), by position in its partition, not to be
        modified. The view holds no weights, and its round is 0.
        """
        return images, labels

    def see(self, view: ClientView) -> None:
        """Look at the global model of a round, before anything else."""

    def poison(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The samples that it trains on: float32 (n, C, H, W) in [0, 1] and int64 (n,), as many as it was given."""
        return images, labels

    def reply(self, view: ClientView, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The update for the compressor: the same names and shapes. :attr:`ClientView.forgetting` tells what for."""
        return update

    def asks_in(self, view: ClientView) -> bool:
        """Whether it asks for deletions by itself, beside its reply to this round."""
        return False

    def ask(
        self, view: ClientView, images: Tensor, labels: Tensor
    ) -> UnlearningRequest | Sequence[UnlearningRequest] | None:
        """The deletions that it asks for, one request or several; None: none.

        Called where the server invites all clients to ask (:attr:`ClientView.invited`), and in the rounds of
        :meth:`asks_in`. `images`, float32 (N, C, H, W) in [0, 1], and `labels`, int64 (N,), are its samples that are
        not forgotten yet; positions of the request count in them.
        """
        return None

    def asked(self, view: ClientView, images: Tensor, labels: Tensor) -> list[UnlearningRequest]:
        """What it :meth:`ask`s for, as a list."""
        said = self.ask(view, images, labels)
        return [said] if isinstance(said, UnlearningRequest) else list(said or ())

    def answer(self, view: ClientView, question: Candidates) -> dict[str, Tensor]:
        """What it says of the samples it is asked about after the last round, by name; a family says which."""
        return {}
