"""Classifiers that a benchmark attacks: trained in one place, with the augmentation and the defences of a client.

A weights file is one that ``model.weights`` reads. A killed training goes on from its last whole epoch, to the same
bits on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.defenses import ClientDefenses, build_defenses, check_defenses
from fedattack.errors import ConfigError, DataError, RunFailed
from fedattack.files import write_tensors
from fedattack.metrics import wilson
from fedattack.models import build_model, initial_weights
from fedattack.rng import adversary_seed, numpy_rng
from fedattack.storage.observations import read_tensors
from fedattack.storage.plain import read_json, write_json
from fedattack.task import LossAndGradient, trained_parameters
from fedattack.training import evaluate

FORMAT = 1

_MILESTONES = (2.667, 1.6, 1.142)
"""The learning rate falls to a tenth at the epochs that are the whole part of `epochs` over these."""


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum and a learning rate that falls three times; the defaults are the SemSim benchmark's.

    `loss_weight` is what the cross-entropy is multiplied by. The benchmark's one half scales every gradient, and so
    halves the learning rate; attacks here see the gradient of the whole cross-entropy, which cosines do not notice,
    while squared distances weigh four times as much beside total variation (absolute ones twice).
    """

    epochs: int = 200
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    loss_weight: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(
                    f"setting 'schedule.{name}' = {value!r}: a whole number from {least} is accepted"
                )
        for name in ("learning_rate", "momentum", "weight_decay", "loss_weight"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"setting 'schedule.{name}' = {value!r}: a number from 0 is accepted")
        if self.nesterov and not self.momentum:
            raise ConfigError("setting 'schedule.nesterov' = True: needs momentum above 0")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        passed = sum(0 < self.epochs // part <= epoch for part in _MILESTONES)
        return self.learning_rate * 0.1**passed


SCHEDULES: dict[str, Schedule] = {
    "published": Schedule(),
    "short": Schedule(epochs=15, batch_size=32, learning_rate=0.02),
}
"""Schedules by name; "short" is ours, for a few thousand images on a CPU."""


@dataclass(frozen=True)
class Trained:
    """A finished classifier: its weights file, and the content of the JSON file beside it."""

    weights: Path
    record: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a classifier is trained on and measured by: sample ids of the world's data set."""

    config: Config
    world: World
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    schedule: Schedule

    def __post_init__(self) -> None:
        for name in ("train", "held_out"):
            if not len(getattr(self, name)):
                raise DataError(f"no images to be {name.replace('_', ' ')} for a classifier")

    @property
    def document(self) -> dict[str, Any]:
        """Everything that can change a bit of the weights, or the accuracy, JSON-able."""
        config = self.config
        pixels = {name: self._hash(getattr(self, name)) for name in ("train", "held_out")}
        model = self.world.scenario.model.model_dump(mode="json", exclude={"weights"})
        return {
            "format": FORMAT,
            "seed": config.seed,
            "model": model,
            "defense": config.defense.model_dump(mode="json"),
            "schedule": asdict(self.schedule),
            "images": pixels,
        }

    def _hash(self, ids: NDArray[np.int64]) -> str:
        images, labels = self.world.dataset.tensors(ids)
        return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 of :attr:`document`, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()


def lesson(config: Config, schedule: Schedule, share: float = 1.0) -> Lesson:
    """Train on the first `share` of the auxiliary pool in a seeded order, measure on the held-out pool.

    Clients' images are in neither. Raises DataError where a pool is empty, NotApplicable for a defence that does not
    apply.
    """
    world = build_world(config)
    check_defenses(world.scenario)
    first, _ = public_parts(world, config.seed, share)
    return Lesson(config, world, first, world.pools.nonmembers, schedule)


def public_parts(world: World, seed: int, share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The auxiliary pool in two disjoint parts, sample ids ascending: that share of it, and the rest."""
    pool = world.pools.auxiliary
    order = numpy_rng(seed, "classifier pool").permutation(len(pool))
    cut = round(share * len(pool))
    return np.sort(pool[order[:cut]]), np.sort(pool[order[cut:]])


def train_classifier(work: Lesson, folder: Path, label: str, device: torch.device | None = None) -> Trained:
    """Train, or take up, or find finished in `folder`, a classifier; files are named by label and digest.

    Raises RunFailed where the loss becomes NaN or infinite, or the disk is full.
    """
    if (found := finished(work, folder, label)) is not None:
        return found
    document, digest = work.document, work.digest
    weights, told, state = _places(folder, label, digest)
    place_of = device or torch.device("cpu")
    model = build_model(work.world.scenario.model)
    model.load_state_dict(initial_weights(work.world.scenario.model, work.config.seed))
    model.to(place_of)
    optimiser = torch.optim.SGD(
        trained_parameters(model).values(),
        lr=work.schedule.learning_rate,
        momentum=work.schedule.momentum,
        nesterov=work.schedule.nesterov,
        weight_decay=work.schedule.weight_decay,
    )
    losses = _taken_up(state, digest, model, optimiser)
    for epoch in range(len(losses), work.schedule.epochs):
        losses.append(_epoch(work, model, optimiser, epoch))
        _keep(state, digest, model, optimiser, losses)
    final = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    accuracy = {name: _accuracy(work, model, ids) for name, ids in _measured(work).items()}
    write_tensors(weights, final, {"digest": digest})
    write_json(told, {"digest": digest, "label": label, **document, "losses": losses, "accuracy": accuracy})
    state.unlink(missing_ok=True)
    return Trained(weights, read_json(told))


def finished(work: Lesson, folder: Path, label: str) -> Trained | None:
    """What an earlier training of the same configuration left in `folder`, if it came to its end."""
    weights, told, _ = _places(folder, label, work.digest)
    if not (told.is_file() and weights.is_file()):
        return None
    found = read_json(told)
    if not isinstance(found, dict) or found.get("digest") != work.digest:
        raise DataError(f"{told} is not the record of this classifier; remove it, or give another folder")
    return Trained(weights, found)


def _places(folder: Path, label: str, digest: str) -> tuple[Path, Path, Path]:
    """The weights file, the record, which is written last, and the state of an unfinished training."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.")[:60]
    stem = f"{words}-{digest[:12]}"
    return folder / f"{stem}.safetensors", folder / f"{stem}.json", folder / f"{stem}.state.safetensors"


def _measured(work: Lesson) -> dict[str, NDArray[np.int64]]:
    return {"held-out": work.held_out, "training": work.train}


def _accuracy(work: Lesson, model: nn.Module, ids: NDArray[np.int64]) -> dict[str, float]:
    """Share of right answers on untransformed images, with its interval."""
    images, labels = work.world.dataset.tensors(ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    share = evaluate(model, state, images, labels)["accuracy"]
    ends = wilson(round(share * len(ids)), len(ids))
    return {"mean": ends.mean, "low": ends.low, "high": ends.high, "count": ends.count}


def _epoch(work: Lesson, model: nn.Module, optimiser: torch.optim.Optimizer, epoch: int) -> float:
    """One pass over the training images; the mean loss of its batches."""
    schedule, seed = work.schedule, work.config.seed
    images, labels = work.world.dataset.tensors(work.train)
    order = numpy_rng(seed, "classifier order", epoch).permutation(len(labels))
    # Not the streams of the attacked clients, whose draws are theirs.
    draws, defenses = adversary_seed(seed, "classifier"), tuple(build_defenses(work.config.defense).values())
    parameters = trained_parameters(model)
    device = next(iter(parameters.values())).device
    for group in optimiser.param_groups:
        group["lr"] = schedule.rate(epoch)

    def step(model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        loss = schedule.loss_weight * cross_entropy(model(images), labels)
        return loss, torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)

    model.train()
    losses: list[float] = []
    for number, start in enumerate(range(0, len(order), schedule.batch_size)):
        batch = torch.from_numpy(order[start : start + schedule.batch_size])
        defended = ClientDefenses(defenses, draws, epoch, number, step)
        shown = defended.images(images[batch]).to(device)
        loss, gradient = defended.gradient(model, shown, labels[batch].to(device))
        sent = defended.update(dict(zip(parameters, gradient, strict=True)))
        for name, parameter in parameters.items():
            parameter.grad = sent[name].to(device)
        optimiser.step()
        losses.append(float(loss.detach()))
    mean = float(np.mean(losses))
    if not math.isfinite(mean):
        raise RunFailed(
            f"a classifier diverged in epoch {epoch + 1}: its loss became {mean} (setting 'schedule.learning_rate' "
            f"= {schedule.learning_rate}); lower it"
        )
    return mean


def _keep(
    path: Path, digest: str, model: nn.Module, optimiser: torch.optim.Optimizer, losses: Sequence[float]
) -> None:
    """Store what the next epoch needs."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in trained_parameters(model).items():
        moved = optimiser.state[parameter].get("momentum_buffer")
        if moved is not None:
            tensors[f"momentum.{name}"] = moved
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["digest"] = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
    write_tensors(path, tensors)


def _taken_up(path: Path, digest: str, model: nn.Module, optimiser: torch.optim.Optimizer) -> list[float]:
    """Load the state of a killed training into model and optimiser; the losses of its epochs, none if it is new."""
    if not path.is_file():
        return []
    tensors = read_tensors(path)
    wanted = model.state_dict()
    found = {name: tensors.get(f"model.{name}") for name in wanted}
    device = next(model.parameters()).device
    try:
        if bytes(tensors["digest"].tolist()).hex() != digest:
            raise DataError(f"{path} is the state of another training; remove it")
        model.load_state_dict(found)
        for name, parameter in trained_parameters(model).items():
            if f"momentum.{name}" in tensors:
                moved = tensors[f"momentum.{name}"].to(device)
                if moved.shape != parameter.shape:
                    raise KeyError(name)
                optimiser.state[parameter]["momentum_buffer"] = moved
        return list(tensors["losses"].tolist())
    except (KeyError, RuntimeError, AttributeError, ValueError):
        raise DataError(f"{path} does not hold the state of this training; remove it") from None
