"""Client apps of the tests: the real client, with one thing wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, MetricRecord
from flwr.clientapp import ClientApp

from simulations.client_app import app as honest
from strategies.light_records import HeldArray, LightArrays, LightRecords
from strategies.messages import CONFIG, METRICS, NUM_EXAMPLES, PARTITION, ROUND, TRAIN_LOSS

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


def _hang(message: Message, reply: Message, client: int, round: int) -> Message:
    if client == FATAL_CLIENT:
        time.sleep(3600)
    return reply


def _leave(message: Message, reply: Message, client: int, round: int) -> Message:
    if client == FATAL_CLIENT:
        os._exit(3)
    return reply


def _raises(error: Callable[[], BaseException]) -> Callable[[Message, Message, int, int], Message]:
    def meddle(message: Message, reply: Message, client: int, round: int) -> Message:
        if client == FATAL_CLIENT:
            raise error()
        return reply

    return meddle


def _recurse(message: Message, reply: Message, client: int, round: int) -> Message:
    return _recurse(message, reply, client, round) if client == FATAL_CLIENT else reply


def _answers(nonsense: Callable[[Message, Message], Any]) -> Callable[[Message, Message, int, int], Message]:
    def meddle(message: Message, reply: Message, client: int, round: int) -> Message:
        return nonsense(message, reply) if client == FATAL_CLIENT else reply

    return meddle


def _with(record: object) -> Callable[[Message, Message], Message]:
    def answer(message: Message, reply: Message) -> Message:
        return Message(LightRecords({"update": LightArrays({"update": record})}), reply_to=message)

    return answer


class _Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit("no")


hanging = rigged(_hang)
leaving = rigged(_leave)
recursing = rigged(_recurse)
exiting = rigged(_raises(lambda: SystemExit(0)))
interrupting = rigged(_raises(KeyboardInterrupt))
out_of_memory = rigged(_raises(lambda: MemoryError("much")))
unspeakable = rigged(_raises(_Unspeakable))
forging = rigged(_raises(lambda: ValueError("x\n2026-01-01  round 9: done\x1b[2J\u202e" + "y" * 10**6)))
nothing = rigged(_answers(lambda message, reply: None))
echo = rigged(_answers(lambda message, reply: message))
another = rigged(
    _answers(lambda message, reply: Message(reply.content, message.metadata.dst_node_id - 1, "train"))
)
objects = rigged(_answers(_with(HeldArray(np.array([object()])))))
no_array = rigged(_answers(_with("text")))
long_error = rigged(_answers(lambda m, reply: Message(Error(7, "z\n" * 10**6), reply_to=m)))
boasting = rigged(
    _answers(
        lambda m, r: Message(
            LightRecords({**r.content, METRICS: MetricRecord({NUM_EXAMPLES: 2**31 - 1, TRAIN_LOSS: 0.0})}),
            reply_to=m,
        )
    )
)


def _each(message: Message, reply: Message, client: int, round: int) -> Message:
    """Four clients, each with a fault of its own."""
    if client == 5:
        time.sleep(3600)
    if client == 6:
        os._exit(3)
    if client == 7:
        raise SystemExit(0)
    return None if client == 8 else reply  # type: ignore[return-value]


four_faults = rigged(_each)
APPS = {name: one for name, one in list(globals().items()) if isinstance(one, ClientApp)}
