"""The types that pass between the rooms: what a seat could see, and what an attack answers.

An adversary is given an :class:`Observation` and nothing else. Private images, true labels, uncompressed
gradients and the client's random draws live in :mod:`fedattack.groundtruth`, which no adversary imports.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedattack.config import CompressionConfig, DefenseConfig, GanConfig, ModelConfig, TrainingConfig

UpdateKind = Literal["gradient", "delta"]

EVERYONE = -1
"""`client` of an observation under secure aggregation: what all clients of a round sent, summed."""


def observation_name(round: int, client: int) -> str:
    """Stable name of an observation, for files and logs."""
    return f"round-{round:04d}-{client_name(client)}"


def called(client: int) -> str:
    """A target in words: "client 3", or "anybody"."""
    return "anybody" if client == EVERYONE else f"client {client}"


def client_name(client: int) -> str:
    """Stable name of a client, or of everyone, for files and logs."""
    return "everyone" if client == EVERYONE else f"client-{client:05d}"


@dataclass(frozen=True)
class Update:
    """A decoded client update, sparse where it came sparse.

    Entries are addressed by their flat position in the concatenation of all tensors, in the model's order. `kind`:
    the gradient of the mean loss over the client's batch, or new weights minus received weights.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    indices: Tensor | None  # int64 (k,), strictly increasing: what was sent; None: every entry
    values: Tensor  # float32 (k,) or (numel,)
    kind: UpdateKind = "gradient"

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each tensor."""
        return [int(torch.Size(shape).numel()) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Number of entries of the dense update."""
        return sum(self.sizes)

    @property
    def kept(self) -> int:
        """Number of entries that were sent (k)."""
        return int(self.values.numel())

    @property
    def threshold(self) -> float:
        """Smallest sent magnitude: under top-k no unsent entry is larger."""
        return float(self.values.abs().min()) if self.kept else 0.0

    def layers(self) -> Iterator[tuple[str, tuple[int, ...], Tensor, Tensor]]:
        """Yield (name, shape, flat positions inside the tensor as int64, values) for each tensor."""
        start = 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            if self.indices is None:
                yield name, shape, torch.arange(size), self.values[start : start + size]
            else:
                low, high = torch.searchsorted(self.indices, torch.tensor([start, start + size])).tolist()
                yield name, shape, self.indices[low:high] - start, self.values[low:high]
            start += size

    def kept_per_layer(self) -> dict[str, int]:
        """Sent entries of each tensor."""
        return {name: int(values.numel()) for name, _, _, values in self.layers()}

    def dense(self) -> dict[str, Tensor]:
        """Name -> dense tensor, zeros where nothing was sent."""
        flat = self.values
        if self.indices is not None:
            flat = torch.zeros(self.numel, dtype=self.values.dtype, device=self.values.device)
            flat[self.indices.to(flat.device)] = self.values
        parts = flat.split(self.sizes)
        return {n: part.reshape(s) for n, s, part in zip(self.names, self.shapes, parts, strict=True)}

    def to(self, device: torch.device | str) -> Update:
        """The same update with its tensors on `device`."""
        indices = None if self.indices is None else self.indices.to(device)
        return Update(self.names, self.shapes, indices, self.values.to(device), self.kind)


@dataclass(frozen=True)
class Scenario:
    """What everybody at the table knows: the model's architecture and the agreed training, compression and defence.

    `model` is fully resolved: `classes`, `channels`, `image_size` and `activation` are set. Where local epochs are
    agreed, the steps are each client's own: an observation has the scenario :meth:`of` what its client declares, and
    before there is one, `training.local_steps` are those of the client that takes most.
    """

    model: ModelConfig
    training: TrainingConfig
    compression: CompressionConfig
    defense: DefenseConfig = field(default_factory=DefenseConfig)
    gan: GanConfig = field(default_factory=GanConfig)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one input, pixels in [0, 1]."""
        channels, side, _ = self.model.resolved
        return channels, side, side

    def of(self, samples: int) -> Scenario:
        """The same, with the local steps of a client that declares so many samples."""
        training = self.training.of(samples)
        return self if training is self.training else replace(self, training=training)

    def record(self) -> dict[str, Any]:
        """The facts as JSON-able sections: "model", "training", "compression", "defense", "gan"."""
        return {part.name: getattr(self, part.name).model_dump(mode="json") for part in fields(self)}


@dataclass(frozen=True)
class Auxiliary:
    """Public data granted to the adversary, disjoint from every client's samples."""

    images: Tensor  # float32 (N, C, H, W) in [0, 1]
    labels: Tensor | None = None  # int64 (N,), in the federation's label space
    source: str = ""  # where it came from, for the report
    groups: Tensor | None = None  # int64 (N,): whose image it is, to hold out whole people

    def __len__(self) -> int:
        return int(self.images.shape[0])


@dataclass(frozen=True)
class Observation:
    """What the server's seat really saw of one client in one round."""

    round: int  # from 1
    client: int  # the node the reply came from (its number, not its data), or EVERYONE
    scenario: Scenario
    weights: dict[str, Tensor]  # that were sent out: parameters and buffers
    update: Update  # the reply as it came over the wire
    num_examples: int  # declared: samples of the batch or the round; summed under secure aggregation
    wire_bytes: int = 0
    auxiliary: Auxiliary | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)  # BatchNorm statistics sent beside it
    labels: Tensor | None = None  # int64 (B,), where the client declares them

    @property
    def key(self) -> str:
        """Stable name of this observation, for files and logs."""
        return observation_name(self.round, self.client)


@dataclass(frozen=True)
class Reconstruction:
    """What a reconstruction attack answers for one observation."""

    images: Tensor  # float32 (B, C, H, W), clamped to [0, 1], on the CPU
    labels: Tensor  # int64 (B,): inferred, in the order of `images`; -1: none could be
    loss: float  # the attack's own final objective; restarts are compared by nothing else
    label_confidence: float = 1.0  # in [0, 1], by the attack's own measure
    certificate: float | None = None  # objective per kept number, about 1 or less if its noise model is right
    method: str = ""  # that was really used ("gauss-newton", "matching", ...)
    history: list[float] = field(default_factory=list)  # objective per iteration
    floors: dict[str, Tensor] = field(default_factory=dict)  # (B, C, H, W): the answer without the update
    details: dict[str, Any] = field(default_factory=dict)  # JSON-able extras for the record


@dataclass(frozen=True)
class Candidates:
    """Samples a membership attack is asked about: images (N, C, H, W) float32 in [0, 1] and labels (N,) int64.

    Which are members is the auditor's knowledge and not in here. `groups`, int64 (N,): whose each is, where people
    are asked about with several samples.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor | None = None


@dataclass(frozen=True)
class MembershipScores:
    """Score per candidate, shape (N,), float64; higher means "more likely a member"."""

    scores: Tensor
    statistic: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UnlearningRequest:
    """A client's request to forget one of: samples by position in its partition, samples, a class, all it has.

    `images`, float32 (n, C, H, W) in [0, 1], and `labels`, int64 (n,), may be samples it never trained on; `label`
    is of the class, of which all its samples are meant.
    """

    client: int
    positions: tuple[int, ...] = ()
    reason: str = ""
    images: Tensor | None = field(default=None, compare=False)
    labels: Tensor | None = field(default=None, compare=False)
    label: int | None = None
    everything: bool = False
