"""Fishing: what a head lets through, that it is counted and checked, and that it is found."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from malicious_scenes import NONE, PUBLIC, batch_of, observe, pictures, scenario, scored, total
from torch import Tensor

from adversaries import ATTACKS
from adversaries.reconstruction.malicious.fishing.attack import Fishing
from adversaries.reconstruction.malicious.fishing.bisection import ThresholdRound, next_threshold
from fedattack.config import CompressionConfig, Config, TrainingConfig
from fedattack.data import build_world
from fedattack.errors import ConfigError, NotApplicable
from fedattack.metrics import psnr
from fedattack.models import build_model, initial_weights
from fedattack.observation import Auxiliary, Observation, Reconstruction, Scenario
from simulations.engine.federation import run_federation

CPU = torch.device("cpu")


def best(answer: Reconstruction, images: torch.Tensor) -> float:
    """PSNR of the first image answered against the nearest private one."""
    return float(psnr(answer.images[:1].expand_as(images), images).clamp(max=150).max())


@pytest.mark.parametrize("model", ["mlp", "imprint"])
def test_the_only_sample_of_a_class_is_read_off(model: str) -> None:
    images, _ = batch_of(32)
    labels = torch.arange(32) % 9
    labels[5] = 9
    attack, scene = Fishing(mode="class", target=9), scenario(model, 32)
    attack.check(scene)
    (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
    assert answer.details["status"] == "certified"
    assert answer.details["caught"] == pytest.approx(1.0, abs=1e-3)
    assert float(psnr(answer.images[:1], images[5:6]).clamp(max=150)) > 80
    assert int(answer.labels[0]) == 9
    assert torch.equal(answer.images[1], PUBLIC.images.mean(0))


def test_feature_fishing_catches_the_sample_over_the_threshold() -> None:
    """The head has two classes more than the data, so that no sample of its row's class spoils the catch."""
    scene, hits = scenario("mlp", 16, classes=12), 0
    attack = Fishing(mode="feature", most=1)
    for seed in range(12):
        images, labels = batch_of(16, seed=seed)
        observation = observe(attack, scene, images, labels, seed=seed)
        module = build_model(scene.model)
        module.load_state_dict(observation.weights)
        over = int((module(images)[:, 10:].amax(1) > 0).sum())
        (answer,) = attack.run([observation], 0, CPU)
        assert answer.details["caught"] == pytest.approx(over, abs=0.05)
        if over == 1:
            hits += 1
            assert answer.details["status"] == "certified"
            assert best(answer, images) > 80
        else:
            assert answer.details["status"] == "failed"
            assert answer.details["recovered"] == 0
    assert hits >= 2


def test_samples_of_the_class_and_of_others_do_not_pass_for_one() -> None:
    """Two over the threshold, one of the class below: the count is one, the features are nobody's."""
    scene = scenario("mlp", 16)
    refused = 0
    for seed in range(40):
        attack = Fishing(mode="feature", target=3, quantile=0.8, most=1)
        images, labels = batch_of(16, seed=seed)
        (answer,) = attack.run([observe(attack, scene, images, labels, seed=seed)], 0, CPU)
        if answer.details["status"] == "certified":
            assert best(answer, images) > 60
        refused += "mixed" in answer.details.get("reason", "")
    assert refused


def test_a_convolutional_network_is_handed_to_another_attack() -> None:
    images = pictures(8, seed=3)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    attack = Fishing(mode="class", target=4, attack="gauss-newton", settings={"products": 300, "starts": 1})
    scene = scenario("tiny-cnn", 8, activation="sigmoid")
    attack.check(scene)
    (answer,) = attack.run([observe(attack, scene, images, labels)], 0, CPU)
    floor = float(psnr(PUBLIC.images.mean(0, keepdim=True), images[4:5]))
    assert answer.details["status"] == "approximate"
    assert float(psnr(answer.images[:1], images[4:5])) > floor + 30
    assert answer.loss < 1e-4  # its features are those that the head's row shows


class Adaptive(Fishing):
    """Fishing as one client meets it: its weights are those that follow from what it answered before."""

    earlier: tuple[Observation, ...] = ()

    def arm(
        self, scenario: Scenario, weights: dict[str, Tensor], seed: int, auxiliary: Auxiliary | None
    ) -> dict[str, Tensor]:
        sent = super().arm(scenario, weights, seed, auxiliary)
        return sent | self.tailor(scenario, sent, 0, self.earlier)


def rounds_of(
    attack: Adaptive, scene: Scenario, count: int, *batches: tuple[Tensor, Tensor]
) -> list[Observation]:
    """`count` armed rounds of clients with fixed batches, summed where there are several."""
    for number in range(1, count + 1):
        parts = [observe(attack, scene, *batch) for batch in batches]
        seen = parts[0] if len(parts) == 1 else total(parts)
        attack.earlier = (*attack.earlier, dataclasses.replace(seen, round=number))
    return list(attack.earlier)


FIXED = TrainingConfig(batch_size=0)


@pytest.mark.parametrize("clients", [1, 2])
def test_rounds_isolate_sample_after_sample(clients: int) -> None:
    """Labels repeat and all classes may be there: differences of rounds do not see them."""
    scene = scenario("mlp", 0, training=FIXED)
    attack = Adaptive(mode="rounds")
    attack.check(scene)
    batches = [batch_of(10 // clients, seed) for seed in range(clients)]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    seen = rounds_of(attack, scene, 16, *batches)
    answers = attack.run(seen, 0, CPU)
    found = [answer.details["recovered"] for answer in answers]
    assert found[-1] >= 8
    assert found[4] >= 1
    last = answers[-1]
    assert last.details["status"] == "certified"
    assert answers[5].details["above"] == sorted(answers[5].details["above"], reverse=True)
    assert int((scored(last, images, labels)[0] > 80).sum()) == found[-1]
    assert torch.equal(last.labels.sort().values, labels.sort().values)
    assert scored(last, images, labels)[1] == found[-1]  # each with its label
    # The answer of a round needs no later ones.
    (early,) = attack.run(seen[:8], 0, CPU)[7:]
    assert torch.equal(early.images, answers[7].images)
    assert "first of these rounds" in attack.run(seen[2:4], 0, CPU)[1].details["reason"]


def test_a_server_moves_each_clients_threshold() -> None:
    """Through the whole federation; an honest round between armed ones ends a series."""
    settings = {
        "dataset": "digits",
        "model": "mlp",
        "compressor": "none",
        "clients": 40,
        "batch-size": 0,
        "attack": "fishing",
        "rounds": 7,
        "attack-rounds": "1,2,3,4,5,7",
        "engine": "inline",
        "federation.evaluate": False,
    }
    config = Config.from_mapping(settings)
    world, attack = build_world(config), Fishing(mode="rounds", most=1)
    seen: list[Observation] = []
    run_federation(
        config,
        world,
        arming=attack,
        on_observation=seen.append,
        observe=lambda number, client: number != 6 and client < 2,
    )
    answers = attack.run(seen, 0, CPU)
    for client in (0, 1):
        own = [a.details for o, a in zip(seen, answers, strict=True) if o.client == client]
        assert [details.get("rounds") for details in own] == [None, 2, 3, 4, 5, None]
        assert own[4]["recovered"] >= 1
        assert own[4]["status"] == "certified"
    sent = [
        {float(o.weights["3.bias"].sum()) for o in seen if o.round == number} for number in (1, 2, 3, 4, 5)
    ]
    assert len(sent[0]) == 1
    assert max(map(len, sent)) == 2


def test_rounds_with_another_body_begin_anew() -> None:
    scene = scenario("mlp", 0, training=FIXED)
    attack = Adaptive(mode="rounds")
    seen = rounds_of(attack, scene, 3, batch_of(6))
    start = initial_weights(scene.model, 5)
    assert attack.tailor(scene, Fishing.arm(attack, scene, start, 0, PUBLIC), 0, seen) == {}
    assert attack.tailor(scene, seen[0].weights, 0, ()) == {}
    assert Fishing().tailor(scene, seen[0].weights, 0, seen) == {}
    assert Fishing(mode="rounds").needs_history(scene)
    assert not Fishing().needs_history(scene)


def test_thresholds_are_chosen_where_samples_lie_together() -> None:
    scores = torch.linspace(-3, 3, 601)
    top, bottom = ThresholdRound(math.inf, 0, None), ThresholdRound(-math.inf, 10, None)
    first = next_threshold([bottom, top], [], scores)
    assert first == pytest.approx(2.4, abs=0.05)  # one of ten is expected above
    pair = next_threshold([bottom, ThresholdRound(0.0, 2, None), top], [0.0], scores)
    assert pair == pytest.approx(1.5, abs=0.05)
    seen = observe(Fishing(), scenario("mlp", 2), *batch_of(2))
    below = ThresholdRound(-60.0, 2, seen)
    assert (
        next_threshold(
            [ThresholdRound(-math.inf, 2, None), below, ThresholdRound(0.0, 1, seen), top], [0.0], scores
        )
        is None
    )
    last = next_threshold(
        [ThresholdRound(-math.inf, 2, None), ThresholdRound(0.0, 1, seen), top], [0.0], scores
    )
    assert last is not None
    assert last < -50


def test_refusals() -> None:
    attack = Fishing()
    for scene, part in (
        (scenario("mlp", 4), "training.batch_size = 4"),
        (scenario("mlp", 0, training=FIXED, compression=CompressionConfig(name="qsgd")), "sent rounded"),
    ):
        with pytest.raises(NotApplicable, match=part):
            Fishing(mode="rounds").check(scene)
    for scene, part in (
        (scenario("resnet20", 4), "BatchNorm"),
        (scenario("two-layer", 4), "no bias"),
        (scenario("mlp", 4, compression=CompressionConfig(name="topk", rate=0.1)), "leaves entries out"),
    ):
        with pytest.raises(NotApplicable, match=part):
            attack.check(scene)
    with pytest.raises(ConfigError, match=r"target' = 10"):
        Fishing(target=10).check(scenario("mlp", 4, compression=NONE))
    for settings in ({"quantile": 1.0}, {"most": 0}, {"attack": "imprint"}):
        with pytest.raises(ConfigError, match="fishing"):
            Fishing(**settings)
    images, labels = batch_of(4)
    (answer,) = attack.run([observe(attack, scenario("mlp", 4), images, labels, honest=True)], 0, CPU)
    assert answer.details["status"] == "failed"
    assert "honest" in answer.details["reason"]
    assert ATTACKS.get("fishing") is Fishing
