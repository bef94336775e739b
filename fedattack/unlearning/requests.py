"""The server's check of a deletion request. A request is a client's word and may be hostile."""

from __future__ import annotations

import hashlib
import operator
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedattack.errors import PayloadError
from fedattack.observation import Scenario, UnlearningRequest
from fedattack.task import task_of


@dataclass(frozen=True)
class Deletion:
    """A request that was accepted: positions in the client's partition, new ones, or samples (anybody's)."""

    client: int  # who asked
    positions: frozenset[int] = frozenset()
    drops_out: bool = False  # the client keeps no sample and leaves the federation
    images: Tensor | None = field(default=None, compare=False)  # float32 (n, C, H, W) in [0, 1]
    labels: Tensor | None = field(default=None, compare=False)  # int64 (n,)


def validate_request(
    request: UnlearningRequest, sender: int, samples: int, scenario: Scenario, forgotten: Collection[int] = ()
) -> Deletion:
    """Accept a request or reject it with a reason.

    The server holds no data, so it checks all that it can check: who asks, and whether positions name samples that
    this client registered and that are not forgotten yet, or the samples are of the federation's kind. That they
    were *chosen* to do harm cannot be seen from the request.

    Parameters
    ----------
    sender : int
        The client that the message really came from.
    samples : int
        Samples that the client registered (its partition's size).
    forgotten : collection of int
        Positions of this client that earlier requests had removed.

    Raises
    ------
    PayloadError
        If the request names another client's data, or both or neither of positions and samples; if positions are
        not integers, repeated, outside ``[0, samples)`` or forgotten already; if samples are more than the client
        registered, of another shape or type, not finite, outside [0, 1], or labelled outside the classes.
    """
    who = f"deletion request from client {sender}"
    if isinstance(request.client, bool) or not isinstance(request.client, int) or request.client != sender:
        raise PayloadError(f"{who}: names client {request.client!r}; a client may only speak for itself")
    if request.images is not None or request.labels is not None:
        if request.positions:
            raise PayloadError(f"{who}: brings both positions and samples; accepted: one of them")
        images, labels = _checked_samples(request, samples, scenario, who)
        return Deletion(sender, images=images, labels=labels)
    # Length first: a request longer than the partition must repeat itself, and is not worth walking through.
    if len(request.positions) > samples:
        raise PayloadError(f"{who}: {len(request.positions)} positions, but the client has {samples} samples")
    if not request.positions:
        raise PayloadError(f"{who}: names no position and brings no sample")
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


def sample_digests(images: Tensor, labels: Tensor) -> list[bytes]:
    """What a client registers of its samples, one digest each: equal for equal pixels and labels."""
    pairs = zip(images.contiguous().cpu(), labels.tolist(), strict=True)
    return [hashlib.blake2b(x.numpy().tobytes() + b"%d" % y, digest_size=16).digest() for x, y in pairs]


def as_positions(
    deletion: Deletion, registered: Sequence[bytes], forgotten: Collection[int] = ()
) -> Deletion:
    """The deletion with its samples found among those that the client registered; unchanged where it has positions.

    `registered` are the :func:`sample_digests` of the client's partition, by position; `forgotten` those removed
    earlier. Raises PayloadError if a sample is not (or no longer, or not as often) among them: it is another's,
    changed, or wrongly labelled.
    """
    if deletion.images is None or deletion.labels is None:
        return deletion
    places = defaultdict(list)
    for position in sorted(set(range(len(registered))).difference(forgotten), reverse=True):
        places[registered[position]].append(position)
    digests = sample_digests(deletion.images, deletion.labels)
    found = [places[digest].pop() for digest in digests if places[digest]]
    if len(found) < len(digests):
        raise PayloadError(
            f"deletion request from client {deletion.client}: {len(digests) - len(found)} of {len(digests)} samples "
            "are not among those that it registered"
        )
    left = len(registered) - len(found) - len(set(forgotten))
    return replace(deletion, positions=frozenset(found), drops_out=left == 0)


def _checked_samples(
    request: UnlearningRequest, samples: int, scenario: Scenario, who: str
) -> tuple[Tensor, Tensor]:
    """The samples of a request, where they are of the federation's kind."""
    images, labels = request.images, request.labels
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise PayloadError(f"{who}: brings images without labels, or labels without images")
    count, shape = len(labels) if labels.ndim == 1 else -1, tuple(images.shape)
    if not 1 <= count <= samples:
        raise PayloadError(f"{who}: labels of shape {tuple(labels.shape)}; accepted: 1 to {samples} samples")
    if images.dtype != torch.float32 or shape != (count, *scenario.image_shape):
        raise PayloadError(
            f"{who}: images of shape {shape} and type {images.dtype}; accepted: "
            f"{(count, *scenario.image_shape)} and torch.float32"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):  # NaN fails both
        raise PayloadError(f"{who}: a pixel is not a number in [0, 1]")
    classes = task_of(scenario).output(scenario.model)[0]
    if labels.dtype != torch.int64 or not bool(((labels >= 0) & (labels < classes)).all()):
        raise PayloadError(f"{who}: a label is not an int64 in [0, {classes})")
    return images, labels


def _integer(position: object, who: str) -> int:
    """`position` as an int; NumPy integers pass, booleans and floats do not."""
    try:
        if isinstance(position, bool):
            raise TypeError
        return operator.index(position)  # type: ignore[arg-type]
    except TypeError:
        raise PayloadError(f"{who}: position {position!r} is not an integer") from None
