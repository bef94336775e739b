"""One client of many hangs, ends its process, raises what ends one, or answers nonsense: all others count."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rigged_clients
import torch

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import ConfigError, shown, told
from simulations.client_app import Workplace
from simulations.engine.federation import FederationResult, run_federation
from simulations.engine.local_grid import InlineGrid
from simulations.engine.ray_grid import RayGrid
from simulations.engine.ray_session import ray_session

POISON = rigged_clients.FATAL_CLIENT
SETTINGS = {
    "dataset": "digits",
    "model": "tiny-cnn",
    "clients": 8,
    "compressor": "topk",
    "compression": 0.05,
    "error-feedback": True,
    "batch-size": 1,
    "rounds": 2,
    "limit": 400,
    "data.auxiliary_size": 0,
    "federation.evaluate": False,
}

FAULTS = {
    "exiting": "SystemExit: 0",
    "interrupting": "KeyboardInterrupt",
    "out_of_memory": "MemoryError: much",
    "recursing": "RecursionError: maximum recursion depth",
    "unspeakable": "_Unspeakable that cannot be told",
    "forging": "ValueError: x 2026-01-01 round 9: done [2J yyy",
    "nothing": "TypeError: the client answered a NoneType, not a Message",
    "echo": "TypeError: the client answered another message than it was sent",
    "another": "TypeError: the client answered another message than it was sent",
    "objects": "TypeError: the client answered an array 'update' of objects",
    "no_array": "TypeError: the client answered an array that is a str",
    "long_error": "z z z",
}


def config(**more: object) -> Config:
    return Config.from_mapping(SETTINGS | {key.replace("_", "-"): value for key, value in more.items()})


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(config())


@pytest.fixture(scope="module")
def hundred() -> World:
    return build_world(config(clients=100))


@pytest.fixture(scope="module")
def others(world: World) -> FederationResult:
    """The same federation, in which the poisonous client does nothing but fail."""
    return inline(world, "raising")


@pytest.fixture(scope="module")
def ninety_nine(hundred: World) -> FederationResult:
    return inline(hundred, "raising", clients=100)


def inline(world: World, name: str, deadline: float | None = None, **more: object) -> FederationResult:
    settings = config(engine="inline", **more)
    grid = InlineGrid(Workplace.of(settings, world), rigged_clients.APPS[name], deadline)
    try:
        return run_federation(settings, world, grid=grid)
    finally:
        grid.close()


def assert_others_count(
    found: FederationResult, others: FederationResult, why: str, clients: int = 8
) -> None:
    for record in found.rounds:
        assert record.clients == tuple(c for c in range(clients) if c != POISON)
        ((client, reason),) = (*record.failed, *record.rejected)
        assert client == POISON
        assert reason.startswith(why)
        assert len(reason) <= 500
        assert reason.isprintable()
    for name, tensor in others.weights.items():
        assert torch.equal(found.weights[name], tensor), name


@pytest.mark.parametrize("name", FAULTS)
def test_inline(name: str, world: World, others: FederationResult, caplog: pytest.LogCaptureFixture) -> None:
    assert_others_count(inline(world, name), others, FAULTS[name])
    lines = [record.getMessage() for record in caplog.records if "client 5 failed" in record.getMessage()]
    assert len(lines) == 2
    assert all(line.isprintable() and len(line) < 600 for line in lines)


DEADLY = {
    "hanging": "no answer within 4 s",
    "leaving": "its process ended (exit code 3)",
    "dying_always": "its process ended (SIGKILL)",
    "exiting": FAULTS["exiting"],
}


@pytest.mark.parametrize("name", [name for name in DEADLY if name != "hanging"])
def test_inline_under_a_deadline(name: str, world: World, others: FederationResult) -> None:
    before = torch.get_num_threads()
    assert_others_count(inline(world, name, deadline=60.0), others, DEADLY[name])
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", DEADLY)
def test_a_hundred_inline(name: str, hundred: World, ninety_nine: FederationResult) -> None:
    started = time.monotonic()
    found = inline(hundred, name, deadline=4.0, clients=100)
    assert time.monotonic() - started < 2 * (4 + 30)  # rounds
    assert_others_count(found, ninety_nine, DEADLY[name], 100)


def test_a_deadline_that_nobody_misses_changes_no_bit(world: World) -> None:
    small = {"compressor": "dgc"}
    one, other = (inline(world, "raising", late, **small) for late in (None, 60.0))
    assert all(torch.equal(one.weights[name], tensor) for name, tensor in other.weights.items())
    assert one.rounds[-1].clients == other.rounds[-1].clients


def test_where_a_process_cannot_be_copied_a_deadline_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ConfigError, match=r"setting 'engine\.deadline': engine 'inline' copies its process"):
        inline(world, "raising", deadline=1.0)


def test_a_deadline_that_a_grid_does_not_have_is_refused(world: World) -> None:
    settings = Config.from_mapping(SETTINGS | {"engine": "inline", "engine.deadline": 5})
    with pytest.raises(ConfigError, match=r"setting 'engine\.deadline' = 5: this grid has none"):
        run_federation(settings, world, grid=InlineGrid(Workplace.of(settings, world)))


def test_the_users_ctrl_c_ends_the_run(world: World) -> None:
    """Also where a client is at work, and catches whatever is raised."""
    # A batch system may start the tests with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            inline(world, "hanging")  # no deadline
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_examples_are_bounded_by_what_was_agreed(world: World, others: FederationResult) -> None:
    found = inline(world, "boasting")
    assert_others_count(found, others, "declares 'num-examples' 2147483647, expected 1 to 1")
    loose = inline(build_world(config(clients=4, batch_size=0)), "raising", clients=4, batch_size=0, rounds=1)
    assert loose.rounds[0].rejected == ()
    tight = {"federation.max_examples": 3}
    settings = Config.from_mapping(SETTINGS | tight | {"clients": 4, "batch-size": 0, "engine": "inline"})
    sizes = [len(ids) for ids in build_world(settings).partitions]
    rejected = run_federation(settings, build_world(settings)).rejections
    assert [one[1] for one in rejected if one[0] == 1] == [c for c, size in enumerate(sizes) if size > 3]
    assert all(reason.endswith("expected 1 to 3") for _, _, reason in rejected)


def test_a_bound_on_norms_rejects_with_the_norm(world: World) -> None:
    norms: dict[int, float] = {}
    settings = Config.from_mapping(SETTINGS | {"clients": 6, "rounds": 1, "engine": "inline"})
    small = build_world(settings)
    rate = settings.training.learning_rate
    run_federation(
        settings,
        small,
        on_observation=lambda o: norms.update({o.client: rate * float(o.update.values.norm())}),
    )
    bound = sorted(norms.values())[3] * 1.001
    bounded = Config.from_mapping(
        SETTINGS | {"clients": 6, "rounds": 1, "engine": "inline", "federation.max_norm": bound}
    )
    result = run_federation(bounded, small)
    assert set(result.rounds[0].clients) == {client for client, norm in norms.items() if norm <= bound}
    for _, client, reason in result.rejections:
        assert reason == f"would change the weights by {norms[client]:.3g} (L2 norm); at most {bound:g}"
    assert len(result.rejections) == 2


def test_a_bound_on_norms_under_secure_aggregation_is_refused(world: World) -> None:
    settings = Config.from_mapping(
        SETTINGS | {"engine": "inline", "federation.max_norm": 1, "defense": "secure-aggregation"}
    )
    with pytest.raises(ConfigError, match=r"setting 'federation\.max_norm' = 1: under secure aggregation"):
        run_federation(settings, build_world(settings))


def test_what_others_say_is_one_short_line() -> None:
    assert told("a\r\nb\x00\x1b[31mc\u2028d\u202ee\ud800") == "a b [31mc d e"
    assert len(told("é" * 10**7)) == 500
    assert told("Traceback (most recent call last):\n  File x\nValueError: why\n") == "ValueError: why"
    assert told(ValueError("")) == "ValueError:"
    assert shown(10**5000) == "a number of 16610 bits"
    assert shown([10**5000]) == "a list"
    assert len(shown("x" * 10**6)) <= 100


@pytest.fixture(scope="module")
def ray_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    flags = tmp_path_factory.mktemp("flags")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(rigged_clients.FLAGS, str(flags))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # for the actors
        with ray_session(config(actors=2).engine):
            yield flags


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray(hundred: World, ray_up: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {"clients": 100, "actors": 2, "engine.deadline": 12, "rounds": 1}
    settings = Config.from_mapping(SETTINGS | more)
    grid = RayGrid(Workplace.of(settings, hundred), "rigged_clients:four_faults")
    started = time.monotonic()
    try:
        found = run_federation(settings, hundred, grid=grid).rounds[0]
    finally:
        grid.close()
    assert time.monotonic() - started < 2 * (12 + 30)  # one is late, one ends its process
    assert found.clients == tuple(c for c in range(100) if c not in (5, 6, 7, 8))
    wanted = {
        5: "no answer within 12 s",
        6: "its process ended while it worked alone (ActorDiedError: ",
        7: FAULTS["exiting"],
        8: FAULTS["nothing"],
    }
    assert dict(found.failed).keys() == wanted.keys()
    for client, reason in found.failed:
        assert reason.startswith(wanted[client])
        assert f"round 1: client {client} failed: {reason}" in caplog.text
