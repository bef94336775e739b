"""Flower's own grid, with its nodes known by their partition."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedattack.errors import RunFailed
from simulations.engine.forwarding import ForwardingGrid
from simulations.engine.ray_grid import _START_SECONDS
from strategies.messages import CONFIG, METRICS, PARTITION, reason_of

_NODES_SECONDS = 20.0


class PartitionedGrid(ForwardingGrid):
    """Flower's own grid, seen so that nothing random is left: one node per client, in the order of the clients.

    Under ``flwr run`` node ids are random and their order too: each node is asked once which partition it has.
    Nodes beyond `clients` are left alone; RunFailed where there are fewer.
    """

    def __init__(self, grid: Grid, clients: int) -> None:
        super().__init__(grid)
        question = RecordDict({CONFIG: ConfigRecord()})
        nodes = _wait_for_nodes(grid, clients)
        messages = [Message(question, node, "query.whoami") for node in nodes]
        self._node_of: dict[int, int] = {}
        for reply in grid.send_and_receive(messages, timeout=_START_SECONDS):
            if reply.has_error():
                raise RunFailed(f"a node could not say which client it is: {reason_of(reply)}")
            number: Any = reply.content[METRICS][PARTITION]
            if number < clients:
                self._node_of[number] = reply.metadata.src_node_id
        missing = sorted(set(range(clients)) - set(self._node_of))
        if missing:
            raise RunFailed(
                f"setting 'federation.clients' = {clients}: Flower's federation has {len(nodes)} nodes, and client "
                f"{missing[0]} is none of them; give it more with --federation-config 'num-supernodes={clients}'"
            )
        self._client_of = {node: client for client, node in self._node_of.items()}

    def client_of(self, node: int) -> int:
        """The client's number behind a node id."""
        return self._client_of[node]

    def get_node_ids(self) -> Iterable[int]:
        return [self._node_of[client] for client in sorted(self._node_of)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = self.grid.send_and_receive(list(messages), timeout=timeout)
        return sorted(replies, key=lambda reply: self.client_of(reply.metadata.src_node_id))


def _wait_for_nodes(grid: Grid, wanted: int) -> list[int]:
    deadline = time.monotonic() + _NODES_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return nodes
