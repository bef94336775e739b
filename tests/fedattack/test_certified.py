"""Certified removal against stored values, scikit-learn, and the objective written down again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from central_scenes import Scene, holder
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot, softplus

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError, DataError, NotApplicable, RunFailed
from fedattack.models import MODELS, build_model, initial_weights
from fedattack.unlearning import Deletion, History
from fedattack.unlearning.certificate import Certified, OneVsRest, budget
from fedattack.unlearning.certified import CertifiedRemoval
from fedattack.unlearning.linear import LinearObjective
from fedattack.unlearning.mechanism import Objective


@pytest.fixture(scope="module")
def stored(shared_dir: Path) -> dict[str, Tensor]:
    with np.load(shared_dir / "checks" / "unlearning" / "certified_removal_arrays.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def expected(shared_dir: Path) -> dict:
    text = (shared_dir / "checks" / "unlearning" / "certified_removal_expected.json").read_text()
    return json.loads(text)


def test_ridge_removals_are_the_retraining(stored: dict[str, Tensor], expected: dict) -> None:
    facts = expected["ridge"]
    problem = OneVsRest(stored["ridge_X"], stored["ridge_y"][None], facts["lam"], "ridge")
    nothing = torch.zeros(1, facts["d"], dtype=torch.float64)
    model, steps = problem.trained(nothing, nothing)
    assert steps == 1
    torch.testing.assert_close(model.weights[0], stored["ridge_w"], rtol=0, atol=1e-10)
    for k in range(1, len(facts["removed"]) + 1):
        left = problem.rows(torch.arange(k, facts["n"]))
        model = left.removed(model, problem.rows(torch.tensor([k - 1])))
    torch.testing.assert_close(model.weights[0], stored["ridge_w_minus"], rtol=0, atol=1e-10)
    assert model.beta < 1e-10
    assert model.removals == 5


def test_logistic_residuals_stay_below_their_bound(stored: dict[str, Tensor], expected: dict) -> None:
    (run,) = [r for r in expected["logistic_3v8"]["runs"] if (r["lam"], r["sigma"]) == (0.01, 0.1)]
    allowed = budget(run["sigma"], run["eps"], run["delta"])
    assert allowed == pytest.approx(run["threshold"], rel=1e-12)
    problem = OneVsRest(stored["log_X"], stored["log_y"][None], run["lam"], "logistic")
    noise = stored["log_b"][None]
    model, _ = problem.trained(noise, torch.zeros_like(noise))
    torch.testing.assert_close(model.weights[0], stored["log_w"], rtol=0, atol=1e-10)
    trace = {row["removed"]: row for row in run["trace"]}
    within = 0
    for k in range(1, 101):
        left = problem.rows(torch.arange(k, 250))
        model = left.removed(model, problem.rows(torch.tensor([k - 1])))
        w = model.weights[0].clone().requires_grad_()
        answers = stored["log_y"][k:] * (stored["log_X"][k:] @ w)
        total = softplus(-answers).sum() + 0.01 * (250 - k) / 2 * w @ w + stored["log_b"] @ w
        (residual,) = torch.autograd.grad(total, w)
        assert float(residual.norm()) <= model.beta
        within += model.beta <= allowed
        if k in trace:
            assert model.beta == pytest.approx(trace[k]["bound_cum"], rel=1e-9)
            assert float(residual.norm()) == pytest.approx(trace[k]["true_residual"], rel=1e-6)
    torch.testing.assert_close(model.weights[0], stored["log_w_after100"], rtol=0, atol=1e-10)
    assert within == run["removals_before_retrain"]


def test_the_minimum_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    targets = torch.where(inputs[:, 0] + 0.5 * torch.randn(80, generator=generator) > 0, 1.0, -1.0).double()
    l2 = 1e-2
    found, _ = LinearObjective(inputs, targets, l2, torch.zeros(6).double()).minimum(torch.zeros(6).double())
    other = LogisticRegression(C=1 / (l2 * 80), fit_intercept=False, tol=1e-12, solver="newton-cholesky")
    other.fit(inputs.numpy(), targets.numpy())
    np.testing.assert_allclose(found.numpy(), other.coef_[0], rtol=1e-7)
    separable = LinearObjective(inputs, torch.sign(inputs[:, 0]), 1e-300, torch.zeros(6).double())
    with pytest.raises(RunFailed, match="raise the L2 term"):
        separable.minimum(torch.zeros(6).double())


SMALL = {"samples": 300, "rounds": 2, "local-steps": 20, "training.weight_decay": 0.01}


def rows_of(weights: dict[str, Tensor]) -> Tensor:
    """The released last layer in the terms of its objective, (K, d)."""
    rows = torch.cat([weights["head.weight"], weights["head.bias"][:, None]], 1).double()
    return rows * rows.shape[1] ** 0.5


def residual(scene: Scene, weights: dict[str, Tensor], gone: set[int], sigma: float) -> float:
    """Length of the gradient of the objectives, written down again, at a released logistic model."""
    left = scene.central.retained(gone)
    images, labels = scene.central.images[left], scene.central.labels[left]
    x = torch.cat([images.flatten(1), torch.ones(len(left), 1)], 1).double() / 65**0.5
    y = 2.0 * (labels[:, None] == torch.arange(10)) - 1
    draws = torch.randn(10, 65, generator=scene.central.rng("certified removal", 0))
    w = rows_of(weights).requires_grad_()
    total = softplus(-y * (x @ w.T)).sum() + 0.01 * len(left) / 2 * w.square().sum()
    (gradient,) = torch.autograd.grad(total + sigma * (draws.double() * w).sum(), w)
    return float(gradient.norm())


def test_what_is_released_keeps_its_promise_and_trains_anew_when_it_must(tmp_path: Path) -> None:
    scene = Scene(CertifiedRemoval(sigma=0.5), tmp_path, **SMALL)
    assert residual(scene, scene.released, set(), 0.5) < 1e-4  # but for the rounding to float32
    gone, answers = list(range(3, 23)), []
    for part in (gone[:4], gone[4:]):
        answers.append(scene.forget(part)[0])
        scene.go_on(answers[-1])
    first, last = (answer.certificate for answer in answers)
    assert (first["retrained"], first["removals"]) == (0, 4)
    assert residual(scene, answers[0].weights, set(gone[:4]), 0.5) <= first["beta"] <= first["budget"]
    assert last["budget"] == pytest.approx(0.5 / np.sqrt(2 * np.log(1.5e4)))
    assert last["retrained"] == len(answers[1].details["intervals"]) >= 1
    assert sum(answers[1].details["intervals"]) + last["retrained"] + last["removals"] == len(gone)
    assert residual(scene, answers[1].weights, set(gone), 0.5) <= last["beta"] + 1e-4
    bounds = [0.0, *answers[0].details["bounds"], *answers[1].details["bounds"]]
    over = [k for k, bound in enumerate(bounds) if bound > last["budget"]]
    assert over[0] - 1 == answers[1].details["intervals"][0]
    assert last["covers"] == "the model"
    exact, _ = scene.retrained(gone)
    assert scene.rho(answers[1].weights, exact) < 0.01
    # All at once is the same, sample after sample.
    scene.history = scene.ended("again", scene.released)
    scene.mechanism.prepare({}, scene.history, scene.trainer)
    together = scene.forget(gone)[0]
    torch.testing.assert_close(together.weights["head.weight"], answers[1].weights["head.weight"])
    assert together.certificate == pytest.approx(dict(last))
    with pytest.raises(DataError, match="none is left to learn from"):
        scene.forget(range(300))


def test_without_noise_nothing_is_certified(tmp_path: Path) -> None:
    scene = Scene(CertifiedRemoval(sigma=0.0), tmp_path, **SMALL)
    answer, _ = scene.forget([5, 9])
    assert answer.certificate["budget"] == 0
    assert answer.details["intervals"] == [0, 0]
    exact, _ = scene.retrained([5, 9])
    torch.testing.assert_close(answer.weights["head.weight"], exact["head.weight"])


def test_new_noise_only_where_it_is_asked_for(tmp_path: Path) -> None:
    moved = {}
    for fresh in (False, True):
        scene = Scene(CertifiedRemoval(sigma=2.0, fresh=fresh), tmp_path / str(fresh), **SMALL)
        exact, _ = scene.retrained([7])
        moved[fresh] = float((rows_of(exact) - rows_of(scene.released)).norm())
    assert moved[True] > 10 * moved[False] > 0


def test_the_last_layer_on_frozen_features(tmp_path: Path) -> None:
    settings = SMALL | {"model": "tiny-cnn", "learning-rate": 0.1}
    scene = Scene(CertifiedRemoval(l2=1e-3, sigma=0.0), tmp_path, **settings)
    trained = scene.central.train(scene.first)
    changed = {n for n, t in scene.released.items() if not torch.equal(t, trained[n])}
    assert changed == {"head.weight", "head.bias"}
    answer, _ = scene.forget([1])
    assert answer.certificate["covers"].startswith("the last layer alone")
    model = build_model(scene.world.scenario.model)
    model.load_state_dict(trained)
    left = scene.central.retained({1})
    seen = model.features(scene.central.images[left]).detach()
    seen = torch.cat([seen, torch.ones(len(left), 1)], 1).double().numpy() / (seen.shape[1] + 1) ** 0.5
    other = LogisticRegression(C=1e3 / len(left), fit_intercept=False, tol=1e-10, solver="newton-cholesky")
    other.fit(seen, scene.central.labels[left].numpy() == 4)
    rows = rows_of(answer.weights)[4].numpy()
    np.testing.assert_allclose(rows, other.coef_[0], rtol=1e-3, atol=1e-3)


def test_two_classes_are_one_model(tmp_path: Path) -> None:
    scene = Scene(CertifiedRemoval(sigma=0.0, loss="ridge"), tmp_path, **SMALL)
    labels = scene.central.labels % 2
    model = ModelConfig(name="logistic", classes=2, channels=1, image_size=8, activation="relu")
    scenario = replace(scene.world.scenario, model=model)
    central = replace(scene.central, scenario=scenario, labels=labels)
    weights = initial_weights(model, 0)
    history = History(tmp_path / "two", scenario, weights=weights)
    scene.trainer.central = lambda: central
    x = torch.cat([central.images.flatten(1), torch.ones(len(labels), 1)], 1).double() / 65**0.5
    released = scene.mechanism.prepare({}, history, scene.trainer)
    rows = rows_of(released)
    right = x.T @ (2.0 * labels.double() - 1)
    wanted = torch.linalg.solve(x.T @ x + 0.01 * len(labels) * torch.eye(65).double(), right)
    torch.testing.assert_close(rows[1] - rows[0], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[0], -rows[1])
    assert scene.mechanism.minimises(scenario) == Objective("ridge", pytest.approx(0.01 * 65))


@pytest.mark.parametrize("classes", [2, 10])
def test_says_what_it_minimises(tmp_path: Path, classes: int) -> None:
    """The released rows are where the gradient of what is told vanishes."""
    scene = Scene(CertifiedRemoval(sigma=0.0), tmp_path, **SMALL)
    labels = scene.central.labels % classes
    model = ModelConfig(name="logistic", classes=classes, channels=1, image_size=8, activation="relu")
    scenario = replace(scene.world.scenario, model=model)
    central = replace(scene.central, scenario=scenario, labels=labels)
    scene.trainer.central = lambda: central
    history = History(tmp_path / "one", scenario, weights=initial_weights(model, 0))
    released = scene.mechanism.prepare({}, history, scene.trainer)
    told = scene.mechanism.minimises(scenario)
    assert told.link == ("softmax" if classes == 2 else "logistic")
    x = torch.cat([central.images.flatten(1), torch.ones(len(labels), 1)], 1).double()
    rows = torch.cat([released["head.weight"], released["head.bias"][:, None]], 1).double().requires_grad_()
    if classes == 2:
        loss = cross_entropy(x @ rows.T, labels)
    else:
        truth = one_hot(labels, 10).double()
        loss = binary_cross_entropy_with_logits(x @ rows.T, truth, reduction="sum") / len(labels)
    (slope,) = torch.autograd.grad(loss + told.decay / 2 * rows.square().sum(), rows)
    assert float(slope.abs().max()) < 1e-6
    deep = replace(scenario, model=model.model_copy(update={"name": "mlp", "width": 8}))
    assert scene.mechanism.minimises(deep) is None


def test_noise_that_destroys_the_model_is_told(tmp_path: Path) -> None:
    scene = Scene(CertifiedRemoval(sigma=100.0), tmp_path, **SMALL)
    answer, _ = scene.forget([0])
    assert answer.details["warning"].startswith("noise of deviation 100 costs ")
    mild = Scene(CertifiedRemoval(sigma=0.01), tmp_path / "mild", **SMALL)
    assert "warning" not in mild.forget([0])[0].details


def convolved(config: ModelConfig) -> nn.Module:
    """A classifier that ends in a mean over pixels."""
    channels, _, classes = config.resolved
    return nn.Sequential(nn.Conv2d(channels, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_refuses_what_it_cannot_certify(tmp_path: Path) -> None:
    def scenario(**settings: object):
        return holder(**(SMALL | settings))[1].scenario

    MODELS.add("convolved", f"{__name__}:convolved")
    with pytest.raises(NotApplicable, match="'certified' needs a model whose last layer is linear"):
        CertifiedRemoval().check("certified", scenario(model="convolved"), 1)
    bare = scenario(**{"training.weight_decay": 0})
    with pytest.raises(ConfigError, match=r"'training.weight_decay' = 0: mechanism 'certified' needs an L2"):
        CertifiedRemoval().check("certified", bare, 1)
    CertifiedRemoval(l2=0.1).check("certified", bare, 1)
    with pytest.raises(NotApplicable, match="4 clients hold it"):
        CertifiedRemoval().check("certified", scenario(), 4)
    scene = Scene(CertifiedRemoval(), tmp_path, **SMALL)
    lost = scene.history.fork(tmp_path / "lost", scene.released, {0: frozenset({3})})
    with pytest.raises(RunFailed, match="was not kept"):
        scene.mechanism.forget([Deletion(0, frozenset({1}))], lost, scene.trainer)


def test_several_classes_share_one_certificate() -> None:
    """The noise of K objectives is one vector, so their residuals count together."""
    nothing = torch.zeros(2, 3).double()
    assert Certified(nothing, nothing, torch.tensor([3.0, 4.0]).double()).beta == 5
