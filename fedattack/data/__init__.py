"""Data sets by name, how they are cut into pools and dealt out to clients, and the adversary's public images."""

from __future__ import annotations

from fedattack.data.auxiliary import load_auxiliary
from fedattack.data.dataset import ImageDataset, Listing
from fedattack.data.load import DATASETS, load_dataset
from fedattack.data.partitioners import PARTITIONERS, partition
from fedattack.data.pools import Pools, make_pools
from fedattack.data.world import World, build_world, world_record

__all__ = [
    "DATASETS",
    "PARTITIONERS",
    "ImageDataset",
    "Listing",
    "Pools",
    "World",
    "build_world",
    "load_auxiliary",
    "load_dataset",
    "make_pools",
    "partition",
    "world_record",
]
