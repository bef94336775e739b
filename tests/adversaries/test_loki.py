"""LOKI: what secure aggregation sums up comes apart by client again, through kernels that each client got alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from malicious_scenes import PUBLIC, batch_of, observe, scenario, scored, total
from torch import Tensor

from adversaries.reconstruction.malicious.imprint import Imprint
from adversaries.reconstruction.malicious.loki import Loki
from fedattack.config import CompressionConfig, Config, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model, initial_weights, resolve
from fedattack.models.armable.loki import KernelSets
from fedattack.observation import Auxiliary, Observation, Scenario
from simulations.pipeline import simulate

CPU = torch.device("cpu")


class Placed(Loki):
    """LOKI as one client sees it: its weights are those that the client in `place` gets."""

    place = 0

    def arm(
        self, scenario: Scenario, weights: dict[str, Tensor], seed: int, auxiliary: Auxiliary | None
    ) -> dict[str, Tensor]:
        sent = super().arm(scenario, weights, seed, auxiliary)
        return sent | self.tailor(scenario, sent, self.place)


def clients(scene: Scenario, batches: list[tuple[Tensor, Tensor]]) -> list[Observation]:
    seen = []
    for place, (images, labels) in enumerate(batches):
        attack = Placed()
        attack.place = place
        seen.append(observe(attack, scene, images, labels))
    return seen


def summed(scene: Scenario, parts: list[Observation]) -> Observation:
    """The sum, with the weights before each client's share was cut out, as the server has them."""
    return total(parts, Loki().arm(scene, initial_weights(scene.model, 0), 0, PUBLIC))


def test_a_client_sees_its_image_through_its_own_kernels_alone() -> None:
    scene = scenario("loki", 4, 32)
    attack, start = Loki(), initial_weights(scene.model, 0)
    sent = attack.arm(scene, start, 0, PUBLIC)
    assert list(sent) == list(start)
    module = build_model(scene.model)
    images, _ = batch_of(3)
    assert isinstance(module, KernelSets)
    module.load_state_dict(sent | attack.tailor(scene, sent, 10))
    shown = module.kernels(images)
    assert (shown[:, [0, 1, 3, 4, 5, 6, 7]] == 0).all()
    torch.testing.assert_close(shown[:, 2, 1:-1, 1:-1], images[:, 0] + 1)
    ring = shown[:, 2].clone()
    ring[:, 1:-1, 1:-1] = 1
    assert (ring == 1).all()


def test_the_sum_of_five_clients_is_read_client_by_client() -> None:
    scene = scenario("loki", 8, 32)
    attack = Loki()
    attack.check(scene)
    batches = [batch_of(8, seed) for seed in range(5)]
    parts = clients(scene, batches)
    (answer,) = attack.run([summed(scene, parts)], 0, CPU)
    images, labels = torch.cat([one for one, _ in batches]), torch.cat([one for _, one in batches])
    quality, right = scored(answer, images, labels)
    assert answer.details["recovered"] >= 38
    assert right >= 38
    assert quality.median() > 80
    assert sum(answer.details["sets"].values()) == answer.details["recovered"]
    assert set(answer.details["sets"]) == {0, 1, 2, 3, 4}
    # The same rows without kernels hold all 40 images at once.
    plain = scenario("imprint-sparse", 8, 32)
    together = [observe(Imprint(), plain, *batch) for batch in batches]
    (mixed,) = Imprint().run([total(together)], 0, CPU)
    assert mixed.details["recovered"] < answer.details["recovered"] / 2


def test_one_client_alone_and_one_step_of_fedavg() -> None:
    images, labels = batch_of(6)
    scene = scenario(
        "loki", 6, 64, training=TrainingConfig(protocol="fedavg", batch_size=6, learning_rate=0.1)
    )
    (seen,) = clients(scene, [(images, labels)])
    (answer,) = Loki().run([seen], 0, CPU)
    quality, right = scored(answer, images, labels)
    assert right == 6
    assert quality.min() > 45


def test_clients_beyond_the_sets_share_theirs() -> None:
    scene = scenario("loki", 3, 64)
    scene = dataclasses.replace(scene, model=scene.model.model_copy(update={"kernel_sets": 2}))
    batches = [batch_of(3, seed) for seed in range(3)]
    (answer,) = Loki().run([summed(scene, clients(scene, batches))], 0, CPU)
    assert answer.details["sets"] == {0: 6, 1: 3}
    assert answer.details["status"] == "certified"


def test_an_honest_servers_kernels_are_told_apart() -> None:
    images, labels = batch_of(3)
    seen = observe(Loki(), scenario("loki", 3, 32), images, labels, honest=True)
    (answer,) = Loki().run([seen], 0, CPU)
    assert answer.details["status"] == "failed"
    assert "honest server" in answer.details["reason"]
    assert len(answer.images) == 0


@pytest.mark.parametrize(
    ("scene", "part"),
    [
        (scenario("imprint-sparse", 3, 32), "--model loki"),
        (scenario("loki", 3, 4), "model.width = 4"),
        (scenario("loki", 3, 32, compression=CompressionConfig(name="topk", rate=0.1)), "compression.name"),
        (scenario("loki", 3, 32, compression=CompressionConfig(name="qsgd")), "compression.name"),
        (
            scenario("loki", 3, 32, training=TrainingConfig(protocol="fedavg", weight_decay=0.1)),
            "weight_decay",
        ),
    ],
)
def test_refusals(scene: Scenario, part: str) -> None:
    with pytest.raises(NotApplicable, match=part):
        Loki().check(scene)
    with pytest.raises(ConfigError, match=r"loki\.functionals"):
        Loki(functionals=0)
    with pytest.raises(ConfigError, match="no kernel sets"):
        resolve(ModelConfig(name="imprint", kernel_sets=2), 1, 8, 10)


@pytest.mark.parametrize("defense", ["secure-aggregation", ""])
def test_through_the_whole_federation(tmp_path: Path, defense: str) -> None:
    config = Config.from_mapping(
        {
            "dataset": "digits",
            "model": "loki",
            "width": 64,
            "compressor": "none",
            "clients": 4,
            "batch-size": 4,
            "attack": "loki",
            "engine": "inline",
            "defense": defense,
            "run-dir": str(tmp_path / "run"),
        }
    )
    result = simulate(config)
    summary = result.audits["loki"].summary
    assert summary["images"] == 16
    assert summary["recovered"] == 16
    answers = result.reconstructions["loki"].values()
    used = [set(answer.details["sets"]) for answer in answers]
    assert used == ([{0, 1, 2, 3}] if defense else [{0}, {1}, {2}, {3}])
