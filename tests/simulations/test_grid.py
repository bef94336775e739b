"""The grids: same seed, same bits, whatever the engine, the number of actors, or what is killed on the way."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import rigged_clients
import torch

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import BadRequest, RunFailed
from simulations.client_app import Workplace
from simulations.engine.federation import FederationResult, run_federation
from simulations.engine.flower_internals import loopback_ray
from simulations.engine.local_grid import InlineGrid
from simulations.engine.ray_grid import RayGrid
from simulations.engine.ray_session import ray_session

CLIENTS, ROUNDS, SEED = 6, 3, 5

# DGC keeps momentum and residual with the client, random batches and random dropout draw from every stream.
SETTINGS = {
    "dataset": "digits",
    "model": "tiny-cnn",
    "clients": CLIENTS,
    "rounds": ROUNDS,
    "compressor": "dgc",
    "compression": 0.05,
    "protocol": "fedavg",
    "local-steps": 2,
    "batch-size": 4,
    "dropout": 0.2,
    "participation": 0.85,
    "seed": SEED,
    "limit": 300,
}


def settings(**more: object) -> Config:
    return Config.from_mapping(SETTINGS | {k.replace("_", "-"): v for k, v in more.items()})


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(settings())


@pytest.fixture(scope="module")
def expected(world: World) -> FederationResult:
    return run_federation(settings(engine="inline"), world)


@pytest.fixture(scope="module")
def ray_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    flags = tmp_path_factory.mktemp("flags")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(rigged_clients.FLAGS, str(flags))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # for the actors
        with ray_session(settings(actors=3).engine):
            yield flags


def on_ray(config: Config, world: World, client_app: str = "simulations.client_app:app") -> FederationResult:
    grid = RayGrid(Workplace.of(config, world), client_app)
    try:
        return run_federation(config, world, grid=grid)
    finally:
        grid.close()


def assert_same(one: FederationResult, other: FederationResult) -> None:
    assert one.weights.keys() == other.weights.keys()
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, other.weights[name]), name
    for mine, theirs in zip(one.rounds, other.rounds, strict=True):
        assert mine.clients == theirs.clients
        assert mine.dropped == theirs.dropped
        assert mine.wire_bytes == theirs.wire_bytes
        assert mine.train_loss == theirs.train_loss
        assert mine.failed == theirs.failed == ()
        assert mine.rejected == theirs.rejected == ()


@pytest.mark.ray
@pytest.mark.slow
def test_two_nodes_and_the_loss_of_one_change_no_bit(world: World) -> None:
    """A real cluster of two raylets, each with room for one actor; then one of them is killed."""
    import ray
    from ray.cluster_utils import Cluster

    config = settings(compressor="topk", actors=2)
    expected = run_federation(settings(compressor="topk", engine="inline"), world)
    with loopback_ray():
        node = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
        cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        other = cluster.add_node(**node)
        try:
            with ray_session(config.engine.model_copy(update={"ray_address": cluster.address})):
                grid = RayGrid(Workplace.of(config, world))
                places = ray.get([actor.ready.remote() for actor in grid.actors])
                assert len(set(places)) == 2
                assert_same(run_federation(config, world, grid=grid), expected)

                def lose(number: int, weights: object) -> None:
                    if number == 1:
                        cluster.remove_node(other, allow_graceful=False)

                assert_same(run_federation(config, world, grid=grid, on_weights=lose), expected)
                places = ray.get([actor.ready.remote() for actor in grid.actors])
                assert len(set(places)) == 1, "the actor that is left has taken over"
                grid.close()
        finally:
            cluster.shutdown()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:99999"])
def test_no_cluster_at_the_address_is_a_bad_request(address: str) -> None:
    engine = settings().engine.model_copy(update={"ray_address": address})
    with pytest.raises(BadRequest, match=f"'engine.ray_address' = '{address}'"), ray_session(engine):
        pass


def test_inline_repeats_itself_and_something_was_dropped(world: World, expected: FederationResult) -> None:
    assert_same(run_federation(settings(engine="inline"), world), expected)
    drawn = [len(r.clients) + len(r.dropped) for r in expected.rounds]
    assert drawn == [5, 5, 5]  # round(0.85 * 6)
    assert any(r.dropped for r in expected.rounds)
    assert {r.clients + r.dropped for r in expected.rounds} != {tuple(range(5))}


def test_another_seed_gives_other_bits(world: World, expected: FederationResult) -> None:
    other = run_federation(settings(engine="inline", seed=6), build_world(settings(seed=6)))
    assert not torch.equal(other.weights["head.weight"], expected.weights["head.weight"])


@pytest.mark.ray
def test_an_actor_killed_in_mid_round_changes_no_bit(
    world: World, expected: FederationResult, ray_up: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fatal = expected.rounds[rigged_clients.FATAL_ROUND - 1]
    assert rigged_clients.FATAL_CLIENT in fatal.clients, (
        "the seed must draw the fatal client in the fatal round"
    )
    assert_same(on_ray(settings(actors=2), world, "rigged_clients:dying_once"), expected)
    assert (ray_up / "died").exists()
    assert "actor was lost" in caplog.text


@pytest.mark.ray
def test_actors_have_the_priority_of_the_run(ray_up: Path) -> None:
    import ray

    niceness = ray.remote(lambda: os.nice(0))
    assert ray.get(niceness.remote()) == os.nice(0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("actors", [1, 2, 3])
def test_actors_change_no_bit(world: World, expected: FederationResult, ray_up: Path, actors: int) -> None:
    assert_same(on_ray(settings(actors=actors), world), expected)


@pytest.mark.ray
@pytest.mark.slow
def test_a_client_that_always_kills_its_actor_is_done_without(world: World, ray_up: Path) -> None:
    result = on_ray(settings(actors=2, participation=1.0, dropout=0.0), world, "rigged_clients:dying_always")
    for record in result.rounds:
        assert record.clients == (0, 1, 2, 3, 4)
        ((client, reason),) = record.failed
        assert client == rigged_clients.FATAL_CLIENT
        assert reason.startswith("its process ended while it worked alone")


@pytest.mark.ray
@pytest.mark.slow
def test_more_actors_than_the_cluster_carries_are_refused(world: World, ray_up: Path) -> None:
    with pytest.raises(BadRequest, match=r"'engine.actors' = 64 .* ask for 64 CPUs; the Ray cluster has"):
        on_ray(settings(actors=64), world)


@pytest.mark.ray
@pytest.mark.slow
def test_a_client_that_raises_on_ray_is_reported_with_its_reason(world: World, ray_up: Path) -> None:
    result = on_ray(settings(actors=1, participation=1.0, dropout=0.0), world, "rigged_clients:raising")
    assert [r.failed for r in result.rounds] == [((5, "RuntimeError: the dog ate it"),)] * ROUNDS
    assert [r.clients for r in result.rounds] == [(0, 1, 2, 3, 4)] * ROUNDS


def test_a_client_that_raises_is_reported_with_its_reason(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(engine="inline", participation=1.0, dropout=0.0)
    grid = InlineGrid(Workplace.of(config, world), rigged_clients.raising)
    result = run_federation(config, world, grid=grid)
    assert [r.failed for r in result.rounds] == [((5, "RuntimeError: the dog ate it"),)] * ROUNDS
    assert [r.clients for r in result.rounds] == [(0, 1, 2, 3, 4)] * ROUNDS
    assert "round 1: client 5 failed: RuntimeError: the dog ate it" in caplog.text


def test_a_round_of_nothing_but_errors_ends_the_run(world: World) -> None:
    config = settings(engine="inline", participation=1.0, dropout=0.0, clients=CLIENTS)
    empty = dataclasses.replace(world, partitions=tuple(ids[:0] for ids in world.partitions))
    with pytest.raises(RunFailed, match="all 6 clients of round 1 failed; client 0: DataError"):
        run_federation(config, empty)


def test_an_open_grid_can_be_used_again(world: World, expected: FederationResult) -> None:
    config = settings(engine="inline")
    grid = InlineGrid(Workplace.of(config, world))
    run_federation(config, world, grid=grid)
    assert grid.client_states()
    assert_same(run_federation(config, world, grid=grid), expected)
