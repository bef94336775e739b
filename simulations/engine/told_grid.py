"""What single clients are told with a round beside what all are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from simulations.engine.forwarding import ForwardingGrid
from strategies import messages as wire


class ToldGrid(ForwardingGrid):
    """Adds a client's `own` settings to its instructions, and shows the strategy `clients` alone (None: all).

    What one client is told, no other is. `client_of` tells a node's client.
    """

    def __init__(
        self,
        grid: Any,
        client_of: Callable[[int], int],
        own: Mapping[int, Mapping[str, Any]],
        clients: Collection[int] | None = None,
    ) -> None:
        super().__init__(grid)
        self.client_of, self._own = client_of, own
        self._clients = None if clients is None else frozenset(clients)

    def get_node_ids(self) -> Iterable[int]:
        nodes = self.grid.get_node_ids()
        return [n for n in nodes if self._clients is None or self.client_of(n) in self._clients]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies to `messages`, of which some now hold more."""
        return self.grid.send_and_receive(list(self._with_own(messages)), timeout=timeout)

    def _with_own(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            own = self._own.get(self.client_of(message.metadata.dst_node_id))
            if own:
                told = message.content[wire.CONFIG]
                assert isinstance(told, ConfigRecord)
                message.content = RecordDict({**message.content, wire.CONFIG: ConfigRecord({**told, **own})})
            yield message
