"""Reference models: what the adversary trains on what it knows itself, as a client trains."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adversaries.base import Progress
from adversaries.membership.knowledge import Knowledge, References
from fedattack.config import Config
from fedattack.errors import DataError, FedattackError
from fedattack.files import content_hash
from fedattack.metrics.weights import sha256
from fedattack.models import build_model, initial_weights
from fedattack.observation import Candidates, Scenario
from fedattack.rng import adversary_seed, numpy_rng
from fedattack.sealed import read_sealed, write_sealed
from fedattack.storage import RunFolder
from fedattack.task import task_of
from fedattack.training import sample_logits, train_alone
from simulations.experiments.executor import Job, choose_device, reason

log = logging.getLogger("fedattack.references")

FORMAT = "fedattack references 1"


@dataclass(frozen=True)
class Recipe:
    """How the reference models of a run are trained; `seed` is the adversary's own, `rounds` the federation's."""

    scenario: Scenario
    rounds: int
    seed: int

    def trained_on(self, index: int, samples: Candidates) -> NDArray[np.bool_]:
        """Which of the samples, (n,), model `index` is trained on: a half, and of 2i + 1 the other half of 2i.

        Where samples belong to people, whole people are dealt.
        """
        units = np.arange(len(samples.labels)) if samples.groups is None else samples.groups.numpy()
        names, places = np.unique(units, return_inverse=True)
        order = numpy_rng(self.seed, "references", index // 2).permutation(len(names))
        first = np.isin(places, order[: len(names) // 2])
        return first if index % 2 == 0 else ~first

    def train(self, index: int, samples: Candidates, device: torch.device) -> Tensor:
        """Logits of model `index` on all samples, float32 (n, classes): a federation of one client with its half."""
        model = build_model(self.scenario.model).to(device)
        weights = initial_weights(self.scenario.model, adversary_seed(self.seed, "weights", index))
        own = np.flatnonzero(self.trained_on(index, samples))
        known = samples.images[own], samples.labels[own]
        weights = train_alone(model, weights, *known, self.scenario, self.rounds, self.seed, index)
        return sample_logits(model.eval(), weights, samples.images)

    def digest(self, samples: Candidates, device: torch.device) -> str:
        """Of all that a model's answers depend on."""
        told = [FORMAT, torch.__version__, device.type, str(self.rounds), str(self.seed)]
        told += [
            part.model_dump_json()
            for part in (self.scenario.model, self.scenario.training, self.scenario.gan)
        ]
        if (file := self.scenario.model.weights) is not None:
            told.append(sha256(Path(file)))
        tensors = {"images": samples.images, "labels": samples.labels, "groups": samples.groups}
        told.append(content_hash({name: t for name, t in tensors.items() if t is not None}))
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def known_samples(knowledge: Knowledge) -> Candidates:
    """Candidates, then public samples; people of the one are not people of the other."""
    parts = [knowledge.candidates] + ([knowledge.public] if knowledge.public is not None else [])
    images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
    if all(part.groups is None for part in parts):
        return Candidates(images, labels)
    groups: list[Tensor] = []
    for part in parts:
        own = (
            torch.arange(len(part.labels))
            if part.groups is None
            else part.groups.unique(return_inverse=True)[1]
        )
        groups.append(own + sum(int(before.max()) + 1 for before in groups if len(before)))
    return Candidates(images, labels, torch.cat(groups))


@dataclass(frozen=True)
class ReferenceModel(Job):
    """The training of one reference model; given the seat's knowledge."""

    index: int
    recipe: Recipe
    name: str = "references"

    @property
    def key(self) -> str:  # type: ignore[override]
        return f"model {self.index}"

    def run(self, shared: Any, device: torch.device, progress: Progress) -> Trained:
        try:
            samples = known_samples(shared.knowledge)
            return Trained(self.recipe.train(self.index, samples, device))
        except (FedattackError, RuntimeError) as error:
            return self.lost(reason(error))

    def lost(self, why: str) -> Trained:
        return Trained(None, why)


@dataclass(frozen=True)
class Trained:
    """A reference model's logits on all samples, or why there are none."""

    logits: Tensor | None
    why: str = ""


class TrainedReferences:
    """The reference models of a run, kept in a folder that outlives it, under the hash of all that matters.

    A file a model, as soon as it is trained; one that is damaged is trained anew, with a warning.
    """

    def __init__(
        self, config: Config, folder: RunFolder, knowledge: Knowledge, scenario: Scenario, rounds: int
    ) -> None:
        self._count, self._knowledge = config.attack.references, knowledge
        self._recipe = Recipe(scenario, rounds, adversary_seed(config.seed, "references"))
        self._samples = known_samples(knowledge)
        above = config.output.cache_dir or folder.path.parent / "references"
        self.folder = Path(above) / self._recipe.digest(self._samples, choose_device(config.engine.device))
        self._logits = {i: found for i in range(self._count) if (found := self._read(i)) is not None}
        self._found = len(self._logits)
        self._failed: dict[int, str] = {}
        folder.log(f"references: {self._found} of {self._count} models are in {self.folder}")
        if knowledge.public is None:
            folder.log(
                "references: no labelled public samples are granted; each model is trained on half of the "
                f"{len(self._samples.labels)} candidates alone"
            )

    def missing(self) -> list[ReferenceModel]:
        """The trainings that are left to do."""
        return [ReferenceModel(i, self._recipe) for i in range(self._count) if i not in self._logits]

    def keep(self, job: ReferenceModel, found: Trained) -> None:
        """Store what became of one."""
        if found.logits is None:
            self._failed[job.index] = found.why
            return
        halves = torch.from_numpy(self._recipe.trained_on(job.index, self._samples))
        path = self._file(job.index)
        write_sealed(path, {"logits": found.logits, "trained_on": halves}, f"{self.folder.name}/{path.name}")
        self._logits[job.index] = found.logits

    @property
    def share(self) -> float:
        """Of the models, those that there are or cannot be."""
        return (len(self._logits) + len(self._failed)) / max(1, self._count)

    def collected(self) -> References | None:
        """All that there are; None: none."""
        indices = sorted(self._logits)
        if not indices:
            return None
        own = len(self._knowledge.candidates.labels)
        logits = torch.stack([self._logits[i] for i in indices])
        halves = np.stack([self._recipe.trained_on(i, self._samples) for i in indices])
        trained_on = torch.from_numpy(halves)
        return References(logits[:, :own], trained_on[:, :own], logits[:, own:], trained_on[:, own:])

    @cached_property
    def note(self) -> str:
        """How many there are, and where from."""
        new = len(self._logits) - self._found
        text = (
            f"{len(self._logits)} reference models: {new or 'none'} trained, {self._found} from {self.folder}"
        )
        if self._failed:
            index, why = next(iter(self._failed.items()))
            text += f"; {len(self._failed)} could not be trained (model {index}: {why})"
        return text

    def _file(self, index: int) -> Path:
        return self.folder / f"model-{index:04d}.safetensors"

    def _read(self, index: int) -> Tensor | None:
        """A stored model's logits; None where there are none to be trusted."""
        path = self._file(index)
        if not path.is_file():
            return None
        halves = torch.from_numpy(self._recipe.trained_on(index, self._samples))
        scenario = self._recipe.scenario
        wanted = (len(halves), *task_of(scenario).output(scenario.model))
        try:
            held, _ = read_sealed(path, f"{self.folder.name}/{path.name}")
            logits, dealt = held.get("logits"), held.get("trained_on")
            if logits is None or tuple(logits.shape) != wanted or not bool(logits.isfinite().all()):
                raise DataError(f"{path} holds no finite logits of shape {wanted}")
            if dealt is None or not torch.equal(dealt, halves):
                raise DataError(f"{path} was trained on other samples than its name says")
        except DataError as error:
            log.warning("reference model %d is trained anew: %s", index, error)
            return None
        return logits
