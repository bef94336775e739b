"""The private batches of a run, drawn again from its settings: what only the auditor may do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedattack.config import Config
from fedattack.data import World
from fedattack.defenses import ClientDefenses, build_defenses
from fedattack.groundtruth import GroundTruth
from fedattack.observation import EVERYONE
from simulations.client_app import round_batches, used_positions


class PrivateBatches:
    """What clients trained on, round by round."""

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._defenses = tuple(build_defenses(config.defense).values())

    def truth(self, round: int, client: int, answered: Sequence[int] = ()) -> GroundTruth:
        """The truth behind an update, of all clients that `answered` where it is everyone's."""
        clients = answered if client == EVERYONE else (client,)
        batches = [self._batch(round, one) for one in clients]
        ids = np.concatenate([ids for ids, _ in batches])
        images, labels = self._world.dataset.tensors(ids)
        shown = [part for _, part in batches if part is not None]
        seen = torch.cat(shown) if shown else None
        return GroundTruth(round, client, images, labels, tuple(ids.tolist()), seen)

    def _batch(self, round: int, client: int) -> tuple[NDArray[np.int64], Tensor | None]:
        """Sample ids that a client trained on in a round, ascending, and what the model was shown, if not those."""
        partition = self._world.partitions[client]
        used = partition[used_positions(round_batches(self._config, len(partition), round, client))]
        defended = ClientDefenses(self._defenses, self._config.seed, round, client)
        order = np.argsort(used)
        if not defended.transforms:
            return used[order], None
        images, _ = self._world.dataset.tensors(used)  # in the client's own order, on which its draws depend
        return used[order], defended.images(images)[torch.from_numpy(order)]
