"""Deletion requests are checked, and retraining forgets exactly, on a federation that is really trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig, UnlearningConfig
from fedattack.errors import ConfigError, PayloadError, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation, Scenario, UnlearningRequest, Update
from fedattack.training import batch_positions, local_update
from fedattack.unlearning import (
    MECHANISMS,
    Deletion,
    History,
    Registered,
    Weights,
    as_positions,
    build_mechanism,
    validate_request,
)
from fedattack.unlearning.retrain import Retrain

MODEL = ModelConfig(name="mlp", classes=4, channels=1, image_size=6, activation="relu")
TRAINING = TrainingConfig(protocol="fedavg", batch_size=4, local_steps=3, learning_rate=0.1)
SCENARIO = Scenario(MODEL, TRAINING, CompressionConfig(name="none"))
ROUNDS, SAMPLES = 6, 10
ENTERS = {0: 3, 1: 1, 2: 1, 3: 4}  # client -> first round; clients 0 and 3 come late


def private(client: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(client)
    return torch.rand(SAMPLES, 1, 6, 6, generator=generator), torch.randint(
        4, (SAMPLES,), generator=generator
    )


class Federation:
    """Four clients and a plain mean; keeps every global model."""

    def __init__(self, spoiled: Mapping[int, frozenset[int]] | None = None) -> None:
        self.data = {client: private(client) for client in ENTERS}
        for client, positions in (spoiled or {}).items():  # other pixels and labels at these positions
            images, labels = self.data[client]
            images[list(positions)] = 0.5
            labels[list(positions)] = 0
        self.calls: list[tuple[Mapping[int, frozenset[int]], int]] = []
        self.history: dict[int, Weights] = {}

    def train(self, excluded: Mapping[int, frozenset[int]], weights: Weights, first_round: int) -> Weights:
        self.calls.append((excluded, first_round))
        model = build_model(MODEL)
        self.history[first_round - 1] = weights
        for round_number in range(first_round, ROUNDS + 1):
            updates = []
            for client, (images, labels) in self.data.items():
                kept = [i for i in range(SAMPLES) if i not in excluded.get(client, ())]
                if round_number < ENTERS[client] or not kept:
                    continue
                batches = batch_positions(len(kept), TRAINING, 0, round_number, client)
                updates.append(
                    local_update(model, weights, images[kept], labels[kept], batches, TRAINING).update
                )
            weights = {n: w + torch.stack([u[n] for u in updates]).mean(0) for n, w in weights.items()}
            self.history[round_number] = weights
        return weights

    def memory(self, folder: Path, every: int = 1, **changes) -> History:
        memory = History(folder, SCENARIO, {"checkpoints"}, every, first_rounds=dict(ENTERS), **changes)
        self.train({}, initial_weights(MODEL, 0), 1)
        self.calls.clear()
        for round_number, weights in self.history.items():
            memory.keep_weights(round_number, weights)
        return memory

    def updates(self, *_):
        raise AssertionError("retraining asks for no single update")

    evaluate = updates


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("every", "start"), [(1, 2), (2, 2), (3, 0), (100, 0)])
def test_resumes_from_the_last_checkpoint_that_cannot_know(tmp_path: Path, every: int, start: int) -> None:
    federation = Federation()
    memory = federation.memory(tmp_path, every)
    answer = Retrain().forget([Deletion(0, frozenset({1, 5}))], memory, federation)
    assert federation.calls == [({0: frozenset({1, 5})}, start + 1)]
    assert answer.resumed_after == start
    assert answer.excluded == {0: {1, 5}}
    # The same model, bit for bit, as if the samples had never been there.
    never = Federation()
    assert same(answer.weights, never.train({0: frozenset({1, 5})}, initial_weights(MODEL, 0), 1))
    assert not same(answer.weights, memory.weights)


def test_the_forgotten_pixels_have_no_influence_left(tmp_path: Path) -> None:
    gone = frozenset({0, 9})
    plain, spoiled = Federation(), Federation({0: gone})
    before, after = plain.memory(tmp_path / "a", 2), spoiled.memory(tmp_path / "b", 2)
    assert not same(before.weights, after.weights)  # they did have some
    deletion = [Deletion(0, gone)]
    forgotten = Retrain().forget(deletion, before, plain)
    assert same(forgotten.weights, Retrain().forget(deletion, after, spoiled).weights)


def test_several_clients_go_back_to_the_earliest(tmp_path: Path) -> None:
    federation = Federation()
    memory = federation.memory(tmp_path, 1)
    deletions = [Deletion(3, frozenset({0})), Deletion(0, frozenset({2}))]
    answer = Retrain().forget(deletions, memory, federation)
    assert answer.resumed_after == 2
    assert answer.excluded == {0: {2}, 3: {0}}


def test_earlier_deletions_stay_deleted(tmp_path: Path) -> None:
    federation = Federation()
    memory = federation.memory(tmp_path, 1, excluded={0: frozenset({4}), 2: frozenset({7})})
    answer = Retrain().forget([Deletion(0, frozenset({1}))], memory, federation)
    assert answer.excluded == {0: {1, 4}, 2: {7}}
    assert federation.calls[0][0] == {0: {1, 4}, 2: {7}}
    assert memory.excluded == {0: {4}, 2: {7}}


def test_a_client_that_never_took_part_costs_nothing(tmp_path: Path) -> None:
    federation = Federation()
    memory = federation.memory(tmp_path, 1)
    answer = Retrain().forget([Deletion(8, frozenset({1}))], memory, federation)
    assert answer.weights is memory.weights
    assert answer.resumed_after == ROUNDS
    assert answer.excluded == {8: {1}}
    assert not federation.calls


def test_a_client_that_deletes_everything_drops_out(tmp_path: Path) -> None:
    federation = Federation()
    memory = federation.memory(tmp_path, 1)
    deletion = validate_request(UnlearningRequest(0, tuple(range(SAMPLES))), 0, SAMPLES, SCENARIO)
    assert deletion.drops_out
    answer = Retrain().forget([deletion], memory, federation)
    without = Federation()
    del without.data[0]
    assert same(answer.weights, without.train({}, initial_weights(MODEL, 0), 1))


def test_says_so_when_no_checkpoint_is_old_enough(tmp_path: Path) -> None:
    federation = Federation()
    memory = federation.memory(tmp_path, 1)
    late = History(tmp_path / "late", SCENARIO, {"checkpoints"}, first_rounds=ENTERS)
    late.keep_weights(4, memory.checkpoint(4))
    with pytest.raises(RunFailed, match=r"no checkpoint is older than round 3 \(kept: \[4\]\)"):
        Retrain().forget([Deletion(0, frozenset({1}))], late, federation)


def brought(count: int = 2, **changes) -> UnlearningRequest:
    images, labels = private(0)
    parts = {"images": images[:count].clone(), "labels": labels[:count].clone()} | changes
    return UnlearningRequest(0, **parts)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (UnlearningRequest(1, (0,)), "names client 1"),
        (UnlearningRequest("0", (0,)), "names client '0'"),
        (UnlearningRequest(False, (0,)), "names client False"),
        (UnlearningRequest(0, ()), "names no position and brings no sample"),
        (UnlearningRequest(0, (0, -1)), r"position -1 is outside \[0, 10\)"),
        (UnlearningRequest(0, (10,)), r"position 10 is outside \[0, 10\)"),
        (UnlearningRequest(0, (2, 3, 2)), "repeats 1 of its 3"),
        (UnlearningRequest(0, tuple(range(10)) * 1000), "10000 positions, but the client has 10"),
        (UnlearningRequest(0, (1.0,)), "position 1.0 is not an integer"),
        (UnlearningRequest(0, (True,)), "position True is not an integer"),
        (UnlearningRequest(0, ("3",)), "position '3' is not an integer"),
        (UnlearningRequest(0, (2**70,)), "outside"),
        (UnlearningRequest(0, (5, 6)), "position 6 is forgotten already"),
        (brought(positions=(1,)), "brings both positions and samples"),
        (brought(images=None), "labels without images"),
        (brought(labels=None), "images without labels"),
        (brought(images=[[0.0]]), "images without labels, or labels without images"),
        (brought(images=torch.full((2, 1, 6, 6), float("nan"))), r"a pixel is not a number in \[0, 1\]"),
        (brought(images=torch.full((2, 1, 6, 6), 1.01)), r"a pixel is not a number in \[0, 1\]"),
        (brought(images=torch.zeros(2, 6, 6)), r"images of shape \(2, 6, 6\)"),
        (brought(images=torch.zeros(3, 1, 6, 6)), r"images of shape \(3, 1, 6, 6\)"),
        (brought(images=torch.zeros(2, 1, 6, 6).double()), r"type torch.float64; accepted: \(2, 1, 6, 6\)"),
        (brought(labels=torch.tensor([0, 4])), r"a label is not an int64 in \[0, 4\)"),
        (brought(labels=torch.tensor([0, -1])), r"a label is not an int64 in \[0, 4\)"),
        (brought(labels=torch.zeros(2)), "a label is not an int64"),
        (brought(labels=torch.zeros(2, 1).long()), r"labels of shape \(2, 1\); accepted: 1 to 10"),
        (brought(0), r"labels of shape \(0,\)"),
        (
            brought(images=torch.zeros(11, 1, 6, 6), labels=torch.zeros(11).long()),
            r"labels of shape \(11,\); accepted: 1 to 10 samples",
        ),
    ],
)
def test_hostile_requests_are_rejected_with_a_reason(request_: UnlearningRequest, reason: str) -> None:
    with pytest.raises(PayloadError, match=f"from client 0: .*{reason}"):
        validate_request(request_, 0, SAMPLES, SCENARIO, forgotten={6})


def test_good_requests_are_accepted() -> None:
    assert validate_request(UnlearningRequest(3, (4, 0)), 3, SAMPLES, SCENARIO) == Deletion(
        3, frozenset({0, 4})
    )
    numpy_integers = validate_request(UnlearningRequest(3, (np.int64(4),)), 3, SAMPLES, SCENARIO)  # type: ignore[arg-type]
    assert {type(p) for p in numpy_integers.positions} == {int}
    rest = validate_request(UnlearningRequest(3, tuple(range(1, 10))), 3, SAMPLES, SCENARIO, forgotten={0})
    assert rest.drops_out


def test_samples_are_found_among_those_that_were_registered() -> None:
    images, labels = private(0)
    images[7], labels[7] = images[2], labels[2]  # the same sample twice
    registered = Registered.of(images, labels, b"client 0")

    def asked(places: list[int], **changes) -> Deletion:
        parts = {"images": images[places], "labels": labels[places]} | changes
        deletion = validate_request(UnlearningRequest(0, **parts), 0, SAMPLES, SCENARIO)
        assert not deletion.positions
        return as_positions(deletion, registered)

    assert asked([5, 1]).positions == {1, 5}
    assert asked([2]).positions == {2}
    assert asked([2, 7]).positions == {2, 7}
    assert asked(list(range(10))).drops_out
    assert not asked(list(range(9))).drops_out
    wrong = (labels[[5, 1]] + 1) % 4
    for changes in ({"labels": wrong}, {"images": images[[5, 1]] * 0.999}):
        with pytest.raises(PayloadError, match="2 of 2 samples are not among those that it registered"):
            asked([5, 1], **changes)
    with pytest.raises(PayloadError, match="1 of 3 samples"):
        asked([2, 2, 2])
    by_samples = Deletion(0, images=images[[2, 4]], labels=labels[[2, 4]])
    assert as_positions(by_samples, registered, forgotten={2}).positions == {4, 7}
    plain = Deletion(0, frozenset({3}))
    assert as_positions(plain, registered) is plain


def test_history_keeps_what_was_asked_for_and_gives_it_back(tmp_path: Path) -> None:
    shapes = {name: tuple(p.shape) for name, p in build_model(MODEL).named_parameters()}
    numel = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
    sparse = Update(
        tuple(shapes), tuple(shapes.values()), torch.tensor([1, numel - 1]), torch.tensor([2.0, -3.0])
    )
    history = History(tmp_path, SCENARIO, {"updates"}, every=2)
    weights = initial_weights(MODEL, 0)
    for round_number in range(1, 6):
        history.keep_weights(round_number - 1, weights)
        for client in (11, 2):
            if history.wants_updates(round_number):
                history.keep_update(Observation(round_number, client, SCENARIO, weights, sparse, 7))
        history.note_round(round_number, (2, 11), aggregated=round_number != 3)
    assert history.checkpoints == [0]  # only the initial model is kept unasked
    assert history.update_rounds == [1, 5]  # round 3 did not become the model
    assert history.first_rounds == {2: 1, 11: 1}
    first, second = history.updates(5)
    assert (first.client, second.client, first.examples) == (2, 11, 7)
    flat = torch.cat([tensor.flatten() for tensor in first.change.values()])
    # "gradient": the global model moves by minus the server's learning rate times it.
    assert flat.nonzero().flatten().tolist() == [1, numel - 1]
    assert flat[[1, numel - 1]].tolist() == pytest.approx([-0.1 * 2.0, 0.1 * 3.0])
    assert {name: tuple(tensor.shape) for name, tensor in first.change.items()} == shapes
    assert sum(path.stat().st_size for path in tmp_path.glob("update-*")) < 4 * 1000  # as sparse as they came


def test_mechanisms_are_found_by_name() -> None:
    assert MECHANISMS.get("retrain") is Retrain
    with pytest.raises(ConfigError, match=r"unknown mechanism 'retrian'; did you mean 'retrain'\?"):
        MECHANISMS.get("retrian")
    settings = UnlearningConfig(mechanism="federaser", options={"federaser": {"calibration": "0.25"}})
    assert build_mechanism(settings).calibration == 0.25  # type: ignore[attr-defined]
    for wrong, message in [
        (
            {"shared_options": {"calibration": 2}},
            "'unlearning.federaser.calibration' = 2: .*less than or equal to 1",
        ),
        ({"shared_options": {"calibrations": 1}}, "did you mean 'unlearning.calibration'"),
        ({"options": {"retrain": {"x": 1}}}, "unknown setting 'unlearning.retrain'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_mechanism(UnlearningConfig(mechanism="federaser", **wrong))
