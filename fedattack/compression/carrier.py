"""An encoded update inside a Flower message.

Flower ships an array of a serialisation type that it does not know untouched, and refuses to average it: a strategy
that forgets to decode fails loudly instead of averaging bytes.
"""

from __future__ import annotations

from flwr.app import Array

from fedattack.errors import PayloadError

STYPE = "fedattack.update"


def to_array(payload: bytes, numel: int) -> Array:
    """Wrap an encoded update of a model with `numel` parameters for an ``ArrayRecord``."""
    return Array("float32", (numel,), STYPE, payload)


def from_array(array: Array) -> bytes:
    """The encoded update in a client's array, for :func:`fedattack.compression.decode`.

    Raises PayloadError if the array is of another serialisation type (a dense Flower reply, for instance).
    """
    if not isinstance(array, Array) or array.stype != STYPE:
        found = getattr(array, "stype", type(array).__name__)
        raise PayloadError(f"reply carries an array of type {found!r}, expected {STYPE!r}")
    if not isinstance(array.data, bytes):
        raise PayloadError(f"reply carries {type(array.data).__name__}, expected bytes")
    return array.data
