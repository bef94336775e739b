"""The grid of an ordinary Flower app in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from simulations.engine.local_grid import FIRST_NODE, Contexts, InlineGrid, LocalGrid
from strategies.messages import PARTITION


class AppContexts(Contexts):
    """Contexts of the clients of an app that has settings of its own."""

    def __init__(self, run_id: int, clients: int, run_config: Mapping[str, Any]) -> None:
        super().__init__(run_id, clients)
        self.run_config = dict(run_config)

    def __missing__(self, client: int) -> Context:
        node = {PARTITION: client, "num-partitions": self.clients}
        self[client] = Context(self.run_id, FIRST_NODE + client, node, RecordDict(), dict(self.run_config))
        return self[client]


class AppGrid(InlineGrid):
    """All clients of any ClientApp in this process, one after another; it asks nothing of the app but its answers."""

    def __init__(self, client_app: ClientApp, clients: int, run_config: Mapping[str, Any]) -> None:
        LocalGrid.__init__(self, clients)
        self._app = client_app
        self._contexts = AppContexts(self.run_id, clients, run_config)
