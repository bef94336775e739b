"""The ReLU trap: one armed round tells members."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adversaries.membership.active.relu_trap import ReLUTrap
from adversaries.membership.base import MembershipAttack
from adversaries.membership.knowledge import Knowledge
from adversaries.refusals import applicable
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Candidates
from simulations.pipeline import simulate

SETTINGS = {
    "dataset": "digits",
    "model": "mlp",
    "clients": 4,
    "batch-size": 40,
    "compressor": "none",
    "engine": "inline",
    "data.auxiliary_size": 0,
    "data.nonmembers": 600,
    "attack": "relu-trap",
}


@pytest.mark.parametrize(
    ("width", "targets", "candidates"),
    # Two or three candidates a neuron, all clients asked about; five, one client asked about.
    [(128, "", 160), (16, "0", 40)],
)
def test_one_round_tells_members(tmp_path: Path, width: int, targets: str, candidates: int) -> None:
    more = {"width": width, "attack.targets": targets, "run-dir": str(tmp_path / "run")}
    result = simulate(Config.from_mapping(SETTINGS | more))
    audit = result.audits["relu-trap"]
    assert audit.summary["members"] == audit.summary["nonmembers"] == candidates
    assert audit.summary["metrics"]["auc"]["worst"] >= 0.99
    assert result.federation is not None
    assert not result.federation.rounds[0].aggregated


def test_only_the_candidate_wakes_its_neuron() -> None:
    config = Config.from_mapping(SETTINGS)
    world = build_world(config)
    images, labels = world.dataset.tensors(world.partitions[0][:40])
    asked = Candidates(images, labels)
    start = initial_weights(world.scenario.model, 0)
    armed = ReLUTrap().arm(world.scenario, start, 0, None, asked)
    model = build_model(world.scenario.model)
    model.load_state_dict(armed)
    awake = model[:3](images)[:, :40] > 0
    assert torch.equal(awake, torch.eye(40, dtype=torch.bool))
    others, _ = world.dataset.tensors(world.partitions[1])
    assert (model[:3](others) > 0).float().mean() < 0.02
    assert {name for name in start if not torch.equal(start[name], armed[name])} == {"1.weight", "1.bias"}


def test_honest_weights_are_no_trap(tmp_path: Path) -> None:
    """What a round without traps shows is not read as if it had some."""
    config = Config.from_mapping(
        SETTINGS | {"rounds": 2, "attack-rounds": "2", "candidates": 10, "run-dir": str(tmp_path / "run")}
    )
    result = simulate(config)
    assert result.audits["relu-trap"].summary["metrics"]["auc"]["mean"] >= 0.99
    assert [path.name for path in (tmp_path / "run/parts/relu-trap").glob("round-*")] == [
        "round-00002.safetensors"
    ]
    rounds = {1: {"clients": torch.tensor([], dtype=torch.int64), "statistic": torch.empty(0, 4)}}
    knowledge = Knowledge(Candidates(torch.empty(4, 1, 8, 8), torch.zeros(4)))
    with pytest.raises(NotApplicable, match="in no armed round"):
        ReLUTrap().scores(rounds, 0, knowledge)
    scene = build_world(config).scenario
    smooth = replace(scene, model=scene.model.model_copy(update={"activation": "sigmoid"}))
    with pytest.raises(NotApplicable, match="works behind relu"):
        applicable({"relu-trap": ReLUTrap()}, smooth)


def test_a_servers_attack_that_reads_no_rounds_is_refused() -> None:
    class Blind(MembershipAttack):
        pass

    class Half(MembershipAttack):
        watch = ReLUTrap.watch

    for attack in (Blind, Half):
        with pytest.raises(
            ConfigError, match=f"attack {attack.__name__} is a server's: it must bring 'watch' and"
        ):
            attack()
