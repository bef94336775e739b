"""Deletion requests are checked, and retraining forgets exactly, on a federation that is really trained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from fedattack.config import ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, PayloadError, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.observation import UnlearningRequest
from fedattack.training import batch_positions, local_update
from fedattack.unlearning import MECHANISMS, Deletion, ServerMemory, Weights, validate_request
from fedattack.unlearning.retrain import Retrain

MODEL = ModelConfig(name="mlp", classes=4, channels=1, image_size=6, activation="relu")
TRAINING = TrainingConfig(protocol="fedavg", batch_size=4, local_steps=3, learning_rate=0.1)
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

    def memory(self, every: int = 1, **changes) -> ServerMemory:
        final = self.train({}, initial_weights(MODEL, 0), 1)
        self.calls.clear()
        kept = {r: w for r, w in self.history.items() if r % every == 0}
        return ServerMemory(final, ROUNDS, kept, dict(ENTERS), **changes)


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("every", "start"), [(1, 2), (2, 2), (3, 0), (100, 0)])
def test_resumes_from_the_last_checkpoint_that_cannot_know(every: int, start: int) -> None:
    federation = Federation()
    memory = federation.memory(every)
    answer = Retrain().forget([Deletion(0, frozenset({1, 5}))], memory, federation.train)
    assert federation.calls == [({0: frozenset({1, 5})}, start + 1)]
    assert answer.resumed_after == start
    assert answer.rounds_trained == ROUNDS - start
    assert answer.excluded == {0: {1, 5}}
    # The same model, bit for bit, as if the samples had never been there.
    never = Federation()
    assert same(answer.weights, never.train({0: frozenset({1, 5})}, initial_weights(MODEL, 0), 1))
    assert not same(answer.weights, memory.weights)


def test_the_forgotten_pixels_have_no_influence_left() -> None:
    gone = frozenset({0, 9})
    plain, spoiled = Federation(), Federation({0: gone})
    before, after = plain.memory(2), spoiled.memory(2)
    assert not same(before.weights, after.weights)  # they did have some
    deletion = [Deletion(0, gone)]
    forgotten = Retrain().forget(deletion, before, plain.train)
    assert same(forgotten.weights, Retrain().forget(deletion, after, spoiled.train).weights)


def test_several_clients_go_back_to_the_earliest() -> None:
    federation = Federation()
    memory = federation.memory(1)
    deletions = [Deletion(3, frozenset({0})), Deletion(0, frozenset({2}))]
    answer = Retrain().forget(deletions, memory, federation.train)
    assert answer.resumed_after == 2
    assert answer.excluded == {0: {2}, 3: {0}}


def test_earlier_deletions_stay_deleted() -> None:
    federation = Federation()
    memory = federation.memory(1, excluded={0: frozenset({4}), 2: frozenset({7})})
    answer = Retrain().forget([Deletion(0, frozenset({1}))], memory, federation.train)
    assert answer.excluded == {0: {1, 4}, 2: {7}}
    assert federation.calls[0][0] == {0: {1, 4}, 2: {7}}
    assert memory.excluded == {0: {4}, 2: {7}}


def test_a_client_that_never_took_part_costs_nothing() -> None:
    federation = Federation()
    memory = federation.memory(1)
    answer = Retrain().forget([Deletion(8, frozenset({1}))], memory, federation.train)
    assert answer.weights is memory.weights
    assert (answer.rounds_trained, answer.resumed_after) == (0, ROUNDS)
    assert answer.excluded == {8: {1}}
    assert not federation.calls


def test_a_client_that_deletes_everything_drops_out() -> None:
    federation = Federation()
    memory = federation.memory(1)
    deletion = validate_request(UnlearningRequest(0, tuple(range(SAMPLES))), 0, SAMPLES)
    assert deletion.drops_out
    answer = Retrain().forget([deletion], memory, federation.train)
    without = Federation()
    del without.data[0]
    assert same(answer.weights, without.train({}, initial_weights(MODEL, 0), 1))


def test_checkpoints_are_not_handed_out_for_writing() -> None:
    federation = Federation()
    memory = federation.memory(1)
    kept = {name: tensor.clone() for name, tensor in memory.checkpoints[2].items()}

    def careless(excluded: Mapping[int, frozenset[int]], weights: Weights, first_round: int) -> Weights:
        for tensor in weights.values():
            tensor.zero_()
        return weights

    Retrain().forget([Deletion(0, frozenset({1}))], memory, careless)
    assert same(memory.checkpoints[2], kept)


def test_says_so_when_no_checkpoint_is_old_enough() -> None:
    federation = Federation()
    memory = federation.memory(1)
    late = ServerMemory(memory.weights, ROUNDS, {4: memory.checkpoints[4]}, ENTERS)
    with pytest.raises(RunFailed, match=r"no checkpoint is older than round 3 \(kept: \[4\]\)"):
        Retrain().forget([Deletion(0, frozenset({1}))], late, federation.train)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (UnlearningRequest(1, (0,)), "names client 1"),
        (UnlearningRequest("0", (0,)), "names client '0'"),
        (UnlearningRequest(False, (0,)), "names client False"),
        (UnlearningRequest(0, ()), "names no position"),
        (UnlearningRequest(0, (0, -1)), r"position -1 is outside \[0, 10\)"),
        (UnlearningRequest(0, (10,)), r"position 10 is outside \[0, 10\)"),
        (UnlearningRequest(0, (2, 3, 2)), "repeats 1 of its 3"),
        (UnlearningRequest(0, tuple(range(10)) * 1000), "10000 positions, but the client has 10"),
        (UnlearningRequest(0, (1.0,)), "position 1.0 is not an integer"),
        (UnlearningRequest(0, (True,)), "position True is not an integer"),
        (UnlearningRequest(0, ("3",)), "position '3' is not an integer"),
        (UnlearningRequest(0, (2**70,)), "outside"),
        (UnlearningRequest(0, (5, 6)), "position 6 is forgotten already"),
    ],
)
def test_hostile_requests_are_rejected_with_a_reason(request_: UnlearningRequest, reason: str) -> None:
    with pytest.raises(PayloadError, match=f"from client 0: .*{reason}"):
        validate_request(request_, 0, SAMPLES, forgotten={6})


def test_good_requests_are_accepted() -> None:
    assert validate_request(UnlearningRequest(3, (4, 0)), 3, SAMPLES) == Deletion(3, frozenset({0, 4}))
    numpy_integers = validate_request(UnlearningRequest(3, (np.int64(4),)), 3, SAMPLES)  # type: ignore[arg-type]
    assert {type(p) for p in numpy_integers.positions} == {int}
    rest = validate_request(UnlearningRequest(3, tuple(range(1, 10))), 3, SAMPLES, forgotten={0})
    assert rest.drops_out


def test_mechanisms_are_found_by_name() -> None:
    assert MECHANISMS.get("retrain") is Retrain
    with pytest.raises(ConfigError, match=r"unknown mechanism 'retrian'; did you mean 'retrain'\?"):
        MECHANISMS.get("retrian")
