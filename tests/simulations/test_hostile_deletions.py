"""Hostile deletion requests in real replies: each rejected with a reason that is a record, and the round goes on."""

from __future__ import annotations

import io
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from rigged_clients import rigged

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.unlearning.requests import REQUEST
from simulations.client_app import Workplace
from simulations.engine.federation import DeletionRequests, FederationResult, run_federation
from simulations.engine.local_grid import InlineGrid
from strategies.forgetting import MAX_RECORDS
from strategies.messages import tag_of

HOSTILE, SAMPLES = 1, 20
CONFIG = Config.from_mapping(
    {
        "dataset": "digits",
        "model": "mlp",
        "width": 8,
        "clients": 3,
        "limit": 90,
        "compressor": "none",
        "engine": "inline",
        "data.nonmembers": 10,
        "data.auxiliary_size": 0,
        "federation.evaluate": False,
        "attack": "unlearn-max-loss",
    }
)
TAG = tag_of(0, "unlearn-max-loss")
NAME = "deletion.0"
BROUGHT = "deletion.0.samples"


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(CONFIG)


def federation(
    world: World, lay: Callable[[RecordDict], None], run_dir: Path | None = None
) -> tuple[FederationResult, DeletionRequests]:
    """A round in which the hostile client lays something beside its reply."""

    def meddle(message: Message, honest: Message, client: int, round: int) -> Message:
        if client == HOSTILE:
            lay(honest.content)
        return honest

    grid = InlineGrid(Workplace.of(CONFIG, world), rigged(meddle))
    told: list[DeletionRequests] = []
    try:
        result = run_federation(CONFIG, world, grid=grid, on_requests=told.append, run_dir=run_dir)
    finally:
        grid.close()
    (requests,) = told
    return result, requests


@pytest.fixture(scope="module")
def without(world: World) -> FederationResult:
    return federation(world, lambda content: None)[0]


def record(**changes: Any) -> Callable[[RecordDict], None]:
    """A good request for positions, with some fields changed; None leaves one out."""
    said = {"client": HOSTILE, "kind": "positions", "positions": [0, 1], "tag": TAG} | changes

    def lay(content: RecordDict) -> None:
        content[NAME] = ConfigRecord({key: value for key, value in said.items() if value is not None})

    return lay


def bringing(**changes: Any) -> Callable[[RecordDict], None]:
    """A good request that brings two samples, with some arrays or fields changed; None leaves one out."""
    parts: dict[str, Any] = {
        "images": Array(np.full((2, 1, 8, 8), 0.5, np.float32)),
        "labels": Array(np.zeros(2, np.int64)),
    }
    said = {"client": HOSTILE, "kind": "samples", "samples": 2, "tag": TAG}
    arrays = parts | {key: value for key, value in changes.items() if isinstance(value, Array | None)}
    said |= {key: value for key, value in changes.items() if not isinstance(value, Array | None)}

    def lay(content: RecordDict) -> None:
        content[NAME] = ConfigRecord(said)
        content[BROUGHT] = ArrayRecord({key: one for key, one in arrays.items() if one is not None})

    return lay


def instead(other: Any, name: str = NAME) -> Callable[[RecordDict], None]:
    def lay(content: RecordDict) -> None:
        content[name] = other

    return lay


def npy(shape: tuple[int, ...], body: bytes) -> Array:
    """An array whose header says `shape` and whose body is `body`."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return Array("float32", shape, "numpy.ndarray", stream.getvalue() + body)


def pickled() -> Array:
    stream = io.BytesIO()
    np.save(stream, np.array([print] * 2, dtype=object), allow_pickle=True)
    return Array("object", (2,), "numpy.ndarray", stream.getvalue())


def pixels(value: float, shape: tuple[int, ...] = (2, 1, 8, 8), kind: str = "f4") -> Array:
    return Array(np.full(shape, value, kind))


CASES = {
    "no kind": (record(kind=None), "kind ''; accepted: positions, samples, class, all"),
    "an unknown kind": (record(kind="everyone"), "kind 'everyone'; accepted"),
    "a kind that is no text": (record(kind=7), "'kind' is 7, not str"),
    "no client": (record(client=None), "client missing"),
    "a forged sender": (record(client=0), "names client 0; a client may only speak for itself"),
    "a sender that is a truth value": (record(client=True), "'client' is True, not int"),
    "a sender that is text": (record(client="1"), "'client' is '1', not int"),
    "no positions": (record(positions=None), "positions missing"),
    "an empty list": (record(positions=[]), "names no position"),
    "a position instead of a list": (record(positions=3), "'positions' is 3, not list"),
    "truth values": (record(positions=[True, False]), "position True is not an integer"),
    "fractions": (record(positions=[0.0, 1.5]), "position 0.0 is not an integer"),
    "NaN": (record(positions=[float("nan")]), "position nan is not an integer"),
    "text": (record(positions=["0"]), "position '0' is not an integer"),
    "bytes": (record(positions=[b"\x80\xff"]), "is not an integer"),
    "a negative position": (record(positions=[-1]), r"position -1 is outside \[0, \d+\)"),
    "a huge position": (record(positions=[2**62]), "position 4611686018427387904 is outside"),
    "the same position twice": (record(positions=[3, 3]), "repeats 1 of its 2"),
    "a million positions": (record(positions=[0] * 10**5), "100000 positions, but the client has"),
    "an unknown field": (record(**{"../evil": "x"}), r"unknown field '../evil'"),
    "two kinds of thing": (record(label=3), "label in a request of kind 'positions'"),
    "positions with samples": (bringing(kind="positions", positions=[0]), "samples in a request of kind"),
    "samples beside a class": (
        lambda content: (bringing()(content), record(kind="class", positions=None, label=1)(content)),
        "samples beside a request of kind 'class'",
    ),
    "samples without samples": (
        lambda content: (bringing()(content), content.pop(BROUGHT)),
        "no samples beside a request of kind 'samples'",
    ),
    "samples without a request": (
        lambda content: (bringing()(content), content.pop(NAME)),
        "a ArrayRecord, not a ConfigRecord",
    ),
    "a class that is not there": (
        record(kind="class", positions=None, label=10),
        r"class 10 is not an integer in \[0, 10\)",
    ),
    "a class in words": (record(kind="class", positions=None, label="zero"), "'label' is 'zero', not int"),
    "a reason of a megabyte": (record(reason="x" * 10**6), "'reason' is of 1000000 characters"),
    "a reason that is no UTF-8": (record(reason="\udcff"), "'reason' holds what is no text in UTF-8"),
    "a reason of bytes": (record(reason=b"\xff\xfe"), r"'reason' is b'.*', not str"),
    "a tag of a megabyte": (record(tag="x" * 10**6), "'tag' is of 1000000 characters"),
    "metrics for a request": (instead(MetricRecord({"client": 1})), "a MetricRecord, not a ConfigRecord"),
    "arrays for a request": (
        instead(ArrayRecord({"x": Array(np.zeros(2))})),
        "a ArrayRecord, not a ConfigRecord",
    ),
    "a request for samples": (
        lambda content: (bringing()(content), instead(ConfigRecord(), BROUGHT)(content)),
        "samples are not an ArrayRecord of images and labels",
    ),
    "images without labels": (bringing(labels=None), "not an ArrayRecord of images and labels"),
    "more arrays": (bringing(more=pixels(0)), "not an ArrayRecord of images and labels"),
    "pixels that are no numbers": (bringing(images=pixels(np.nan)), "an array holds NaN"),
    "pixels beyond white": (bringing(images=pixels(1.5)), r"a pixel is not a number in \[0, 1\]"),
    "another shape": (bringing(images=pixels(0, (2, 3, 8, 8))), r"shape \(2, 3, 8, 8\)"),
    "another type": (bringing(images=pixels(0, kind="f8")), "type float64"),
    "labels outside": (bringing(labels=Array(np.array([0, 10]))), r"a label is not an int64 in \[0, 10\)"),
    "negative labels": (bringing(labels=Array(np.array([-1, 0]))), "a label is not an int64"),
    "labels that need unpickling": (bringing(labels=pickled()), r"type '\|O'"),
    "a billion images declared": (bringing(images=npy((10**9, 1, 8, 8), b"\0" * 64)), r"shape \(1000000000"),
    "a billion samples declared": (bringing(samples=10**9), "1000000000 samples; accepted: 1 to"),
    "a negative number of samples": (bringing(samples=-2), "-2 samples; accepted: 1 to"),
    "more samples than it has": (
        bringing(samples=80, images=pixels(0, (80, 1, 8, 8)), labels=Array(np.zeros(80, np.int64))),
        "80 samples; accepted: 1 to",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_request_is_rejected_and_the_round_goes_on(
    case: str, world: World, without: FederationResult, caplog: pytest.LogCaptureFixture
) -> None:
    lay, reason = CASES[case]
    tracemalloc.start()
    try:
        result, requests = federation(world, lay)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30e6
    (verdict,) = requests.verdicts
    assert (verdict.round, verdict.client, verdict.gate, verdict.accepted) == (1, HOSTILE, REQUEST, False)
    assert re.search(reason, verdict.reason), verdict.reason
    assert len(verdict.reason) < 300
    assert not requests
    assert f"deletion request from client {HOSTILE} rejected: " in caplog.text
    (one,) = result.rounds
    assert (one.clients, one.failed, one.rejected) == ((0, 1, 2), (), ())
    assert all(torch.equal(result.weights[name], tensor) for name, tensor in without.weights.items())


def test_endless_requests_are_read_up_to_a_limit(world: World, without: FederationResult) -> None:
    def lay(content: RecordDict) -> None:
        for number in range(500):
            content[f"deletion.{number}"] = ConfigRecord(
                {"client": HOSTILE, "kind": "positions", "positions": [number % 20], "tag": TAG}
            )

    result, requests = federation(world, lay)
    size = len(world.partitions[HOSTILE])
    ((sender, first), *_) = requests["unlearn-max-loss"]
    assert (sender, first.positions) == (HOSTILE, (0,))
    assert len(requests["unlearn-max-loss"]) == size < MAX_RECORDS
    reasons = [verdict.reason for verdict in requests.verdicts]
    assert len(reasons) == MAX_RECORDS - size + 1
    assert reasons[0] == f"with those that wait it asks for {size + 1} samples, and the client has {size}"
    assert reasons[-1] == f"500 deletion requests in one reply; {MAX_RECORDS} are read"
    assert all(torch.equal(result.weights[name], tensor) for name, tensor in without.weights.items())


def test_a_reply_beyond_all_measure_is_rejected_whole(world: World) -> None:
    result, requests = federation(world, record(positions=["x" * 10**6] * 8))
    assert not requests.verdicts
    ((client, reason),) = result.rounds[0].rejected
    assert client == HOSTILE
    assert "no honest one has more than" in reason


def test_good_requests_beside_hostile_ones_survive_the_journal(world: World, tmp_path: Path) -> None:
    def lay(content: RecordDict) -> None:
        record(positions=[b"\x80", b"\xff"])(content)
        content["deletion.1"] = ConfigRecord(
            {"client": HOSTILE, "kind": "all", "tag": TAG, "reason": "moving"}
        )
        content["deletion.2"] = ConfigRecord(
            {"client": HOSTILE, "kind": "class", "label": 3, "tag": "unheard"}
        )

    found = [federation(world, lay, tmp_path)[1] for _ in range(2)]
    for requests in found:
        ((sender, request),) = requests["unlearn-max-loss"]
        assert (sender, request.everything, request.reason) == (HOSTILE, True, "moving")
        (verdict,) = requests.verdicts
        assert "is not an integer" in verdict.reason
        assert list(requests) == ["unlearn-max-loss"], "a tag that nobody knows is served to no attack"
