"""One holder of the digits, a training of its own, and a mechanism that forgets in it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.models import initial_weights
from fedattack.unlearning import Central, Cost, Deletion, Forgotten, History, Mechanism, Weights
from simulations.experiments.trainer import FederationTrainer

BASE = {
    "dataset": "digits",
    "model": "logistic",
    "clients": 1,
    "rounds": 10,
    "protocol": "fedavg",
    "local-steps": 50,
    "batch-size": 32,
    "learning-rate": 0.3,
    "training.weight_decay": 1e-3,
    "compressor": "none",
    "engine": "inline",
    "data.auxiliary_size": 0,
    "data.nonmembers": 540,
}


def holder(samples: int | None = None, **settings: object) -> tuple[Config, World]:
    """The settings and the world of one client with so many samples."""
    limit = {} if samples is None else {"limit": samples + 540}
    config = Config.from_mapping(BASE | limit | settings)
    return config, build_world(config)


class Scene:
    """Trained as the federation of one client trains, and released by the mechanism.

    `samples`: how many the client holds, 1,257 where nothing is said.
    """

    def __init__(
        self, mechanism: Mechanism, folder: Path, samples: int | None = None, **settings: object
    ) -> None:
        self.config, self.world = holder(samples, **settings)
        self.mechanism, self.folder = mechanism, folder
        self.trainer = FederationTrainer(self.config, self.world, None)
        self.central: Central = self.trainer.central()
        self.first = initial_weights(self.world.scenario.model, self.config.seed)
        self.history = self.ended("before", self.central.train(self.first))
        self.released = self.history.weights = mechanism.prepare({}, self.history, self.trainer)

    def ended(self, name: str, weights: Weights) -> History:
        """A history of which the initial and the last model are known."""
        history = History(self.folder / name, self.world.scenario, self.mechanism.keeps)
        history.keep_weights(0, self.first)
        history.keep_weights(self.central.rounds, weights)
        history.first_rounds = {0: 1}
        return history

    def forget(self, gone: Collection[int]) -> tuple[Forgotten, Cost]:
        """What the mechanism answers, and what that cost; what it kept for the next answer stays."""
        before = self.trainer.cost.copy()
        deletion = Deletion(0, frozenset(int(position) for position in gone))
        answer = self.mechanism.forget([deletion], self.history, self.trainer)
        return answer, self.trainer.cost.since(before)

    def go_on(self, answer: Forgotten) -> None:
        """Take an answer as what the next request finds."""
        folder = self.folder / f"after-{len(answer.excluded[0])}"
        self.history = self.history.fork(folder, answer.weights, answer.excluded)

    def retrained(self, gone: Collection[int]) -> tuple[Weights, Cost]:
        """What is released of a training without these positions, batches kept, and the training's cost."""
        gone = frozenset(int(position) for position in gone)
        before = self.trainer.cost.copy()
        history = self.ended(f"without-{len(gone)}", self.central.train(self.first, gone))
        cost = self.trainer.cost.since(before)
        return self.mechanism.prepare({0: gone}, history, self.trainer), cost

    def rho(self, weights: Weights, exact: Weights) -> float:
        """Distance to retraining as a share of the distance that retraining goes."""
        flat = self.central.flat
        apart, moved = flat(weights) - flat(exact), flat(self.released) - flat(exact)
        return float(apart.norm() / moved.norm())

    def accuracy(self, weights: Weights) -> float:
        """On held-out samples."""
        images, labels = self.world.dataset.tensors(self.world.pools.nonmembers)
        with torch.no_grad():
            logits = self.central.logits(self.central.flat(weights), weights, images)
        return float((logits.argmax(1) == labels).double().mean())
