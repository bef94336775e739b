"""Client apps of the tests: the real client, with one thing wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from simulations.client_app import app as honest
from strategies.messages import CONFIG, PARTITION, ROUND

FLAGS = "FEDATTACK_TEST_FLAGS"
"""Environment variable that names a folder: what happened once leaves a file there."""

FATAL_CLIENT, FATAL_ROUND = 5, 2


def rigged(meddle: Callable[[Message, Message, int, int], Message]) -> ClientApp:
    """The real client, whose replies go through ``meddle(instruction, reply, client, round)``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, round = context.node_config[PARTITION], message.content[CONFIG][ROUND]
        return meddle(message, honest(message, context), client, round)

    return app


def _die_once(message: Message, reply: Message, client: int, round: int) -> Message:
    """Kill the own process in the middle of a round, after the client has worked and changed its memory."""
    flag = Path(os.environ[FLAGS]) / "died"
    if client == FATAL_CLIENT and round == FATAL_ROUND and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return reply


def _die_always(message: Message, reply: Message, client: int, round: int) -> Message:
    if client == FATAL_CLIENT:
        os.kill(os.getpid(), signal.SIGKILL)
    return reply


def _raise(message: Message, reply: Message, client: int, round: int) -> Message:
    if client == FATAL_CLIENT:
        raise RuntimeError("the dog ate it")
    return reply


dying_once = rigged(_die_once)
dying_always = rigged(_die_always)
raising = rigged(_raise)
