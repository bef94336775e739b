"""The malicious server: what goes out, what the global model becomes, and the attack through the whole federation."""

from __future__ import annotations

import pytest
import torch

from adversaries.reconstruction.hcgla import HCGLA
from adversaries.reconstruction.tensor import TensorAttack
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import ConfigError
from fedattack.models import initial_weights
from fedattack.observation import Candidates, Observation
from fedattack.rng import adversary_seed
from simulations.engine.federation import run_federation
from simulations.experiments.choose import arming_attack
from simulations.pipeline import simulate
from strategies import MaliciousServer, build_strategy

SETTINGS = {
    "dataset": "digits",
    "model": "two-layer",
    "width": 128,
    "compressor": "none",
    "clients": 2,
    "batch-size": 4,
    "learning-rate": 0.05,
    "engine": "inline",
}


def settings(**more: object) -> Config:
    return Config.from_mapping(SETTINGS | {key.replace("_", "-"): value for key, value in more.items()})


def test_armed_round_is_observed_and_leaves_no_trace_in_training() -> None:
    """Round 2 is armed: rounds 1 and 3 go as if it had not been, and the seat sees the sent weights in it."""
    config = settings(rounds=3, attack_rounds="2")
    world = build_world(config)
    seen: list[Observation] = []
    after: dict[int, dict[str, torch.Tensor]] = {}
    run_federation(
        config,
        world,
        on_observation=seen.append,
        on_weights=lambda number, weights: after.update({number: weights}),
        arming=TensorAttack(),
    )
    honest = run_federation(settings(rounds=1), world)
    for name, tensor in after[1].items():
        assert torch.equal(tensor, honest.weights[name])
        assert torch.equal(tensor, after[2][name])
    assert any(not torch.equal(tensor, after[2][name]) for name, tensor in after[3].items())
    start = initial_weights(world.scenario.model, config.seed)
    by_round = {number: [o for o in seen if o.round == number] for number in (1, 2, 3)}
    assert all(torch.equal(o.weights[n], start[n]) for o in by_round[1] for n in start)
    for observation in by_round[2]:
        head = observation.weights["head.weight"]
        assert torch.equal(head[0], torch.full((128,), 1 / 128))
        assert not head[1:].any()
    assert all(torch.equal(o.weights[n], after[2][n]) for o in by_round[3] for n in start)


def test_every_image_of_an_armed_round_is_recovered(tmp_path) -> None:
    result = simulate(settings(attack="tensor", run_dir=str(tmp_path / "run")))
    summary = result.audits["tensor"].summary
    assert summary["images"] == 8
    assert summary["recovered"] == 8
    assert summary["metrics"]["psnr"]["mean"] > 100
    answers = result.reconstructions["tensor"].values()
    assert [answer.details["status"] for answer in answers] == ["certified"] * 2


def test_two_clients_behind_secure_aggregation(tmp_path) -> None:
    config = Config.from_mapping(
        SETTINGS | {"attack": "tensor", "run-dir": str(tmp_path / "run"), "defense": "secure-aggregation"}
    )
    result = simulate(config)
    assert all(len(answer.images) == 8 for answer in result.reconstructions["tensor"].values())
    assert result.audits["tensor"].summary["recovered"] == 8


class Planting(TensorAttack):
    """Its armed weights stay; it keeps what it was told of its question."""

    aggregates = True

    def arm(self, scenario, weights, seed, auxiliary, candidates=None, turn=0):
        self.told = (seed, candidates)
        return super().arm(scenario, weights, seed, auxiliary)


def test_an_armed_round_is_aggregated_where_the_attack_says_so() -> None:
    config = settings(rounds=1)
    world = build_world(config)
    seen: list[Observation] = []
    attack, question = Planting(), Candidates(*world.dataset.tensors(world.pools.nonmembers[:3]))
    result = run_federation(config, world, on_observation=seen.append, arming=attack, candidates=question)
    assert result.rounds[0].aggregated
    assert attack.told == (adversary_seed(config.seed, "arm", 1), question)
    for name, tensor in result.weights.items():
        mean = sum(o.update.dense()[name] for o in seen) / 2
        assert torch.allclose(tensor, seen[0].weights[name] - 0.05 * mean, atol=1e-6)
    assert torch.equal(seen[0].weights["head.weight"][0], torch.full((128,), 1 / 128))


class Tampering(TensorAttack):
    """Sends a tensor of another shape."""

    def arm(self, scenario, weights, seed, auxiliary, candidates=None, turn=0):
        return super().arm(scenario, weights, seed, auxiliary) | {"head.weight": torch.zeros(3, 3)}


def test_refusals() -> None:
    config = settings()
    world = build_world(config)
    plain = build_strategy(config.federation, 0.1)
    with pytest.raises(ConfigError, match="changes nothing"):
        MaliciousServer(plain, world.scenario, attack=HCGLA(), rounds=(1,))
    server = MaliciousServer(plain, world.scenario, attack=Tampering(), rounds=(1,))
    weights = initial_weights(world.scenario.model, 0)
    assert server.outgoing(2, weights) is None
    with pytest.raises(ConfigError, match=r"sends 'head.weight' as \(3, 3\)"):
        server.outgoing(1, weights)
    with pytest.raises(ConfigError, match="each send weights of their own"):
        arming_attack({"tensor": TensorAttack(), "other": TensorAttack()})
    assert arming_attack({"hcgla": HCGLA()}) is None
