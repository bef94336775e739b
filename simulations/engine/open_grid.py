"""The grid that goes with the configured engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext

from fedattack.config import Config
from fedattack.data import World
from simulations.client_app import Workplace
from simulations.engine.local_grid import InlineGrid, LocalGrid
from simulations.engine.ray_grid import RayGrid
from simulations.engine.ray_session import ray_session


@contextmanager
def open_grid(config: Config, world: World) -> Iterator[LocalGrid]:
    """The grid of the configured engine, with the session it needs, for the block."""
    place, inline = Workplace.of(config, world), config.engine.name == "inline"
    session = nullcontext() if inline else ray_session(config.engine)
    with (
        session,
        closing(InlineGrid(place, deadline=config.engine.deadline) if inline else RayGrid(place)) as grid,
    ):
        yield grid
