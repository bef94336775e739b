"""What a server keeps while it trains, so that it can forget later: on disk, whatever the number of rounds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from fedattack.errors import ConfigError, DataError, RunFailed
from fedattack.models import build_model
from fedattack.observation import Observation, Scenario, Update, UpdateKind
from fedattack.sealed import Identity, read_sealed, write_sealed
from fedattack.task import trained_parameters
from fedattack.training import weight_step

Weights = dict[str, Tensor]
"""A state dict: name -> tensor, parameters and buffers."""

Kept = Literal["checkpoints", "updates"]
"""Global models after every n-th round, or what each client sent in the round after each of those."""

_BUFFER = "buffer."


@dataclass(frozen=True)
class ClientUpdate:
    """What one client's reply stands for."""

    client: int
    change: Weights  # trained parameter -> change of the global weights if it were alone
    buffers: Weights  # BatchNorm statistics sent beside it
    examples: int  # declared number of samples

    @classmethod
    def of(cls, observation: Observation) -> ClientUpdate:
        """The reply that was observed."""
        step = weight_step(observation.scenario.training, observation.update.kind)
        change = {name: step * tensor for name, tensor in observation.update.dense().items()}
        return cls(observation.client, change, observation.buffers, observation.num_examples)


class Replies(Protocol):
    """Where what clients sent is written down already."""

    def observed(self, round: int, clients: Collection[int]) -> Iterator[Observation]:
        """What these clients sent in a round, ascending."""
        ...

    def bytes(self, round: int) -> int:
        """What a round takes on disk; 0 where it is not there."""
        ...


@dataclass
class History:
    """The global models and client updates of a training, as far as the mechanism declares that it needs them.

    The `folder` is made when the first file is written; files that are there already are kept. Checkpoint 0, the
    initial model, is kept in any case; with `every` n those of rounds 0, n, 2n, ... and updates of the rounds 1, n +
    1, 2n + 1, ... that start from them. Updates that `replies` has already are read from there, not written again.
    """

    folder: Path
    scenario: Scenario
    keeps: Collection[Kept] = ()  # of the mechanism
    every: int = 1
    weights: Weights = field(default_factory=dict)  # the current global model
    rounds: int = 0  # trained so far
    first_rounds: dict[int, int] = field(default_factory=dict)  # client -> first round its update went into
    excluded: Mapping[int, frozenset[int]] = field(default_factory=dict)  # removed by earlier requests
    replies: Replies | None = None
    identity: Identity | None = None  # of the run whose files these are
    taken: dict[int, set[int]] = field(default_factory=dict)  # round -> clients to be read from `replies`

    def keep_weights(self, round: int, weights: Weights) -> None:
        """Take note of the global model after a round."""
        self.weights, self.rounds = weights, round
        path = self.folder / f"weights-{round:05d}.safetensors"
        wanted = round == 0 or ("checkpoints" in self.keeps and round % self.every == 0)
        if wanted and not path.is_file():
            write_sealed(path, weights, path.stem, self.identity)

    def wants_updates(self, round: int) -> bool:
        """Whether the clients' updates of a round are kept."""
        return "updates" in self.keeps and (round - 1) % self.every == 0

    def keep_update(self, observation: Observation) -> None:
        """Keep what a client sent, as sparse as it came."""
        if self.replies is not None and self.replies.bytes(observation.round):
            self.taken.setdefault(observation.round, set()).add(observation.client)
            return
        update = observation.update
        path = self.folder / f"update-{observation.round:05d}-{observation.client:05d}.safetensors"
        if path.is_file():
            return
        tensors = {_BUFFER + name: tensor for name, tensor in observation.buffers.items()}
        tensors["values"] = update.values
        if update.indices is not None:
            tensors["indices"] = update.indices
        told = {"kind": update.kind, "examples": str(observation.num_examples)}
        write_sealed(path, tensors, path.stem, self.identity, told)

    def note_round(self, round: int, clients: Collection[int], aggregated: bool) -> None:
        """Take note of whose updates went into a round's aggregate; those of a round without one are dropped."""
        if not aggregated:
            self.taken.pop(round, None)
            for path in self.folder.glob(f"update-{round:05d}-*.safetensors"):
                path.unlink()
            return
        for client in clients:
            self.first_rounds[client] = min(round, self.first_rounds.get(client, round))

    @property
    def checkpoints(self) -> list[int]:
        """Rounds after which the global model was kept, ascending; 0 is the initial model."""
        return sorted(int(path.stem.split("-")[1]) for path in self.folder.glob("weights-*.safetensors"))

    @property
    def update_rounds(self) -> list[int]:
        """Rounds whose updates were kept, ascending."""
        files = {int(path.stem.split("-")[1]) for path in self.folder.glob("update-*.safetensors")}
        return sorted(files.union(self.taken))

    def update_rounds_after(self, start: int) -> list[int]:
        """Those of :attr:`update_rounds` after a checkpoint; RunFailed where there is none."""
        found = [round for round in self.update_rounds if round > start]
        if not found:
            raise RunFailed(
                f"cannot forget: no client update was kept after round {start}; setting "
                f"'unlearning.checkpoint_every' = {self.every} keeps those of every {self.every}th round"
            )
        return found

    def checkpoint(self, round: int) -> Weights:
        """The global model after a round of :attr:`checkpoints`; the caller owns it."""
        return self._read(self.folder / f"weights-{round:05d}.safetensors")[0]

    def updates(self, round: int) -> Iterator[ClientUpdate]:
        """The kept updates of a round, one at a time, in ascending order of the clients."""
        if self.replies is not None and round in self.taken:
            yield from map(ClientUpdate.of, self.replies.observed(round, self.taken[round]))
            return
        for path in sorted(self.folder.glob(f"update-{round:05d}-*.safetensors")):
            tensors, told = self._read(path)
            kind: UpdateKind = "delta" if told["kind"] == "delta" else "gradient"
            update = Update(*self._layout, tensors.get("indices"), tensors["values"], kind)
            buffers = {n.removeprefix(_BUFFER): t for n, t in tensors.items() if n.startswith(_BUFFER)}
            client = int(path.stem.split("-")[2])
            yield ClientUpdate.of(
                Observation(round, client, self.scenario, {}, update, int(told["examples"]), buffers=buffers)
            )

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What was written to a file; RunFailed where it is not that."""
        try:
            return read_sealed(path, path.stem, self.identity)
        except DataError as error:
            raise RunFailed(f"cannot forget: {error}") from None

    @cached_property
    def _layout(self) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
        trained = trained_parameters(build_model(self.scenario.model))
        return tuple(trained), tuple(tuple(parameter.shape) for parameter in trained.values())

    @property
    def bytes(self) -> int:
        """What it takes on disk, a mechanism's own state and what it reads of `replies` included."""
        own = sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())
        return own + sum(self.replies.bytes(round) for round in self.taken if self.replies is not None)

    def fork(self, folder: Path, weights: Weights, excluded: Mapping[int, frozenset[int]]) -> History:
        """The same history in `folder`, sharing its files, as it is after a deletion."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.safetensors"):
            if not (folder / path.name).exists():
                os.link(path, folder / path.name)
        return replace(self, folder=folder, weights=weights, excluded=excluded)

    def ignorant(self, clients: Collection[int]) -> int | None:
        """The newest checkpoint that cannot know any sample of these clients; None where the model never met them.

        Which of its samples a client used in a round, the server does not know: the checkpoint is older than the
        first round in which any of them took part. Raises RunFailed if none is old enough.
        """
        entered = [self.first_rounds[client] for client in clients if client in self.first_rounds]
        if not entered:
            return None
        old = [round for round in self.checkpoints if round < min(entered)]
        if not old:
            raise RunFailed(
                f"cannot forget: no checkpoint is older than round {min(entered)} (kept: "
                f"{self.checkpoints or 'none'}); the initial model counts as round 0"
            )
        return max(old)


def check_space(
    folder: Path, scenario: Scenario, keeps: Collection[Kept], every: int, rounds: int, updates: int
) -> None:
    """Refuse (ConfigError), before the first round, a history that does not fit the disk that `folder` is to lie on.

    `updates`: client updates that are written in a round, as large as the model, which compressed ones are not.
    """
    weights = build_model(scenario.model).state_dict().values()
    size, kept = sum(tensor.nbytes for tensor in weights), -(-rounds // every)
    needed = size * ("checkpoints" in keeps) * (kept + 1)
    if scenario.compression.name == "none":
        needed += size * ("updates" in keeps) * kept * updates
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"setting 'unlearning.checkpoint_every' = {every}: what the server keeps to forget later takes about "
            f"{needed:,} bytes, and {str(place)!r} has {free:,} left; raise it, or give another 'output.run_dir'"
        )
