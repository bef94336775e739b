"""The unlearning seat, on federations that really run (inline engine)."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adversaries import ATTACKS, build_attack
from adversaries.base import no_progress
from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.audit.unlearning import audit_unlearning
from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation
from simulations.engine.federation import FederationResult, Judge, run_federation
from simulations.experiments import unlearning
from simulations.experiments.base import EXPERIMENTS
from simulations.experiments.unlearning import unlearning_experiment

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
    "requests": 12,
    "candidates": 200,
    "data.auxiliary_size": 0,
    "data.nonmembers": 600,
}


def ran(**settings: object) -> tuple[Config, World, list[Observation], FederationResult]:
    config = Config.from_mapping(BASE | {name.replace("__", "."): value for name, value in settings.items()})
    world = build_world(config)
    observations: list[Observation] = []
    result = run_federation(config, world, on_observation=observations.append)
    return config, world, observations, result


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_request_is_asked_granted_and_measured() -> None:
    config, world, _, result = ran()
    outcome = unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=2)

    # What client 0 asks for: its largest losses under the final model, as anybody can sort them.
    model = build_model(world.scenario.model)
    model.load_state_dict(result.weights)
    images, labels = world.dataset.tensors(world.partitions[0])
    with torch.no_grad():
        losses = functional.cross_entropy(model(images), labels, reduction="none")
    assert outcome.request.client == 0
    assert list(outcome.request.positions) == sorted(range(len(labels)), key=lambda i: -float(losses[i]))[:12]

    # What the server does: trains again without them, from the start since client 0 was in round 1.
    assert (outcome.mechanism, outcome.resumed_after, outcome.rounds_trained) == ("retrain", 0, 6)
    judge = Judge(config, world)
    retrained = run_federation(config, world, excluded={0: outcome.request.positions}).weights
    floor = run_federation(config, world, excluded={0: outcome.details["random_positions"][0]}).weights
    assert outcome.before[0] == judge(result.weights)["accuracy"] == pytest.approx(result.rounds[-1].accuracy)
    assert outcome.after[0] == judge(retrained)["accuracy"]
    assert outcome.losses["after"][0] == judge(retrained)["loss"]
    assert outcome.random[0] == judge(floor)["accuracy"]
    assert not equal(retrained, result.weights)
    requested = world.partitions[0][sorted(outcome.request.positions)]
    assert outcome.details["requested_loss"]["after"] == judge(retrained, requested)["loss"]

    # Random floors are of the same size, differ between repeats, and the second repeat draws other batches.
    first, second = outcome.details["random_positions"]
    assert len(set(first)) == len(set(second)) == 12
    assert first != second
    assert outcome.losses["before"][0] != outcome.losses["before"][1]
    assert outcome.test_samples == len(world.pools.nonmembers)

    audited = audit_unlearning(
        "unlearn-max-loss",
        outcome.before,
        outcome.after,
        outcome.random,
        requests=len(outcome.request.positions),
        mechanism=outcome.mechanism,
        test_samples=outcome.test_samples,
    )
    assert audited.summary["seeds"] == 2
    assert outcome == unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=2)


def test_resumes_from_the_checkpoint_before_a_late_client() -> None:
    config, world, _, result = ran(participation=0.34, seed=7, rounds=9, unlearning__checkpoint_every=2)
    entry = next(r.round for r in result.rounds if 0 in r.clients)
    assert entry > 3, "choose a seed under which client 0 comes late"
    outcome = unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=1)
    start = (entry - 1) // 2 * 2
    assert (outcome.resumed_after, outcome.rounds_trained) == (start, 9 - start)
    # Plain FedAvg without error feedback carries nothing but the weights, so this is a training from the start.
    whole = run_federation(config, world, excluded={0: outcome.request.positions}).weights
    assert outcome.losses["after"][0] == Judge(config, world)(whole)["loss"]


def test_all_samples_of_a_client_may_go() -> None:
    config, world, _, result = ran(requests=10_000, rounds=2)
    outcome = unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=1)
    assert outcome.drops_out
    assert len(outcome.request.positions) == len(world.partitions[0])
    assert outcome.after == outcome.random


def test_nothing_to_forget_of_a_client_that_never_took_part() -> None:
    config, world, _, result = ran(rounds=1, participation=0.17, seed=1)
    assert result.rounds[0].clients != (0,), "choose a seed under which client 0 is not drawn"
    with pytest.raises(NotApplicable, match="client 0 took part in none of 1 rounds"):
        unlearning_experiment(config, world, result, "unlearn-max-loss")


def test_initial_weights_are_the_checkpoint_of_round_zero() -> None:
    config, world, _, _ = ran(rounds=1)
    kept = unlearning._checkpoint(config, world, 1, None)  # type: ignore[arg-type]
    assert list(kept) == [0]
    assert equal(kept[0], initial_weights(world.scenario.model, config.seed))


class Rebuilder(ReconstructionAttack):
    """Of another family."""

    def run(self, observations, seed, device, progress=no_progress):
        raise AssertionError("not to be run")


def test_refuses_before_the_first_round() -> None:
    def check(name: str, **settings: object) -> None:
        config = Config.from_mapping(BASE | settings)
        attack = Rebuilder() if name == "rebuilder" else build_attack(ATTACKS.get(name), name, {}, {})
        EXPERIMENTS.get(attack.family).check(config, build_world(config), {name: attack})

    check("fedmia")
    check("unlearn-max-loss", clients=1)
    check("rebuilder", clients=1, **{"data.nonmembers": 0})
    with pytest.raises(NotApplicable, match="'fedmia' needs 3 clients that answer in one round, and 2 of 6"):
        check("fedmia", participation=0.34)
    for name in ("fedmia", "unlearn-max-loss"):
        with pytest.raises(NotApplicable, match=f"{name}.*'data.nonmembers' = 0; accepted: 1 or more"):
            check(name, **{"data.nonmembers": 0})


def test_an_outcome_can_be_written_down() -> None:
    config, world, _, result = ran(rounds=1)
    outcome = unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=1)
    assert json.loads(json.dumps(asdict(outcome)))["request"]["client"] == 0
