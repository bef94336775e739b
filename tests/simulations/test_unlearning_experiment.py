"""Deletion requests and what they cost, on federations that really run (inline engine)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adversaries import ATTACKS
from adversaries.base import no_progress
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.refusals import applicable
from fedattack.audit.family import get_family
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import NotApplicable, PayloadError
from fedattack.models import build_model
from fedattack.observation import UnlearningRequest
from fedattack.registry import build_plugin
from fedattack.storage import RunFolder
from fedattack.training import evaluate
from fedattack.unlearning import History
from simulations.client_app import round_batches
from simulations.engine.federation import FederationResult, Judge, run_federation
from simulations.engine.open_grid import open_grid
from simulations.experiments.base import Plan
from simulations.experiments.choose import known_facts
from simulations.experiments.trainer import FederationTrainer
from simulations.experiments.unlearning import (
    UnlearningExperiment,
    UnlearningOutcome,
    _seed,
)
from simulations.pipeline import simulate

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "clients": 6,
    "rounds": 6,
    "protocol": "fedavg",
    "local-steps": 8,
    "batch-size": 16,
    "learning-rate": 0.3,
    "compressor": "none",
    "engine": "inline",
    "attack": "unlearn-max-loss",
    "requests": 12,
    "candidates": 200,
    "data.auxiliary_size": 0,
    "data.nonmembers": 600,
}


@dataclass
class Run:
    """A federation that has been trained, and what its server kept."""

    plan: Plan
    experiment: UnlearningExperiment
    result: FederationResult

    @property
    def history(self) -> History:
        return self.experiment.history

    def outcome(self, seeds: int = 1) -> UnlearningOutcome:
        (name,) = self.experiment.attacks
        found = self.experiment.measure(self.result.weights, seeds)
        if name in self.experiment.failed:
            raise self.experiment.failed[name]
        return found[name]


def ran(folder: Path, **settings: object) -> Run:
    config = Config.from_mapping(BASE | {name.replace("__", "."): value for name, value in settings.items()})
    plan = Plan(config, build_world(config), RunFolder.create(folder / "run", config), lambda *_: None)
    (name,) = config.attack.names
    experiment = UnlearningExperiment(plan, {name: build_plugin(ATTACKS.get(name), name, {}, {})})
    result = run_federation(
        config,
        plan.world,
        observe=experiment.wants,
        on_observation=experiment.observe,
        on_weights=experiment.global_model,
        on_requests=experiment.requests,
        on_round=experiment.after_round,
    )
    return Run(plan, experiment, result)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_request_is_asked_granted_and_measured(tmp_path: Path) -> None:
    run = ran(tmp_path)
    config, world, result = run.plan.config, run.plan.world, run.result
    outcome = run.outcome(seeds=2)

    # What client 0 asks for: its largest losses under the final model, as anybody can sort them.
    model = build_model(world.scenario.model)
    model.load_state_dict(result.weights)
    images, labels = world.dataset.tensors(world.partitions[0])
    with torch.no_grad():
        losses = functional.cross_entropy(model(images), labels, reduction="none")
    (request,) = outcome.requests
    assert request.client == 0
    assert list(request.positions) == sorted(range(len(labels)), key=lambda i: -float(losses[i]))[:12]

    # What the server does: trains again without them, from the start since client 0 was in round 1.
    assert (outcome.mechanism, outcome.resumed_after) == ("retrain", 0)
    assert outcome.costs["mechanism"]["rounds"] == 6
    assert outcome.costs["mechanism"]["client_steps"] == 6 * 6 * 8
    assert run.history.checkpoints == list(range(7))
    assert not run.history.update_rounds
    judge = Judge(config, world)
    retrained = run_federation(config, world, excluded={0: request.positions}).weights
    floor = run_federation(config, world, excluded={0: outcome.details["random_positions"][0]}).weights
    assert (
        outcome.accuracy["before"][0]
        == judge(result.weights)["accuracy"]
        == pytest.approx(result.rounds[-1].accuracy)
    )
    assert outcome.accuracy["after"][0] == judge(retrained)["accuracy"]
    assert outcome.losses["after"][0] == judge(retrained)["loss"]
    assert outcome.accuracy["random"][0] == judge(floor)["accuracy"]
    assert not equal(retrained, result.weights)
    requested = world.partitions[0][sorted(request.positions)]
    assert outcome.details["requested_loss"]["after"] == judge(retrained, requested)["loss"]

    damage = np.subtract(outcome.accuracy["random"], outcome.accuracy["after"]).mean()
    assert np.mean(outcome.right_lost) == pytest.approx(damage)
    assert len(outcome.right_lost) == 600

    # Random floors are of the same size and hold nothing that was asked for; a retraining is its own control.
    first, second = outcome.details["random_positions"]
    assert len(set(first)) == len(set(second)) == 12
    assert first != second
    assert not set(first) & set(request.positions)
    assert [outcome.accuracy[f"retrained_{arm}"] for arm in ("after", "random")] == [
        outcome.accuracy[arm] for arm in ("after", "random")
    ]
    assert outcome.test_samples == len(world.pools.nonmembers)

    # The second seed is a whole training of its own, from other weights, with a request chosen against its model.
    again = config.model_copy(update={"seed": _seed(config.seed, 1)})
    asked: dict[str, list[tuple[int, UnlearningRequest]]] = {}
    other = run_federation(again, world, on_requests=asked.update).weights
    ((_, chosen),) = asked["unlearn-max-loss"]
    assert set(chosen.positions) != set(request.positions)
    assert outcome.losses["before"][1] == judge(other)["loss"]
    left = run_federation(again, world, excluded={0: chosen.positions}).weights
    assert outcome.losses["after"][1] == judge(left)["loss"]

    assert outcome == run.outcome(seeds=2), "what is finished is read back"
    assert json.loads(json.dumps(asdict(outcome)))["requests"][0]["client"] == 0


def test_resumes_from_the_checkpoint_before_a_late_client(tmp_path: Path) -> None:
    run = ran(tmp_path, participation=0.34, seed=7, rounds=9, unlearning__checkpoint_every=2)
    entry = next(r.round for r in run.result.rounds if 0 in r.clients)
    assert entry > 3, "choose a seed under which client 0 comes late"
    outcome = run.outcome()
    start = (entry - 1) // 2 * 2
    assert (outcome.resumed_after, outcome.costs["mechanism"]["rounds"]) == (start, 9 - start)
    # Plain FedAvg without error feedback carries nothing but the weights, so this is a training from the start.
    gone = {0: outcome.requests[0].positions}
    whole = run_federation(run.plan.config, run.plan.world, excluded=gone).weights
    assert outcome.losses["after"][0] == Judge(run.plan.config, run.plan.world)(whole)["loss"]


def test_requests_in_the_midst_of_the_training(tmp_path: Path) -> None:
    run = ran(tmp_path, unlearning__round=3, attack__malicious_clients="0,4", requests=5)
    config, world = run.plan.config, run.plan.world
    assert run.history.checkpoints == [0, 1, 2, 3]
    model = build_model(world.scenario.model)
    model.load_state_dict(run.history.checkpoint(3))
    outcome = run.outcome()
    for client, request in zip((0, 4), outcome.requests, strict=True):
        images, labels = world.dataset.tensors(world.partitions[client])
        with torch.no_grad():
            losses = functional.cross_entropy(model(images), labels, reduction="none")
        assert (request.client, list(request.positions)) == (
            client,
            losses.argsort(descending=True)[:5].tolist(),
        )
    # Three rounds are trained again, and the three that follow are trained without the samples too.
    assert outcome.resumed_after == 0
    assert [outcome.costs["mechanism"][name] for name in ("rounds", "client_steps")] == [3, 3 * 6 * 8]
    gone = {request.client: request.positions for request in outcome.requests}
    whole = run_federation(config, world, excluded=gone).weights
    assert outcome.losses["after"][0] == Judge(config, world)(whole)["loss"]
    assert outcome.losses["before"][0] == pytest.approx(run.result.rounds[-1].loss)


def test_samples_are_as_good_as_positions_where_the_server_knows_them(tmp_path: Path) -> None:
    by_name = ran(tmp_path / "a", attack="rigged_requests:NamesPositions", rounds=2).outcome()
    by_samples = ran(tmp_path / "b", attack="rigged_requests:SendsSamples", rounds=2).outcome()
    images, labels = by_samples.requests[0].images, by_samples.requests[0].labels
    assert images is not None
    assert labels is not None
    assert (len(images), by_samples.requests[0].positions) == (12, ())
    assert (by_name.losses, by_name.details) == (by_samples.losses, by_samples.details)


def test_a_mechanism_that_forgets_by_samples_is_sent_anybodys(tmp_path: Path) -> None:
    run = ran(
        tmp_path,
        attack="rigged_requests:SendsSamples",
        rounds=1,
        **{"attack.shift": 1, "mechanism": "rigged_requests:Ascent", "unlearning.rate": "0.25"},
    )
    assert run.history.checkpoints == [0]
    outcome = run.outcome()
    world = run.plan.world
    model = build_model(world.scenario.model)
    for images, labels, name in (
        (outcome.requests[0].images, outcome.requests[0].labels, "after"),
        (*world.dataset.tensors(world.partitions[0][outcome.details["random_positions"][0]]), "random"),
    ):
        model.load_state_dict(run.result.weights)
        functional.cross_entropy(model(images), labels).backward()
        climbed = {n: (p + 0.25 * p.grad).detach() for n, p in model.named_parameters()}
        model.zero_grad()
        wanted = Judge(run.plan.config, world)(climbed)["loss"]
        assert outcome.losses[name][0] == pytest.approx(wanted, rel=1e-5)
    assert outcome.losses["after"] != outcome.losses["random"]
    assert outcome.costs["mechanism"]["client_steps"] == 0


@pytest.mark.parametrize(
    ("attack", "settings", "reason"),
    [
        ("SendsSamples", {"attack.shift": 1}, "12 of 12 samples are not among those that it registered"),
        ("NamesPositions", {"requests": 10_000}, "10000 positions, but the client has"),
    ],
)
def test_a_request_that_the_server_rejects(
    tmp_path: Path, attack: str, settings: dict[str, object], reason: str
) -> None:
    run = ran(tmp_path, attack=f"rigged_requests:{attack}", rounds=1, **settings)
    with pytest.raises(PayloadError, match=f"from client 0: {reason}"):
        run.outcome()
    assert run.experiment.audit(run.result) == {}
    assert reason in str(run.experiment.failed[f"rigged_requests:{attack}"])


def test_pixels_that_are_no_numbers_do_not_reach_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = ran(tmp_path, attack="rigged_requests:SendsNoise", rounds=1)
    assert not run.experiment.asked
    assert "deletion request from client 0 rejected: an array holds NaN" in caplog.text


def test_a_client_asks_with_its_memory_of_the_rounds(tmp_path: Path) -> None:
    run = ran(tmp_path, attack="rigged_requests:Remembers", rounds=3)
    ((_, request),) = run.experiment.asked["rigged_requests:Remembers"]
    assert request.positions == (0, 1, 2)


def test_all_samples_of_a_client_may_go(tmp_path: Path) -> None:
    run = ran(tmp_path, requests=10_000, rounds=2)
    outcome = run.outcome()
    assert outcome.drops_out
    assert outcome.floorless
    assert run.experiment.audit(run.result)["unlearn-max-loss"].level == "undecided"
    assert len(outcome.requests[0].positions) == len(run.plan.world.partitions[0])
    assert outcome.accuracy["after"] == outcome.accuracy["random"]


def test_nothing_to_forget_of_a_client_that_never_took_part(tmp_path: Path) -> None:
    run = ran(tmp_path, rounds=1, participation=0.17, seed=1)
    assert run.result.rounds[0].clients != (0,), "choose a seed under which client 0 is not drawn"
    with pytest.raises(NotApplicable, match="client 0 took part in none of 1 rounds"):
        run.outcome()


def test_the_trainer_reaches_the_clients(tmp_path: Path) -> None:
    run = ran(tmp_path, rounds=1)
    config, world = run.plan.config, run.plan.world
    with open_grid(config, world) as grid:
        trainer = FederationTrainer(config, world, grid)
        figures = trainer.evaluate(run.result.weights, [1, 3])
        short = list(trainer.updates({1: frozenset(range(5))}, run.result.weights, 1, 0.25))
    assert list(figures) == [1, 3]
    model = build_model(world.scenario.model)
    images, labels = world.dataset.tensors(world.partitions[3])
    wanted = evaluate(model, run.result.weights, images, labels)
    assert figures[3] == pytest.approx(wanted | {"num-examples": len(labels)})
    assert [update.client for update in short] == list(range(6))
    batches = round_batches(config, len(world.partitions[1]), 1, 1)[:2]  # two of eight steps
    left = sum(position not in range(5) for batch in batches for position in batch)
    assert {update.client: update.examples for update in short} == dict.fromkeys(range(6), 32) | {1: left}
    assert trainer.cost.client_steps == 2 * 6


class Rebuilder(ReconstructionAttack):
    """Of another family."""

    def run(self, observations, seed, device, progress=no_progress):
        raise AssertionError("not to be run")


def test_refuses_before_the_first_round() -> None:
    def check(name: str, **settings: object) -> None:
        config = Config.from_mapping(BASE | settings)
        attack = Rebuilder() if name == "rebuilder" else build_plugin(ATTACKS.get(name), name, {}, {})
        world = build_world(config)
        applicable({name: attack}, world.scenario, known_facts(config, world))

    check("fedmia")
    check("unlearn-max-loss", clients=1)
    check("rebuilder", clients=1, **{"data.nonmembers": 0})
    with pytest.raises(NotApplicable, match="'fedmia': 3 clients must answer in one round, and 2 of 6"):
        check("fedmia", participation=0.34)
    for name in ("fedmia", "unlearn-max-loss"):
        with pytest.raises(NotApplicable, match=f"{name}.*'data.nonmembers': 0 held-out samples"):
            check(name, **{"data.nonmembers": 0})


def test_requests_one_after_the_other(tmp_path: Path) -> None:
    name = "rigged_requests:Sleeper"
    run = ran(tmp_path, attack=name, rounds=2, unlearning__times=3)
    outcome, world = run.outcome(), run.plan.world
    judge = Judge(run.plan.config, world)
    for number in range(3):  # a position counts in what is left: 0, then 1 of the rest, then 2
        gone = {0: [0, 2, 4][: number + 1]}
        again = run_federation(run.plan.config, world, excluded=gone).weights
        assert outcome.curve["after"][0][number]["loss"] == judge(again)["loss"]
    assert outcome.losses["after"][0] == judge(again)["loss"]
    assert outcome.costs["mechanism"]["rounds"] == 3 * 2
    drawn = outcome.details["random_positions"][0]
    assert len(drawn) == len(set(drawn) - {0, 2, 4}) == 3

    # What it wanted, and what the same random deletions cost where nobody planted anything.
    blacks = torch.zeros_like(world.dataset.tensors(world.pools.nonmembers)[0])
    called = judge.probabilities(again, blacks).argmax(1) == 0
    assert outcome.success["after"][0] == called.float().mean()
    honest = run.plan.config.model_copy(
        update={"attack": run.plan.config.attack.model_copy(update={"names": ()})}
    )
    clean = run_federation(honest, world, excluded={0: drawn}).weights
    assert outcome.clean["random"][0] == judge(clean)["accuracy"]
    assert outcome.clean["before"][0] != outcome.accuracy["before"][0]

    result = run.experiment.audit(run.result)[name]
    assert result.verdict.partition(": ")[2].startswith("black squares called 0 ")
    answered = [r for r in result.records if r["request"] is not None]
    assert len(answered) == 5 * 3 * 4  # seeds, requests, arms
    assert result.summary["metrics"]["planted"]["low"] is not None


def test_a_client_that_may_only_ask(tmp_path: Path) -> None:
    run = ran(tmp_path, attack="rigged_requests:Questioner", rounds=1)
    world = run.plan.world
    images, _ = world.dataset.tensors(world.partitions[0])
    sure = Judge(run.plan.config, world).probabilities(run.result.weights, images[:40]).max(1).values
    ((_, request),) = run.experiment.asked["rigged_requests:Questioner"]
    assert request.positions == tuple(sure.argsort()[:12].tolist())
    refused = ran(tmp_path / "b", attack="rigged_requests:Questioner", rounds=1, **{"attack.limit": 39})
    assert not refused.experiment.asked, "it asked for more answers than it was granted"


def test_what_is_released_is_what_is_asked_about_and_retrained(tmp_path: Path) -> None:
    more = {"mechanism": "rigged_requests:Halved", "clients": 1, "limit": 900, "federation.evaluate": False}
    config = Config.from_mapping(
        BASE | more | {"rounds": 1, "unlearning.seeds": 2, "run-dir": str(tmp_path / "r")}
    )
    result = simulate(config).audits["unlearn-max-loss"]
    world, found = build_world(config), {}
    judge = Judge(config, world)
    trained = run_federation(config, world).weights
    half = {name: tensor / 2 for name, tensor in trained.items()}
    images, labels = world.dataset.tensors(world.partitions[0])
    model = build_model(world.scenario.model)
    model.load_state_dict(half)
    with torch.no_grad():
        losses = functional.cross_entropy(model(images), labels, reduction="none")
    gone = losses.argsort(descending=True)[:12].tolist()
    again = run_federation(config, world, excluded={0: gone}).weights
    found["before"] = half
    found["after"] = {name: tensor + 1 for name, tensor in half.items()}
    found["retrained_after"] = {name: tensor / 2 for name, tensor in again.items()}
    ends = {r["arm"]: r["loss"] for r in result.records if r["run"] == 0 and r["request"] is None}
    for arm, weights in found.items():
        assert ends[arm] == pytest.approx(judge(weights)["loss"], rel=1e-6)
    told = get_family("unlearning").beside(result)
    assert "certificate: promise 1.5" in told
    assert told[-1] == "warning: all weights moved"
    with pytest.raises(NotApplicable, match="needs the data itself, and here 6 clients hold it"):
        simulate(
            config.model_copy(update={"federation": config.federation.model_copy(update={"clients": 6})})
        )
