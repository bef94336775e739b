"""Everything a run starts from: data set, pools, clients' partitions, auxiliary images and the public scenario."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedattack.config import Config
from fedattack.data.auxiliary import load_auxiliary
from fedattack.data.dataset import ImageDataset, joined, random_labels
from fedattack.data.facts import SERIES, series_shift
from fedattack.data.load import load_dataset
from fedattack.data.partitioners import partition
from fedattack.data.pools import Pools, make_pools
from fedattack.defenses import defended_model
from fedattack.errors import ConfigError
from fedattack.models import check_size, resolve
from fedattack.observation import Auxiliary, Scenario
from fedattack.task import TASKS


@dataclass(frozen=True, eq=False)
class World:
    """What exists before the first round."""

    dataset: ImageDataset
    pools: Pools
    partitions: tuple[np.ndarray, ...]  # sample ids of each client
    auxiliary: Auxiliary | None  # granted to the adversary
    scenario: Scenario  # public facts, with the resolved model

    @property
    def shift(self) -> str:
        """The warning that members and non-members come from other series of writers; empty where they do not."""
        members = np.concatenate(self.partitions)
        return series_shift(self.dataset.facts.get(SERIES), members, self.pools.nonmembers)


def build_world(config: Config) -> World:
    """The world of a configuration; the same configuration and seed give the same world, bit for bit.

    Raises ConfigError or DataError before anything is written.
    """
    data, seed = config.data, config.seed
    # Random labels need the head's width, and the head may depend on the natural label space.
    dataset = load_dataset(data, seed)
    classes = dataset.classes
    if data.labels == "random" and config.model.classes is not None:
        classes = min(classes, config.model.classes)
    given = {name: getattr(data, name) for name in ("mean", "std") if getattr(data, name) is not None}
    model = resolve(config.model.model_copy(update=given), dataset.channels, dataset.image_size, classes)
    for setting, wanted, found in (
        ("channels", model.channels, dataset.channels),
        ("image_size", model.image_size, dataset.image_size),
    ):
        if wanted != found:
            hint = "; 'data.image_size' resizes the images" if setting == "image_size" else ""
            raise ConfigError(
                f"setting 'model.{setting}' = {wanted}: data set {data.name!r} has {found}{hint}; leave it open"
            )
    size_note = check_size(model, data.image_size is None)
    if size_note:
        dataset = replace(dataset, note=joined(dataset.note, size_note))
    if data.labels == "random":
        dataset = random_labels(dataset, model.resolved[2], seed)
    model = TASKS.get(config.training.task)().model(model, config.gan)
    pools = make_pools(dataset, data, seed)
    partitions = partition(dataset, pools.clients, config.partition, config.federation.clients, seed)
    training = config.training
    if training.local_epochs is not None:
        most = max(training.steps(len(ids)) for ids in partitions)
        training = training.model_copy(update={"local_steps": most})
    return World(
        dataset=dataset,
        pools=pools,
        partitions=tuple(partitions),
        auxiliary=load_auxiliary(data, dataset, pools, seed),
        scenario=Scenario(
            model=defended_model(model, config.defense),
            training=training,
            compression=config.compression,
            defense=config.defense,
            gan=config.gan,
        ),
    )


def world_record(world: World) -> dict[str, Any]:
    """JSON-able record of the split, for the run folder: sizes, sample ids, notes, labels per client."""
    dataset, pools, auxiliary = world.dataset, world.pools, world.auxiliary
    dealt = np.concatenate(world.partitions)
    return {
        "dataset": {
            "name": dataset.name,
            "note": joined(dataset.note, pools.note, world.shift),
            "samples": len(dataset),
            "channels": dataset.channels,
            "image_size": dataset.image_size,
            "classes": dataset.classes,
            "groups": None if dataset.groups is None else len(np.unique(dataset.groups)),
        },
        "pools": {
            name: {"size": len(ids), "ids": ids.tolist()}
            for name, ids in vars(pools).items()
            if name != "note"
        },
        "auxiliary": None
        if auxiliary is None
        else {"source": auxiliary.source, "size": len(auxiliary), "labelled": auxiliary.labels is not None},
        "unassigned": len(pools.clients) - len(dealt),
        "clients": [_client_record(dataset, i, ids) for i, ids in enumerate(world.partitions)],
    }


def _client_record(dataset: ImageDataset, client: int, ids: np.ndarray) -> dict[str, Any]:
    labels, counts = np.unique(dataset.labels[ids], return_counts=True)
    histogram = {str(label): int(count) for label, count in zip(labels, counts, strict=True)}
    record: dict[str, Any] = {"client": client, "size": len(ids), "ids": ids.tolist(), "labels": histogram}
    if dataset.groups is not None:
        record["groups"] = np.unique(dataset.groups[ids]).tolist()
    return record
