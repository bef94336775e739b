"""The server's check of a deletion request. A request is a client's word and may be hostile."""

from __future__ import annotations

import hashlib
import operator
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedattack.errors import PayloadError, shown
from fedattack.observation import Scenario, UnlearningRequest
from fedattack.task import task_of

REQUEST = "request"
"""The gate, by name, that every request goes through: this file's."""


@dataclass(frozen=True)
class Verdict:
    """What the server decided about one deletion request, and why."""

    round: int  # after which, or in which, it came
    client: int  # who really sent it
    gate: str  # REQUEST, or one of fedattack.unlearning.gates
    accepted: bool
    reason: str = ""  # a sentence where it is refused
    samples: int = 0  # how many it names, where that could be read
    tag: str = ""  # the name that the client's requests go by


@dataclass(frozen=True)
class Registered:
    """What a client registered of its samples before the first round, by position: digests of pixels, and labels.

    The `salt` is the client's own, so that equal samples of two clients cannot be told by their digests.
    """

    salt: bytes
    pixels: tuple[bytes, ...]
    labels: tuple[int, ...]

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, salt: bytes = b"") -> Registered:
        """Of images, float32 (n, C, H, W), and labels (n,)."""
        empty = cls(salt, (), ())
        return cls(salt, tuple(empty.digests(images)), tuple(labels.tolist()))

    def digests(self, images: Tensor) -> list[bytes]:
        """The digest of each of some images, float32 (n, C, H, W), under this salt: equal for equal pixels."""
        pixels = images.contiguous().cpu().numpy()
        return [hashlib.blake2b(one.tobytes(), digest_size=16, salt=self.salt).digest() for one in pixels]

    def find(self, images: Tensor, labels: Tensor, forgotten: Collection[int] = ()) -> list[int | None]:
        """The position of each sample, pixels and label alike; None where it is not, or not as often, among them.

        Positions that are `forgotten` are not found.
        """
        places = defaultdict(list)
        for position in sorted(set(range(len(self.labels))).difference(forgotten), reverse=True):
            places[self.pixels[position], self.labels[position]].append(position)
        asked = zip(self.digests(images), labels.tolist(), strict=True)
        return [places[one].pop() if places[one] else None for one in asked]


@dataclass(frozen=True)
class Deletion:
    """A request that was accepted: positions in the client's partition, new ones, samples (anybody's), or a class."""

    client: int  # who asked
    positions: frozenset[int] = frozenset()
    drops_out: bool = False  # the client keeps no sample and leaves the federation
    images: Tensor | None = field(default=None, compare=False)  # float32 (n, C, H, W) in [0, 1]
    labels: Tensor | None = field(default=None, compare=False)  # int64 (n,)
    label: int | None = None  # of the class

    @property
    def samples(self) -> int:
        """How many samples it names."""
        return len(self.positions) if self.labels is None else len(self.labels)


def validate_request(
    request: UnlearningRequest, sender: int, samples: int, scenario: Scenario, forgotten: Collection[int] = ()
) -> Deletion:
    """Accept a request or reject it with a reason.

    The server holds no data, so it checks all that it can check: who asks, and whether positions name samples that
    this client registered and that are not forgotten yet, or the samples or the class are of the federation's kind.
    That they were *chosen* to do harm cannot be seen from the request.

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
        If the request names another client's data, or not one of positions, samples, a class and everything; if
        positions are not integers, repeated, outside ``[0, samples)`` or forgotten already; if samples are more than
        the client registered, of another shape or type, not finite, outside [0, 1], or labelled outside the classes;
        if there is no such class, or nothing is left.
    """
    who = f"deletion request from client {sender}"
    if isinstance(request.client, bool) or not isinstance(request.client, int) or request.client != sender:
        raise PayloadError(f"{who}: names client {shown(request.client)}; a client may only speak for itself")
    brought = request.images is not None or request.labels is not None
    named = {
        "positions": len(request.positions) > 0,
        "samples": brought,
        "a class": request.label is not None,
        "everything": request.everything,
    }
    kinds = [kind for kind, there in named.items() if there]
    if len(kinds) > 1:
        raise PayloadError(f"{who}: brings both {' and '.join(kinds)}; accepted: one of them")
    if not kinds:
        raise PayloadError(f"{who}: names no position and brings no sample")
    if brought:
        images, labels = _checked_samples(request, samples, scenario, who)
        return Deletion(sender, images=images, labels=labels)
    if request.label is not None:
        classes, label = _classes(scenario), request.label
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            raise PayloadError(f"{who}: class {shown(label)} is not an integer in [0, {classes})")
        return Deletion(sender, label=label)
    if request.everything:
        rest = frozenset(range(samples)).difference(forgotten)
        if not rest:
            raise PayloadError(f"{who}: all of its samples are forgotten already")
        return Deletion(sender, rest, drops_out=True)
    # Length first: a request longer than the partition must repeat itself, and is not worth walking through.
    if len(request.positions) > samples:
        raise PayloadError(f"{who}: {len(request.positions)} positions, but the client has {samples} samples")
    positions = [_integer(position, who) for position in request.positions]
    outside = [position for position in positions if not 0 <= position < samples]
    if outside:
        raise PayloadError(f"{who}: position {shown(outside[0])} is outside [0, {samples})")
    chosen = frozenset(positions)
    if len(chosen) < len(positions):
        raise PayloadError(f"{who}: repeats {len(positions) - len(chosen)} of its {len(positions)} positions")
    again = chosen.intersection(forgotten)
    if again:
        raise PayloadError(f"{who}: position {min(again)} is forgotten already")
    return Deletion(sender, chosen, drops_out=len(chosen.union(forgotten)) == samples)


def as_positions(deletion: Deletion, registered: Registered, forgotten: Collection[int] = ()) -> Deletion:
    """The deletion with its samples, or its class, found among those that the client registered.

    Unchanged where it has positions. `forgotten`: those removed earlier. Raises PayloadError if a sample is not (or
    no longer, or not as often) among them: it is another's, changed, or wrongly labelled; and if none is of the
    class.
    """
    who, gone = f"deletion request from client {deletion.client}", set(forgotten)
    if deletion.label is not None:
        mine = [p for p, one in enumerate(registered.labels) if one == deletion.label and p not in gone]
        if not mine:
            raise PayloadError(f"{who}: it has no sample of class {deletion.label} (left)")
        found = mine
    elif deletion.images is None or deletion.labels is None:
        return deletion
    else:
        places = registered.find(deletion.images, deletion.labels, forgotten)
        found = [place for place in places if place is not None]
        if len(found) < len(places):
            raise PayloadError(
                f"{who}: {len(places) - len(found)} of {len(places)} samples are not among those that it registered"
            )
    left = len(registered.labels) - len(found) - len(gone)
    return replace(deletion, positions=frozenset(found), drops_out=left == 0)


def _classes(scenario: Scenario) -> int:
    return task_of(scenario).output(scenario.model)[0]


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
    classes = _classes(scenario)
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
        raise PayloadError(f"{who}: position {shown(position)} is not an integer") from None
