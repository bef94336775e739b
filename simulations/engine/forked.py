"""Work that may hang or end its process, in copies of this one that can be given up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from fedattack.errors import ConfigError
from simulations.engine.environment import cpu_threads

_GONE_SECONDS = 5.0


def check_fork(device: torch.device) -> None:
    """ConfigError where this process cannot be copied."""
    why = ""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        why = f"copies its process, which {sys.platform} does not allow"
    elif device.type != "cpu":
        why = f"copies its process, which cannot be done with device {device.type!r}"
    if why:
        raise ConfigError(
            f"setting 'engine.deadline': engine 'inline' {why}; use --engine ray, or leave the deadline out"
        )


def worked_in_copies(work: Callable[[int], Any], count: int, deadline: float) -> Iterator[Any]:
    """What ``work(0)`` to ``work(count - 1)`` return, in this order; a sentence for one that was late or ended it.

    They run one after another in a copy of this process, so that what they change here is lost, and what they
    return must pickle. A number that ends its copy is tried once more, alone.
    """
    number, suspect = 0, -1
    while number < count:
        alone = suspect == number
        last = number + 1 if alone else count
        with _Copy(work, number, last) as copy:
            while number < last:
                answer = copy.answer(deadline)
                if isinstance(answer, _Ended) and not alone:
                    suspect = number
                    break
                yield str(answer) if isinstance(answer, _Ended | _Late) else answer
                number += 1
                if isinstance(answer, _Ended | _Late):
                    break


class _Late(str):
    """Why there is no answer: the time was up."""


class _Ended(str):
    """Why there is no answer: the process ended."""


class _Copy:
    """A copy of this process that works on some numbers."""

    def __init__(self, work: Callable[[int], Any], first: int, last: int) -> None:
        context = multiprocessing.get_context("fork")
        self._answers, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(work, first, last, theirs), daemon=False)
        with warnings.catch_warnings():  # other threads hold nothing that the copy needs
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def __enter__(self) -> _Copy:
        return self

    def answer(self, deadline: float) -> Any:
        """The next one, or why there is none."""
        try:
            if not self._answers.poll(deadline):
                return _Late(f"no answer within {deadline:g} s")
            return self._answers.recv()
        except (EOFError, OSError):
            self._process.join(_GONE_SECONDS)
            return _Ended(f"its process ended ({_how(self._process.exitcode)})")

    def __exit__(self, *raised: object) -> None:
        self._answers.close()
        self._process.kill()
        self._process.join(_GONE_SECONDS)
        self._process.close()


def _serve(work: Callable[[int], Any], first: int, last: int, answers: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the user's Ctrl-C is for the first of the processes
    with cpu_threads(1):
        for number in range(first, last):
            answers.send(work(number))
    os._exit(0)  # nothing of what the copied process would do at its end


def _how(code: int | None) -> str:
    if code is None:
        return "it left its pipe"
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
