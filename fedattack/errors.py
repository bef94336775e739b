"""Every error a person can cause, and the exit code the command answers it with."""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable

MAX_TOLD = 500
"""Characters of what somebody else said that are repeated in a log, a table or a report."""

_MOST_QUOTED = 300
"""Characters of a value that a sentence repeats."""


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
    return ConfigError(f"unknown {what} {quoted(name)}{hint or '.'} Known: {', '.join(names)}.")


def quoted(value: object) -> str:
    """A value as it was given, for the sentence that refuses it; of a long one the beginning."""
    return told(repr(value), _MOST_QUOTED)


def told(words: object, most: int = MAX_TOLD) -> str:
    """What somebody else said, as it may be repeated: one line of at most `most` characters, none of control.

    An exception is told with its type; of a traceback, its last line.
    """
    try:
        text = f"{type(words).__name__}: {words}" if isinstance(words, BaseException) else str(words)
    except BaseException as error:  # theirs, as the rest
        text = f"{type(words).__name__} that cannot be told ({type(error).__name__})"
    if text.startswith("Traceback ("):
        text = next((line for line in reversed(text[-4 * most :].splitlines()) if line.strip()), text)
    cut = text[: 4 * most]
    plain = "".join(" " if unicodedata.category(one)[0] in "CZ" else one for one in cut)
    line = " ".join(plain.split())
    return line if len(line) <= most and len(text) == len(cut) else f"{line[: most - 3].rstrip()}..."


def shown(value: object) -> str:
    """A value that somebody else sent, short, for the sentence that refuses it."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to write very long ones out
        return f"a number of {value.bit_length()} bits"
    try:
        return told(reprlib.repr(value), 100)
    except Exception:  # long ones inside a list
        return f"a {type(value).__name__}"
