"""Many models at once, against one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.models import build_model, initial_weights
from fedattack.training import batch_positions
from fedattack.unlearning import Central, Cost, Deletion, History, build_mechanism
from fedattack.unlearning.ascent import Ascent
from fedattack.unlearning.fine_tuning import FineTuning
from fedattack.unlearning.neg_grad import NegGradPlus
from fedattack.unlearning.random_labels import RandomLabels, relabelled
from fedattack.unlearning.salun import SalUn
from fedattack.unlearning.scrub_distil import ScrubDistil
from fedattack.unlearning.shadows import Stack, drawn, first_rows, trained
from fedattack.unlearning.steps import Models, StepMechanism
from simulations.engine.federation import run_federation
from simulations.experiments.shadows import Holder

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "width": 16,
    "clients": 1,
    "rounds": 2,
    "protocol": "fedavg",
    "local-steps": 6,
    "batch-size": 16,
    "learning-rate": 0.3,
    "compressor": "none",
    "engine": "inline",
    "limit": 160,
    "data.auxiliary_size": 0,
    "data.nonmembers": 60,
}
SEEDS = [0, 5, 9]


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(Config.from_mapping(BASE))


@pytest.fixture(scope="module")
def models(world: World) -> Models:
    """Three trained models; each has 90 of 100 samples and is to forget 10 of them."""
    images, labels = world.dataset.tensors(world.partitions[0])
    stack = Stack(world.scenario.model, images, labels, initial_weights(world.scenario.model, 0))
    forgotten, retained = np.zeros((2, 3, 100), dtype=bool)
    for m in range(3):
        order = np.random.default_rng(m).permutation(100)
        forgotten[m, order[:10]], retained[m, order[10:90]] = True, True
    rows = trained(stack, first_rows(stack, SEEDS), forgotten | retained, world.scenario.training, 2, SEEDS)
    draws = [torch.Generator().manual_seed(m) for m in range(3)]
    return Models(stack, rows, forgotten, retained, world.scenario.training, draws)


def again(models: Models) -> Models:
    """The same, its streams from their beginning."""
    draws = [torch.Generator().manual_seed(m) for m in range(3)]
    return Models(models.stack, models.rows, models.forgotten, models.retained, models.training, draws)


@pytest.mark.parametrize("more", [{}, {"training.momentum": 0.9, "training.weight_decay": 0.01}])
def test_each_is_trained_as_a_federation_of_one_is(world: World, models: Models, more: dict) -> None:
    whole, stack = models.forgotten | models.retained, models.stack
    for m, seed in enumerate(SEEDS[:2]):
        config = Config.from_mapping(BASE | more | {"seed": seed})
        one = World(world.dataset, world.pools, world.partitions, None, build_world(config).scenario)
        gone = frozenset(np.flatnonzero(~whole[m]).tolist())
        expected = run_federation(config, one, excluded={0: gone}).weights
        training = one.scenario.training
        rows = trained(stack, first_rows(stack, SEEDS), whole, training, 2, SEEDS)
        for name, tensor in stack.state(rows[m]).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_an_empty_batch_is_a_step_without_movement(world: World, models: Models) -> None:
    stack, training = models.stack, world.scenario.training
    some = np.zeros((3, 100), dtype=bool)
    some[:, batch_positions(100, training, 0, 1, 0)[0]] = True
    some[1:] = True
    rows = first_rows(stack, [0, 0, 0])
    few = trained(stack, rows, some, training.model_copy(update={"local_steps": 1}), 1, [0, 0, 0])
    more = trained(stack, rows, some, training, 1, [0, 0, 0])
    torch.testing.assert_close(more[0], few[0], rtol=0, atol=0)
    assert not torch.equal(more[1], few[1])


def references(models: Models) -> list[nn.Module]:
    made = []
    for row in models.rows:
        module = build_model(models.stack.model)
        module.load_state_dict(models.stack.state(row))
        made.append(module.eval())
    return made


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize(
    ("mechanism", "weights"),
    [
        (FineTuning(steps=5, batch=16, rate=0.2), (1.0, None)),
        (Ascent(steps=3, batch=4, rate=0.05), (None, -1.0)),
        (NegGradPlus(steps=4, batch=16, rate=0.1, alpha=0.7), (0.7, -0.3)),
    ],
)
def test_steps_are_those_of_sgd(models: Models, mechanism: StepMechanism, weights: tuple) -> None:
    found = mechanism.moved(again(models))
    images, labels, steps = models.stack.images, models.stack.labels, mechanism.steps
    members = [side for side, w in zip((models.retained, models.forgotten), weights, strict=True) if w]
    draws = again(models).draws
    walks = [drawn(side, mechanism.batch, steps, draws) for side in members]
    batches = list(zip(*walks, strict=True))
    for m, module in enumerate(references(models)):
        optimiser = torch.optim.SGD(module.parameters(), lr=mechanism.rate)
        for step in batches:
            loss = torch.zeros(())
            for batch, weight in zip(step, [w for w in weights if w], strict=True):
                own = batch.positions[m][batch.shares[m] > 0]
                assert members[0][m][own.numpy()].all() or members[-1][m][own.numpy()].all()
                loss = loss + weight * cross_entropy(module(images[own]), labels[own])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        torch.testing.assert_close(found[m], flat(module), rtol=1e-4, atol=1e-6)


def test_batches_are_whole_walks_through_what_a_model_has(models: Models) -> None:
    batches = list(drawn(models.retained, 32, 6, again(models).draws))
    for m in range(3):
        seen = [b.positions[m][b.shares[m] > 0] for b in batches]
        assert [len(one) for one in seen] == [32, 32, 16] * 2
        for walk in (seen[:3], seen[3:]):
            np.testing.assert_array_equal(torch.cat(walk).sort().values, np.flatnonzero(models.retained[m]))


def test_random_labels_are_never_the_samples_own(models: Models) -> None:
    labels = relabelled(again(models)).numpy()
    own = np.broadcast_to(models.stack.labels.numpy(), labels.shape)
    np.testing.assert_array_equal(labels != own, models.forgotten)
    assert len(np.unique((labels - own)[models.forgotten] % 10)) > 4
    moved, tuned = (kind(steps=40).moved(again(models)) for kind in (RandomLabels, FineTuning))
    images = models.stack.images

    def losses(rows: Tensor) -> Tensor:
        logits = models.stack.logits(rows, images)
        each = cross_entropy(logits.transpose(1, 2), models.stack.labels.expand(3, -1), reduction="none")
        return (each * torch.from_numpy(models.forgotten)).sum(1) / 10

    assert (losses(moved) > losses(tuned) + 0.1).all()


def test_salun_moves_the_salient_half_alone(models: Models) -> None:
    mechanism = SalUn(steps=3, share=0.5)
    salient = mechanism.salient(again(models))
    moved = mechanism.moved(again(models))
    for m, module in enumerate(references(models)):
        own = np.flatnonzero(models.forgotten[m])
        loss = cross_entropy(module(models.stack.images[own]), models.stack.labels[own])
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]).abs()
        expected = slope >= slope.quantile(0.5)
        assert (salient[m].bool() == expected).double().mean() > 0.999
        assert ((moved[m] != models.rows[m]) <= salient[m].bool()).all()
    assert (moved != models.rows).double().mean() > 0.2


def test_scrubs_student_minimises_its_two_losses(models: Models) -> None:
    mechanism = ScrubDistil(epochs=1, ascents=0, batch=0, rate=0.1, alpha=0.3, gamma=0.6, temperature=2.0)
    start = models.rows + 0.05 * torch.randn(models.rows.shape, generator=torch.Generator().manual_seed(4))
    teacher = models.stack.logits(models.rows, models.stack.images)
    from fedattack.unlearning.scrub_distil import distillation
    from fedattack.unlearning.steps import Term

    labels = models.stack.labels.expand(3, -1)[..., None].float()
    held = torch.cat([teacher, labels], -1)
    term = Term(models.retained, 1.0, held, distillation(2.0, 0.3, 0.6))
    shaken = Models(models.stack, start, models.forgotten, models.retained, models.training, models.draws)
    found = mechanism.descended(shaken, [term], 1)
    for m, module in enumerate(references(shaken)):
        own = np.flatnonzero(models.retained[m])
        logits = module(models.stack.images[own])
        pair = (logits / 2).log_softmax(-1), (teacher[m][own] / 2).log_softmax(-1)
        loss = 0.3 * 4 * kl_div(*pair, reduction="batchmean", log_target=True)
        loss = loss + 0.6 * cross_entropy(logits, models.stack.labels[own])
        slope = torch.autograd.grad(loss, list(module.parameters()))
        expected = flat(module) - 0.1 * torch.cat([g.flatten() for g in slope])
        torch.testing.assert_close(found[m], expected, rtol=1e-4, atol=1e-6)


def test_a_server_forgets_as_shadow_models_do(world: World, models: Models, tmp_path: Path) -> None:
    """The one implementation, through requests, history and the data of the single holder."""
    images, labels = models.stack.images, models.stack.labels
    central = Central(world.scenario, images, labels, 5, 2)
    history = History(tmp_path, world.scenario)
    history.keep_weights(0, initial_weights(world.scenario.model, 5))
    history.weights, history.rounds, history.first_rounds = models.stack.state(models.rows[1]), 2, {0: 1}
    history.excluded = {0: frozenset(np.flatnonzero(~(models.forgotten | models.retained)[1]).tolist())}
    mechanism = NegGradPlus(steps=4)
    deletion = Deletion(0, frozenset(np.flatnonzero(models.forgotten[1]).tolist()))
    answer = mechanism.forget([deletion], history, Holder(central))
    own = [torch.Generator()] * 3
    own[1] = central.rng("steps", 10)
    expected = mechanism.moved(
        Models(models.stack, models.rows, models.forgotten, models.retained, models.training, own)
    )
    for name, tensor in models.stack.state(expected[1]).items():
        torch.testing.assert_close(answer.weights[name], tensor, rtol=1e-5, atol=1e-7)
    assert set(range(100)) - answer.excluded[0] == set(np.flatnonzero(models.retained[1]).tolist())
    assert answer.resumed_after == 0
    # 4 steps of 32 retained and all of 10 forgotten
    assert central.cost.gradients == pytest.approx((4 * 10 + 32 + 32 + 16 + 32) / 100)
    assert isinstance(central.cost, Cost)


def test_settings_reach_the_mechanisms() -> None:
    config = Config.from_mapping({"mechanism": "salun", "unlearning.salun.share": 0.2, "unlearning.steps": 7})
    built = build_mechanism(config.unlearning)
    assert isinstance(built, SalUn)
    assert (built.share, built.steps, built.runs) == (0.2, 7, "central")
