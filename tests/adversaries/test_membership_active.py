"""The servers and the client that push a model up a candidate's loss, and the server that isolates its clients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, jacrev
from torch.nn.functional import cross_entropy

from adversaries.membership.active.ascent import Ascent
from adversaries.membership.active.isolating import Isolating
from adversaries.membership.clients.ascent_client import AscentClient
from adversaries.membership.clients.loss_series_client import LossSeriesClient
from adversaries.membership.clients.unmix_client import UnmixClient
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.raising import in_turn, raise_losses
from adversaries.membership.view import RoundView, client_model
from adversaries.seats import ClientView
from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Candidates, Observation
from fedattack.training import batch_positions, local_update, sample_losses
from simulations.engine.federation import run_federation
from simulations.pipeline import simulate

SETTINGS = {
    "dataset": "digits",
    "model": "mlp",
    "width": 32,
    "clients": 4,
    "rounds": 4,
    "protocol": "fedavg",
    "local-steps": 8,
    "batch-size": 16,
    "learning-rate": 0.3,
    "compressor": "none",
    "engine": "inline",
    "data.auxiliary_size": 0,
    "data.nonmembers": 600,
    "candidates": 10,
}


def settings(**more: object) -> Config:
    return Config.from_mapping(SETTINGS | {name.replace("_", "-"): value for name, value in more.items()})


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(settings())


@pytest.fixture(scope="module")
def asked(world: World) -> Candidates:
    members = [ids[:6] for ids in world.partitions]
    return Candidates(*world.dataset.tensors(np.concatenate([*members, world.pools.nonmembers[:24]])))


def test_losses_rise_where_they_should_and_by_the_least_step(world: World, asked: Candidates) -> None:
    """Against the closed form, with every gradient formed, for a rise that is small enough to be linear."""
    start, model = initial_weights(world.scenario.model, 0), build_model(world.scenario.model).eval()
    rise = 0.01 * in_turn(len(asked.labels), 3, 1)
    raised = raise_losses(world.scenario.model, start, asked, rise, 0)

    def losses(w: dict[str, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(functional_call(model, w, (asked.images,)), asked.labels, reduction="none")

    rows = torch.cat([j.flatten(1) for j in jacrev(losses)(start).values()], 1).double()
    gram = rows @ rows.T
    probe = 2.0 * torch.randint(2, rise.shape, generator=torch.Generator().manual_seed(0)).double() - 1
    ridge = 0.01 * (probe @ gram @ probe) / len(probe)
    step = rows.T @ torch.linalg.solve(gram + ridge * torch.eye(len(gram)), rise.double())
    found = torch.cat([(raised[name] - start[name]).flatten() for name in start]).double()
    assert (found - step).norm() < 0.05 * step.norm()
    far = raise_losses(world.scenario.model, start, asked, 100 * rise, 0)
    moved = losses(far) - losses(start)
    assert moved[rise > 0].mean() > 2 * moved[rise == 0].abs().mean()


def seen(config: Config, world: World, attack: object, asked: Candidates) -> list[Observation]:
    observations: list[Observation] = []
    result = run_federation(
        config, world, on_observation=observations.append, arming=attack, candidates=asked
    )
    assert [record.aggregated for record in result.rounds] == [
        r not in config.attack.rounds for r in range(1, 5)
    ]
    return observations


def test_ascent_reads_falls_from_the_armed_weights(world: World, asked: Candidates) -> None:
    config = settings(attack_rounds="2,4")
    observations = seen(config, world, Ascent(rise=1.0, parts=2), asked)
    model = build_model(world.scenario.model).eval()

    def losses(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return sample_losses(model, weights, asked.images, asked.labels)

    armed = [o for o in observations if o.round in (2, 4)]
    # Round 2 was not aggregated: the third begins where it did.
    before = next(o.weights for o in observations if o.round == 3)
    rises, raised = losses(armed[0].weights) - losses(before), in_turn(len(asked.labels), 2, 0)
    assert rises[raised].mean() > 3 * rises[~raised].mean().abs()
    assert not torch.equal(armed[0].weights["1.weight"], armed[-1].weights["1.weight"])
    total = torch.zeros(len(asked.labels), dtype=torch.float64)
    for number in (2, 4):
        here = [o for o in armed if o.round == number]
        falls = torch.stack([losses(o.weights) - losses(client_model(o)) for o in here])
        total += (falls[1] - falls[[0, 2, 3]].mean(0)) / 2
    scores = Ascent().run(armed, 1, asked, 0, torch.device("cpu")).scores
    assert torch.allclose(scores, total, atol=1e-9)


def test_an_isolated_client_trains_on_alone(world: World, asked: Candidates) -> None:
    """Its model after three armed rounds is that of a client that trains three rounds by itself."""
    config = settings(attack_rounds="2,3,4")
    observations = seen(config, world, Isolating(), asked)
    images, labels = world.dataset.tensors(world.partitions[2])
    weights = next(o.weights for o in observations if (o.round, o.client) == (2, 2))
    for number in (2, 3, 4):
        batches = batch_positions(len(labels), config.training, config.seed, number, 2)
        model = build_model(world.scenario.model)
        update = local_update(model, weights, images, labels, batches, config.training).update
        weights = {name: weights[name] + update[name] for name in weights}
    last = [o for o in observations if o.round == 4]
    for name, tensor in client_model(last[2]).items():
        assert torch.allclose(tensor, weights[name], atol=1e-5)
    view = RoundView(last, Knowledge(asked), torch.device("cpu"))
    losses = torch.stack([view.losses(client) for client in range(4)])
    expected = losses[[0, 1, 3]].mean(0) - losses[2]
    assert torch.allclose(Isolating().measure(view)[2], expected, atol=1e-9)


@pytest.mark.parametrize("attack", ["ascent", "isolating"])
def test_the_server_tells_members(tmp_path: Path, attack: str) -> None:
    """Random labels are learnt by heart or not at all."""
    more = {"data.limit": 1000, "data.labels": "random", "attack": attack, "attack-rounds": "2,3,4"}
    more |= {"data.nonmembers": 840, "candidates": 20, "local-steps": 30, "run-dir": str(tmp_path / "run")}
    area = simulate(Config.from_mapping(SETTINGS | more)).audits[attack].summary["metrics"]["auc"]
    assert area["mean"] > 0.75


def test_sums_and_a_lone_client_are_refused(tmp_path: Path) -> None:
    for more, reason in (
        ({"defense": "secure-aggregation"}, "no update of one alone"),
        ({"clients": 1}, "2 clients must answer"),
    ):
        config = settings(attack="isolating", run_dir=str(tmp_path / "run"), **more)
        with pytest.raises(NotApplicable, match=reason):
            simulate(config)


# ---------------------------------------------------------------------- the client


@pytest.mark.parametrize("protocol", ["fedavg", "fedsgd"])
def test_a_client_pushes_in_every_second_round(world: World, asked: Candidates, protocol: str) -> None:
    more = {"local_steps": 1} if protocol == "fedsgd" else {}
    there = build_world(settings(protocol=protocol, attack="ascent-client", **more))
    attack = AscentClient(rise=0.5, parts=2, boost=4.0)
    start = initial_weights(there.scenario.model, 0)
    honest = {name: torch.full_like(tensor, 0.25) for name, tensor in start.items()}
    view = ClientView(1, 0, there.scenario, start, 7, {}, question=asked)
    attack.see(view)
    sent = attack.reply(view, honest)
    raised = raise_losses(there.scenario.model, start, asked, 0.5 * in_turn(len(asked.labels), 2, 0), 7)
    step = 1.0 if protocol == "fedavg" else -0.3
    for name, tensor in sent.items():
        assert torch.allclose(step * (tensor - honest[name]), 4 * (raised[name] - start[name]), atol=1e-5)
    attack.see(view)
    assert attack.reply(view, honest) is honest  # the second of its rounds
    assert int(view.memory["times"]) == 2


def test_a_client_explains_steps_by_all_candidates(world: World, asked: Candidates) -> None:
    """Two steps of known shares of the candidates' gradients, and one that it does not read where it pushed."""
    model, scene = build_model(world.scenario.model).eval(), world.scenario
    shares = torch.rand(len(asked.labels), generator=torch.Generator().manual_seed(0))

    def stepped(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def loss(w: dict[str, torch.Tensor]) -> torch.Tensor:
            found = functional_call(model, w, (asked.images,))
            return cross_entropy(found, asked.labels, reduction="none") @ shares

        return {name: weights[name] - 0.01 * slope for name, slope in grad(loss)(weights).items()}

    models = [initial_weights(scene.model, 0)]
    models += [stepped(models[0]), initial_weights(scene.model, 1)]
    models.append(stepped(models[2]))
    for attack, last in ((UnmixClient(), 1), (AscentClient(), 3)):
        memory: dict[str, torch.Tensor] = {}
        # The ascending client reads the second of two steps: the first one is replaced by a jump.
        for number, weights in enumerate(models[:last] if last == 1 else models[1:last]):
            attack.see(ClientView(1 + number, 0, scene, weights, 7, memory, question=asked))
        found = attack.answer(ClientView(9, 0, scene, models[last], 7, memory), asked)["scores"]
        assert np.corrcoef(found.numpy(), shares.numpy())[0, 1] > 0.9
    rows = jacrev(
        lambda w: cross_entropy(functional_call(model, w, (asked.images,)), asked.labels, reduction="none")
    )
    flat = torch.cat([j.flatten(1) for j in rows(models[0]).values()], 1).double()
    change = torch.cat([(models[0][n] - models[1][n]).flatten() for n in models[0]]).double()
    probe = 2.0 * torch.randint(2, shares.shape, generator=torch.Generator().manual_seed(7)).double() - 1
    gram = flat @ flat.T
    ridge = 0.01 * (probe @ gram @ probe) / len(probe) * torch.eye(len(gram))
    expected = torch.linalg.solve(gram + ridge, flat @ change)
    memory = {}
    UnmixClient().see(ClientView(1, 0, scene, models[0], 7, memory, question=asked))
    found = UnmixClient().answer(ClientView(2, 0, scene, models[1], 7, memory), asked)["scores"]
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_client_adds_up_losses(world: World, asked: Candidates) -> None:
    attack, memory = LossSeriesClient(), dict[str, torch.Tensor]()
    sent = [initial_weights(world.scenario.model, seed) for seed in range(3)]
    for number, weights in enumerate(sent[:2]):
        attack.see(ClientView(1 + number, 0, world.scenario, weights, 7, memory, question=asked))
    found = attack.answer(ClientView(2, 0, world.scenario, sent[2], 7, memory), asked)["scores"]
    model = build_model(world.scenario.model).eval()
    expected = torch.zeros(len(asked.labels))
    for weights in sent:
        with torch.no_grad():
            logits = functional_call(model, weights, (asked.images,))
        expected += logits.log_softmax(1)[torch.arange(len(expected)), asked.labels]
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)
    assert set(memory) == {"losses"}


def test_a_client_tells_members_of_the_others(tmp_path: Path) -> None:
    more = {
        "clients": 3,
        "data.limit": 700,
        "data.labels": "random",
        "data.nonmembers": 580,
        "candidates": 40,
    }
    config = Config.from_mapping(
        SETTINGS | more | {"attack": "unmix-client", "rounds": 3, "run-dir": str(tmp_path / "run")}
    )
    area = simulate(config).audits["unmix-client"].summary["metrics"]["auc"]["mean"]
    assert area > 0.7
