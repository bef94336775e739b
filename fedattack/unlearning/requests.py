"""The server's check of a deletion request. A request is a client's word and may be hostile."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

from fedattack.errors import PayloadError
from fedattack.observation import UnlearningRequest


@dataclass(frozen=True)
class Deletion:
    """A request that was accepted.

    Parameters
    ----------
    client : int
        Whose samples.
    positions : frozenset of int
        Positions in the client's partition, newly to be forgotten.
    drops_out : bool
        True when the client keeps no sample and therefore leaves the federation.
    """

    client: int
    positions: frozenset[int]
    drops_out: bool = False


def validate_request(
    request: UnlearningRequest, sender: int, samples: int, forgotten: Collection[int] = ()
) -> Deletion:
    """Accept a request or reject it with a reason.

    The server holds no data, so it checks all that it can check: who asks, and whether the positions name
    samples that this client registered and that are not forgotten yet. That the samples were *chosen* to do
    harm cannot be seen from the request.

    Parameters
    ----------
    request : UnlearningRequest
        As received.
    sender : int
        The client that the message really came from.
    samples : int
        Samples that the client registered (its partition's size).
    forgotten : collection of int
        Positions of this client that earlier requests had removed.

    Returns
    -------
    Deletion
        With `drops_out` set when nothing of the client's partition is left.

    Raises
    ------
    PayloadError
        If the request names another client's data, or its positions are empty, not integers, repeated,
        outside ``[0, samples)``, or forgotten already.
    """
    who = f"deletion request from client {sender}"
    if isinstance(request.client, bool) or not isinstance(request.client, int) or request.client != sender:
        raise PayloadError(
            f"{who}: names client {request.client!r}; a client may only delete samples of its own"
        )
    # Length first: a request longer than the partition must repeat itself, and is not worth walking through.
    if len(request.positions) > samples:
        raise PayloadError(f"{who}: {len(request.positions)} positions, but the client has {samples} samples")
    if not request.positions:
        raise PayloadError(f"{who}: names no position")
    positions = [_integer(position, who) for position in request.positions]
    outside = [position for position in positions if not 0 <= position < samples]
    if outside:
        raise PayloadError(f"{who}: position {outside[0]} is outside [0, {samples})")
    chosen = frozenset(positions)
    if len(chosen) < len(positions):
        raise PayloadError(f"{who}: repeats {len(positions) - len(chosen)} of its {len(positions)} positions")
    again = chosen.intersection(forgotten)
    if again:
        raise PayloadError(f"{who}: position {min(again)} is forgotten already")
    return Deletion(sender, chosen, drops_out=len(chosen.union(forgotten)) == samples)


def _integer(position: object, who: str) -> int:
    """`position` as an int; NumPy integers pass, booleans and floats do not."""
    try:
        if isinstance(position, bool):
            raise TypeError
        return operator.index(position)  # type: ignore[arg-type]
    except TypeError:
        raise PayloadError(f"{who}: position {position!r} is not an integer") from None
