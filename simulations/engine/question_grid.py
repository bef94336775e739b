"""What malicious clients are told with a round: the samples their adversary wants to know about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Message, RecordDict

from fedattack.observation import Candidates
from simulations.engine.forwarding import ForwardingGrid
from strategies import messages as wire


class QuestionGrid(ForwardingGrid):
    """Lays the `questions`, by an attack's tag, beside the model that `clients` are sent to train; others get none.

    The question is the adversary's own and not the server's: neither the strategy nor the journal sees it.
    `client_of` tells a node's client.
    """

    def __init__(
        self,
        grid: Any,
        client_of: Callable[[int], int],
        questions: Mapping[str, Candidates],
        clients: Collection[int],
    ) -> None:
        super().__init__(grid)
        self.client_of = client_of
        self._clients = frozenset(clients)
        self._records = {
            wire.QUESTION_OF.format(tag=tag): wire.to_record({"images": one.images, "labels": one.labels})
            for tag, one in questions.items()
        }

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies to `messages`, of which some now hold questions."""
        return self.grid.send_and_receive(list(self._with_questions(messages)), timeout=timeout)

    def _with_questions(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            training = message.metadata.message_type.partition(".")[0] == "train"
            if training and self.client_of(message.metadata.dst_node_id) in self._clients:
                message.content = RecordDict({**message.content, **self._records})
            yield message
