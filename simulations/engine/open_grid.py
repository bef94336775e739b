"""The grid that goes with the configured engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedattack.config import Config
from simulations.client_app import Workplace

if TYPE_CHECKING:
    from fedattack.data import World
from simulations.engine.local_grid import InlineGrid, LocalGrid
from simulations.engine.ray_grid import RayGrid
from simulations.engine.ray_session import ray_session


@contextmanager
def open_grid(config: Config, world: World) -> Iterator[LocalGrid]:
    """The grid of the configured engine, with the session it needs, for the block."""
    place = Workplace.of(config, world)
    if config.engine.name == "inline":
        grid: LocalGrid = InlineGrid(place)
        try:
            yield grid
        finally:
            grid.close()
        return
    with ray_session(config.engine):
        grid = RayGrid(place)
        try:
            yield grid
        finally:
            grid.close()
