"""Fisher, NTK and MCMC forgetting against closed forms and plain differentiation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import NotApplicable, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.unlearning import Central, Deletion, History
from fedattack.unlearning import ntk as ntk_module
from fedattack.unlearning.fisher import Fisher, diagonal
from fedattack.unlearning.mcmc import Mcmc, inverse_product, langevin
from fedattack.unlearning.ntk import Ntk, matched_scale
from simulations.experiments.shadows import Holder

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "width": 6,
    "clients": 1,
    "rounds": 3,
    "protocol": "fedavg",
    "local-steps": 10,
    "batch-size": 16,
    "learning-rate": 0.3,
    "training.weight_decay": 0.01,
    "compressor": "none",
    "limit": 140,
    "data.auxiliary_size": 0,
    "data.nonmembers": 80,
}
GONE = frozenset(range(0, 20, 2))


def holder(folder: Path, seed: int = 3, **more: Any) -> tuple[History, Holder]:
    """A model trained on 60 samples, and who trained it."""
    config = Config.from_mapping(BASE | more)
    world = build_world(config)
    images, labels = world.dataset.tensors(world.partitions[0])
    central = Central(world.scenario, images, labels, seed, 3)
    history = History(folder / str(seed), world.scenario)
    first = initial_weights(world.scenario.model, 3)
    history.keep_weights(0, first)
    history.weights, history.rounds, history.first_rounds = central.train(first), 3, {0: 1}
    return history, Holder(central)


def test_fishers_diagonal_is_autograds(tmp_path: Path) -> None:
    history, trainer = holder(tmp_path)
    central, some = trainer.central(), np.array([3, 8, 20, 21])
    flat = central.flat(history.weights)
    module = build_model(central.scenario.model).double()
    module.load_state_dict(history.weights)
    expected = torch.zeros_like(flat)
    for position in some:
        logs = module(central.images[position][None].double())[0].log_softmax(-1)
        for one in logs:
            slope = torch.autograd.grad(one, list(module.parameters()), retain_graph=True)
            expected += one.exp().detach() * torch.cat([g.flatten() for g in slope]) ** 2 / len(some)
    before = central.cost.gradients
    torch.testing.assert_close(diagonal(central, flat, history.weights, some), expected)
    assert central.cost.gradients - before == pytest.approx(10 * 4 / 60)


@pytest.mark.parametrize("power", [0.5, 0.25])
def test_fishers_noise_has_the_variance_of_its_formula(tmp_path: Path, power: float) -> None:
    drawn = []
    for seed in range(6):
        history, trainer = holder(tmp_path, seed)
        central, kept = trainer.central(), np.array(sorted(set(range(60)) - GONE))
        flat = central.flat(history.weights)
        known = central.parts(diagonal(central, flat, history.weights, kept))
        answer = Fisher(alpha=1e-6, power=power).forget([Deletion(0, GONE)], history, trainer)
        shift = central.parts(central.flat(answer.weights) - flat)
        for name, f in known.items():
            head = name.startswith("3.")
            variance = (1e-6 * (1 / (f + 1e-8)).clamp(max=1e2 if head else 1e3)) ** (2 * power)
            if f.dim() > 1:
                variance = variance.mean(1, keepdim=True)
            if head or f.dim() == 1:
                variance = 10 * variance
            drawn.append((shift[name] / variance.sqrt()).flatten())
    normal = torch.cat(drawn)
    assert len(normal) == 6 * 460
    assert float(normal.var()) == pytest.approx(1, abs=0.08)  # 3 deviations of so many
    assert float(normal.mean()) == pytest.approx(0, abs=0.06)
    assert float((normal**4).mean()) == pytest.approx(3, abs=0.6)


def test_a_class_forgotten_whole_loses_its_row_and_destroying_noise_is_told(tmp_path: Path) -> None:
    history, trainer = holder(tmp_path)
    digit = int(trainer.central().labels[0])
    every = frozenset(np.flatnonzero(trainer.central().labels.numpy() == digit).tolist())
    row = Fisher(alpha=1e-9).forget([Deletion(0, every)], history, trainer).weights["3.weight"][digit]
    assert 0.3 < float(row.std()) / (10 * 1e-4) ** 0.5 < 2
    told = Fisher(alpha=0.1).forget([Deletion(0, GONE)], history, trainer).details
    assert told["before"] - told["after"] > 0.05
    assert f"noise of sigma {told['sigma']:.3g} costs" in told["warning"]


@pytest.mark.parametrize("width", [6, 16])  # fewer weights than answers, and more
def test_ntk_moves_by_the_difference_of_two_ridge_regressions(tmp_path: Path, width: int) -> None:
    history, trainer = holder(tmp_path, width=width)
    central, first = trainer.central(), history.checkpoint(0)
    flat, labels = central.flat(first), central.labels

    def logits(vector: Tensor) -> Tensor:
        return central.logits(vector, first, central.images).flatten()

    jacobian = torch.autograd.functional.jacobian(logits, flat)
    residual = logits(flat).detach() - one_hot(labels, 10).flatten()
    kept = np.repeat(np.array([p not in GONE for p in range(60)]), 10)

    def end(rows: np.ndarray, count: int) -> Tensor:
        a = torch.cat([jacobian[rows], (count * 0.01) ** 0.5 * torch.eye(len(flat), dtype=flat.dtype)])
        b = torch.cat([-residual[rows], torch.zeros_like(flat)])
        return torch.linalg.lstsq(a, b[:, None]).solution[:, 0]

    expected = end(kept, 50) - end(np.full(600, True), 60)
    answer = Ntk().forget([Deletion(0, GONE)], history, trainer)
    moved = central.flat(answer.weights) - central.flat(history.weights)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)  # weights are float32
    assert answer.details["step"] == pytest.approx(float(expected.norm()), rel=1e-6)


def test_ntk_tells_what_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history, trainer = holder(tmp_path)
    monkeypatch.setattr(ntk_module, "_LARGEST", 100)
    with pytest.raises(NotApplicable, match="460 weights and 600 answers; a system of at most 100"):
        Ntk().forget([Deletion(0, GONE)], history, trainer)
    along, across = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    assert matched_scale(along, along) == pytest.approx(3.0)
    assert matched_scale(along, across) == pytest.approx(1.0)
    assert matched_scale(along, -along) == pytest.approx(3.0)


def test_draws_of_a_gaussian_posterior_move_to_the_retained_mean() -> None:
    draws = torch.Generator().manual_seed(0)
    n, k, decay = 200, 40, 0.1
    samples = torch.randn(n, 3, generator=draws, dtype=torch.float64) + torch.tensor([1.0, -2.0, 0.5])
    samples[:k] += 3.0
    ends = [x.sum(0) / (len(x) * (1 + decay)) for x in (samples, samples[k:])]

    def slope(state: Tensor) -> Tensor:
        return (state - samples).sum(0) + n * decay * state

    chain = torch.stack(list(langevin(ends[0], slope, 0.2 / n, 4000, draws)))
    reach = 4 * (1 / (n * (1 + decay))) ** 0.5 / 100  # some 100 independent states
    torch.testing.assert_close(chain.mean(0), ends[0], rtol=0, atol=10 * reach)
    assert float(chain.var()) > 0
    pull = torch.stack([(s - samples[:k]).sum(0) + k * decay * s for s in chain]).mean(0)
    moved = inverse_product(lambda v: (n - k) * (1 + decay) * v, pull, 0.05 / (n - k), 400)
    torch.testing.assert_close((chain + moved).mean(0), ends[1], rtol=0, atol=13 * reach)
    assert (chain.mean(0) - ends[1]).norm() > 10 * ((chain + moved).mean(0) - ends[1]).norm()


def test_langevin_draws_have_the_posteriors_spread() -> None:
    draws = torch.Generator().manual_seed(1)
    precision = torch.tensor([50.0, 200.0], dtype=torch.float64)
    start = torch.zeros(500, 2, dtype=torch.float64)  # 500 chains
    *_, last = langevin(start, lambda state: precision * state, 1e-3, 400, draws)
    torch.testing.assert_close(last.var(0) * precision, torch.ones(2, dtype=torch.float64), rtol=0, atol=0.25)


def test_mcmc_releases_a_draw_and_forgets(tmp_path: Path) -> None:
    history, trainer = holder(tmp_path)
    central, mechanism = trainer.central(), Mcmc(burn_in=40, step=0.02)
    history.weights = mechanism.prepare({}, history, trainer)
    gone = np.array(sorted(GONE))
    before = central.losses(central.flat(history.weights), history.weights, gone).mean()
    answer = mechanism.forget([Deletion(0, GONE)], history, trainer)
    after = central.losses(central.flat(answer.weights), history.weights, gone).mean()
    assert after > before
    assert answer.details["step"] > 0
    with pytest.raises(RunFailed, match="Neumann series diverges"):
        Mcmc(burn_in=5, scale=50.0).forget([Deletion(0, GONE)], history, trainer)
