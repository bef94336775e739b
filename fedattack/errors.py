"""Every error a person can cause, and the exit code the command answers it with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedattackError(Exception):
    """Base of all errors that the command shows as one message instead of a traceback."""

    exit_code = 1


class BadRequest(FedattackError):
    """The request cannot be carried out as it was put (exit code 2)."""

    exit_code = 2


class ConfigError(BadRequest):
    """A setting is unknown, malformed or out of range; the message names it and what is accepted."""


class DataError(BadRequest):
    """A data set is missing, empty, of the wrong format, or too small for what was asked of it."""


class NotApplicable(BadRequest):
    """An attack or mechanism cannot apply to this scenario; raised before anything starts."""


class PayloadError(FedattackError):
    """A client's reply is malformed or hostile and is rejected; the message says why."""


class RunFailed(FedattackError):
    """A run that had started could not be finished."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Error for an unknown name of a kind of thing ("attack", "data set"), with the nearest known one."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {what} {name!r}{hint or '.'} Known: {', '.join(names)}.")
