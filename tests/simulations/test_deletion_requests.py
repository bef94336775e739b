"""Deletion requests as messages of a run, their gates, and requests that are odd without being hostile."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from test_unlearning_experiment import BASE, equal, ran

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import NotApplicable, PayloadError
from fedattack.observation import Candidates
from simulations.client_app import drops_out, round_batches
from simulations.engine.federation import DeletionRequests, Judge, run_federation
from simulations.engine.local_grid import LocalGrid
from simulations.experiments.unlearning import UnlearningExperiment
from simulations.pipeline import simulate

SMALL = BASE | {"clients": 3, "rounds": 4, "local-steps": 2, "attack.malicious_clients": "1"}


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(Config.from_mapping(SMALL))


def asked(world: World, **settings: object) -> tuple[DeletionRequests, dict[str, torch.Tensor]]:
    told: list[DeletionRequests] = []
    result = run_federation(Config.from_mapping(SMALL | settings), world, on_requests=told.append)
    (requests,) = told
    return requests, result.weights


# ---------------------------------------------------------------------- as messages


def test_a_client_asks_by_itself_in_any_round_and_is_served_in_order(world: World) -> None:
    name = "asking_clients:Early"
    requests, weights = asked(world, attack=name, **{"unlearning.round": 3})
    assert [(sender, request.reason) for sender, request in requests[name]] == [
        (1, reason) for reason in ("round 1", "a sample", "round 3", "a sample", "invited")
    ]
    first, sample, third, other, invited = (request for _, request in requests[name])
    assert (first.positions, third.positions, invited.positions) == ((4, 5), (12, 13), (0,))
    images, _ = world.dataset.tensors(world.partitions[1][[6, 14]])
    assert torch.equal(torch.cat([sample.images, other.images]), images)
    assert not requests.verdicts
    # What lies beside a reply changes nothing of it.
    assert equal(weights, asked(world, attack="unlearn-max-loss")[1])


def test_requests_lie_beside_a_sum_and_where_nobody_takes_them(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    name, summed = "asking_clients:Early", {"defense": "secure-aggregation", "unlearning.round": 3}
    requests, weights = asked(world, attack=name, **summed)
    assert [sender for sender, _ in requests[name]] == [1] * 5
    assert equal(weights, asked(world, attack="unlearn-max-loss", **summed)[1])
    caplog.clear()
    result = run_federation(Config.from_mapping(SMALL | {"attack": name}), world)
    assert [record.clients for record in result.rounds] == [(0, 1, 2)] * 4
    assert not result.rejections
    assert "round 3: deletion requests of client 1 come when none are taken" in caplog.text


def test_what_comes_after_the_requests_were_served_is_too_late(world: World) -> None:
    name = "asking_clients:Late"
    requests, _ = asked(world, attack=name, **{"unlearning.round": 3})
    assert len(requests[name]) == 1, "the invitation alone"
    ((one),) = requests.rejected(name)
    assert (one.round, one.client) == (4, 1)
    assert one.reason == "requests were served after round 3; it comes too late"


def test_no_message_names_an_attack_or_what_others_deleted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all messages of a run with unlearning, questions that are asked early, and answers."""
    names = ["asking_clients:Early", "unlearn-max-loss", "rigged_attacks:Told"]
    gone = {0: frozenset({11, 23}), 2: frozenset({35})}
    seen: list[tuple[str, int, list[object]]] = []
    send = LocalGrid.send_and_receive

    def spy(grid: LocalGrid, messages: Iterable[Message], **more: object) -> Iterable[Message]:
        messages = list(messages)
        replies = list(send(grid, messages, **more))
        for message in [*messages, *replies]:
            said: list[object] = list(message.content)
            for record in message.content.values():
                said += list(record) if isinstance(record, ArrayRecord) else list(record.items())
            node = message.metadata.dst_node_id
            seen.append((message.metadata.message_type, grid.client_of(node), said))
        return replies

    monkeypatch.setattr(LocalGrid, "send_and_receive", spy)
    question = Candidates(*world.dataset.tensors(world.pools.nonmembers[:3]))
    config = Config.from_mapping(SMALL | {"attack": ",".join(names), "unlearning.round": 3})
    told: list[DeletionRequests] = []
    result = run_federation(
        config, world, on_requests=told.append, questions={names[2]: question}, excluded=gone
    )
    assert result.answers[names[2]][1]
    assert set(told[0]) == set(names[:2])
    assert {kind for kind, _, _ in seen} == {"train", "query.unlearn", "query.answer"}
    for kind, client, said in seen:
        text = repr(said)
        for name in (*names, "Early", "Told", "max-loss", "rigged"):
            assert name not in text, (kind, client)
        exclusions = [value for key, value in filter(lambda one: one[0] == "excluded", pairs(said))]
        assert exclusions == ([sorted(gone[client])] if client in gone else [])


def pairs(said: list[object]) -> list[tuple[object, object]]:
    return [one for one in said if isinstance(one, tuple)]


def test_a_request_of_a_round_in_which_its_client_drops_out_is_lost(world: World) -> None:
    name = "asking_clients:OnlyEarly"
    seeds = [
        (seed, drops_out(Config.from_mapping(SMALL | {"dropout": 0.5, "seed": seed}), 1, 1))
        for seed in range(20)
    ]
    lost, made = (next(seed for seed, away in seeds if away is gone) for gone in (True, False))
    assert name not in asked(world, attack=name, dropout=0.5, seed=lost)[0]
    ((_, request),) = asked(world, attack=name, dropout=0.5, seed=made)[0][name]
    assert request.positions == (0, 1)


# ---------------------------------------------------------------------- odd ones


def deleting(folder: Path, **settings: object):
    return ran(folder, attack="asking_clients:AsksFor", rounds=2, clients=3, **settings)


def test_a_whole_minibatch_is_deleted(tmp_path: Path) -> None:
    config = Config.from_mapping(BASE | {"rounds": 2, "clients": 3})
    size = len(build_world(config).partitions[0])
    batch = sorted(int(position) for position in round_batches(config, size, 1, 0)[3])
    run = deleting(tmp_path, **{"attack.which": " ".join(map(str, batch))})
    outcome = run.outcome()
    assert sorted(outcome.requests[0].positions) == batch
    left = round_batches(config, size, 1, 0, batch)
    assert [len(one) for one in left].count(0) == 1, "the step is there, and moves nothing"
    gone = run_federation(run.plan.config, run.plan.world, excluded={0: batch}).weights
    assert outcome.losses["after"][0] == Judge(run.plan.config, run.plan.world)(gone)["loss"]


def test_a_class_is_deleted(tmp_path: Path) -> None:
    run = deleting(tmp_path, **{"attack.kind": "class", "attack.which": "7"})
    outcome, world = run.outcome(), run.plan.world
    _, labels = world.dataset.tensors(world.partitions[0])
    mine = np.flatnonzero(labels.numpy() == 7).tolist()
    assert outcome.samples == len(mine) > 5
    gone = run_federation(run.plan.config, world, excluded={0: mine}).weights
    assert outcome.losses["after"][0] == Judge(run.plan.config, world)(gone)["loss"]
    assert not set(outcome.details["random_positions"][0]) & set(mine)


def test_all_that_a_client_has_is_deleted(tmp_path: Path) -> None:
    outcome = deleting(tmp_path, **{"attack.kind": "all"}).outcome()
    assert outcome.drops_out
    assert outcome.floorless
    assert outcome.samples == len(build_world(Config.from_mapping(BASE | {"clients": 3})).partitions[0])


def test_the_same_twice_is_granted_once(tmp_path: Path) -> None:
    run = deleting(tmp_path, **{"attack.kind": "twice"})
    outcome = run.outcome()
    assert outcome.samples == 4
    said = [(one["accepted"], one["reason"]) for one in outcome.details["verdicts"] if one["arm"] == "after"]
    assert said == [(True, ""), (False, "deletion request from client 0: position 0 is forgotten already")]


def test_samples_that_nobody_trained_on(tmp_path: Path) -> None:
    """The server cannot find them; a good request beside them is served."""
    with pytest.raises(PayloadError, match="4 of 4 samples are not among those that it registered"):
        deleting(tmp_path / "a", **{"attack.kind": "noise"}).outcome()
    mixed = deleting(tmp_path / "b", **{"attack.kind": "mixed"}).outcome()
    plain = deleting(tmp_path / "c").outcome()
    assert mixed.losses["after"] == plain.losses["after"]


# ---------------------------------------------------------------------- gates


@pytest.mark.parametrize(
    ("kind", "gates", "refused"),
    [
        ("noise", "ownership", ["ownership"]),
        ("noise", "digest,label", ["digest"]),
        ("wrong label", "ownership,label", ["label"]),
        ("wrong label", "digest", ["digest"]),
        ("positions", "digest,ownership,label,rate", []),
    ],
)
def test_gates_stop_what_is_not_the_clients(
    tmp_path: Path, kind: str, gates: str, refused: list[str]
) -> None:
    run = deleting(tmp_path, gates=gates, **{"attack.kind": kind})
    outcome = run.outcome()
    assert outcome.details["refused"] == {"after": [refused], "random": [[]]}
    assert outcome.details["gates"]["request"] == {"after": [0, 1]}
    for gate in gates.split(","):
        assert outcome.details["gates"][gate] == {"after": [int(gate in refused), 1], "random": [0, 1]}
    assert (outcome.losses["after"] == outcome.losses["before"]) is bool(refused)
    assert (outcome.losses["retrained_after"] == outcome.losses["before"]) is bool(refused)
    assert outcome.losses["random"] != outcome.losses["before"], "honest requests pass"


def test_a_gate_that_refuses_everything_shows_in_the_random_arm(tmp_path: Path) -> None:
    run = deleting(tmp_path, gates="rate", **{"gates.rate.limit": 3, "unlearning.seeds": 2})
    outcome = run.outcome(seeds=2)
    assert outcome.details["gates"]["rate"] == {"after": [2, 2], "random": [2, 2]}
    assert len({outcome.losses[arm] for arm in outcome.losses}) == 1, "nothing is forgotten in any arm"
    assert outcome.costs["mechanism"]["rounds"] == 0
    (result,) = run.experiment.audit(run.result).values()
    assert result.verdict.endswith(
        "; the request is refused by gate rate; as many random samples are refused by gate rate"
    )
    with (run.plan.folder.path / "requests.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["seed"], row["arm"], row["gate"], row["accepted"]) for row in rows] == [
        (seed, arm, gate, str(gate == "request"))
        for seed in "01"
        for arm, gate in (("after", "request"), ("after", "rate"), ("random", "rate"))
    ]
    assert rows[1]["reason"] == "4 samples of this client; gates.rate.limit lets 3 go"


def test_gates_that_look_at_the_model_keep_the_old_one(tmp_path: Path) -> None:
    """A mechanism that ruins the model: by its accuracy, and by the way it goes."""
    ruin = {
        "mechanism": "rigged_requests:Ascent",
        "unlearning.rate": "50",
        "attack": "rigged_requests:SendsSamples",
    }
    more = {"rounds": 2, "clients": 3, "requests": 6, "data.auxiliary_size": 100}
    plain = ran(tmp_path / "plain", **ruin, **more).outcome()
    assert plain.accuracy["after"][0] < plain.accuracy["before"][0] - 0.1
    for gate, options in (("guard", {"gates.guard.drop": 0.05}), ("cap", {"gates.cap.limit": 1.0})):
        outcome = ran(tmp_path / gate, gates=gate, **ruin, **more, **options).outcome()
        assert outcome.details["refused"]["after"] == [[gate]]
        assert outcome.losses["after"] == outcome.losses["before"] == plain.losses["before"]
        (verdict,) = [
            one for one in outcome.details["verdicts"] if one["arm"] == "after" and not one["accepted"]
        ]
        assert f"gates.{gate}." in verdict["reason"]


@pytest.mark.slow
def test_the_cap_compares_with_random_deletions(tmp_path: Path) -> None:
    """Retraining without four samples moves the model about as far, whichever they are; a hundredth is too strict."""
    loose = deleting(tmp_path / "a", gates="cap").outcome()
    strict = deleting(tmp_path / "b", gates="cap", **{"gates.cap.factor": 0.01}).outcome()
    assert loose.details["gates"]["cap"] == {"after": [0, 1], "random": [0, 1]}
    assert strict.details["gates"]["cap"] == {"after": [1, 1], "random": [1, 1]}
    assert loose.costs["mechanism"]["rounds"] == 2 * 2, "the server forgets twice"


@pytest.mark.slow
def test_the_loss_gate_stops_the_largest_losses_and_lets_random_ones_go(tmp_path: Path) -> None:
    outcome = ran(tmp_path, gates="loss", rounds=3, **{"gates.loss.factor": 2}).outcome(seeds=2)
    assert outcome.details["gates"]["loss"] == {"after": [2, 2], "random": [0, 2]}


def test_gates_that_can_decide_nothing_are_refused_before_the_first_round() -> None:
    def check(**settings: object) -> None:
        config = Config.from_mapping(BASE | settings)
        UnlearningExperiment.check(config, build_world(config))

    check(gates="guard", **{"data.auxiliary_size": 50})
    with pytest.raises(NotApplicable, match="gate 'guard' watches the accuracy on labelled auxiliary images"):
        check(gates="guard")
    samples = {"mechanism": "rigged_requests:Ascent"}
    with pytest.raises(NotApplicable, match=r"gate 'cap' .*; set gates.cap.limit"):
        check(gates="cap", **samples)
    check(gates="cap", **samples, **{"gates.cap.limit": 2})


def test_verdicts_lie_in_the_run_folder(tmp_path: Path) -> None:
    config = Config.from_mapping(
        SMALL
        | {"attack": "asking_clients:Early", "gates": "digest,rate", "unlearning.seeds": 1, "rounds": 3}
        | {"run-dir": str(tmp_path / "run")}
    )
    (result,) = simulate(config).audits.values()
    with (tmp_path / "run" / "requests.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    mine = [row for row in rows if row["arm"] == "after"]
    assert [row["gate"] for row in mine] == ["request"] * 5 + ["digest", "rate"] * 5
    assert {row["client"] for row in mine} == {"1"}
    assert {row["accepted"] for row in mine} == {"True"}
    assert [row["samples"] for row in mine[:5]] == ["2", "1", "2", "1", "1"]
    assert result.summary["count"] == 7
