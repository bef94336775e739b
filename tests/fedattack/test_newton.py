"""Newton steps and influence functions against retraining to convergence; the solvers against dense algebra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from central_scenes import Scene, holder

from fedattack.errors import ConfigError, DataError
from fedattack.unlearning.curvature import CompactBFGS
from fedattack.unlearning.influence import Influence
from fedattack.unlearning.newton import Newton


def largest_losses(scene: Scene, count: int) -> np.ndarray:
    flat = scene.central.flat(scene.released)
    losses = scene.central.losses(flat, scene.released, np.arange(len(scene.central)))
    return np.argsort(-losses.numpy())[:count]


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), 10, pytest.param(100, marks=pytest.mark.slow)]
)
def test_one_step_is_nearly_the_retrained_minimum(tmp_path: Path, count: int) -> None:
    scene = Scene(Newton(), tmp_path / "newton")
    base, flat = scene.released, scene.central.flat(scene.released)
    everything = np.arange(len(scene.central))
    assert len(everything) == 1257
    slope = scene.central.gradient(flat, base, everything) / 1257 + 1e-3 * flat
    assert float(slope.abs().max()) < 1e-7  # a minimum, but for the rounding to float32
    other = Scene(Influence(), tmp_path / "influence")
    drawn = np.random.default_rng(1).choice(1257, count, replace=False)
    for gone, most in ((drawn, 0.05), (largest_losses(scene, count), 0.2)):
        exact, _ = scene.retrained(gone)
        answer, _ = scene.forget(gone)
        newton = scene.rho(answer.weights, exact)
        assert newton <= most
        assert newton < other.rho(other.forget(gone)[0].weights, exact) < 0.5
        assert "warning" not in answer.details
    assert scene.accuracy(answer.weights) == pytest.approx(scene.accuracy(exact), abs=0.01)


def test_removals_one_after_the_other(tmp_path: Path) -> None:
    scene = Scene(Newton(), tmp_path, samples=300)
    gone = list(range(10))
    for position in gone:
        answer, _ = scene.forget([position])
        scene.go_on(answer)
    exact, _ = scene.retrained(gone)
    assert answer.excluded == {0: frozenset(gone)}
    assert scene.rho(answer.weights, exact) < 0.05


def test_a_deep_model_is_damped_and_left_as_it_was_trained(tmp_path: Path) -> None:
    scene = Scene(Newton(), tmp_path, model="mlp", width=16, samples=80, rounds=2)
    trained = scene.central.train(scene.first)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in scene.released.items())
    answer, _ = scene.forget([4, 5])
    before, after = scene.central.flat(scene.released), scene.central.flat(answer.weights)
    # The step solves the damped equations of the samples that are left, the matrix written down from its factors.
    left = scene.central.retained({4, 5})
    images, _ = scene.central.samples(left)
    slopes = torch.func.jacrev(lambda point: scene.central.logits(point, scene.released, images))(before)
    shares = scene.central.logits(before, scene.released, images).softmax(1)
    step = after - before
    moved = slopes @ step
    image = torch.einsum("ncp,nc->p", slopes, shares * (moved - (shares * moved).sum(1, keepdim=True)))
    image += len(left) * (1e-3 + 0.01) * step
    right = scene.central.gradient(before, scene.released, np.array([4, 5])) + 2e-3 * before
    assert float((image - right).norm() / right.norm()) < 1e-3
    losses = [scene.central.losses(f, scene.released, np.array([4, 5])).sum() for f in (before, after)]
    assert losses[1] > losses[0]


def test_a_step_that_is_not_solved_is_told(tmp_path: Path) -> None:
    scene = Scene(Newton(iterations=2), tmp_path, samples=100, rounds=1)
    answer, _ = scene.forget([1])
    assert answer.details["warning"].startswith("the step's equations are solved to ")
    with pytest.raises(DataError, match="all 100 samples are to be forgotten"):
        scene.forget(range(100))


def test_refuses_a_minimum_at_infinity() -> None:
    def scenario(**settings: object):
        return holder(100, **({"training.weight_decay": 0} | settings))[1].scenario

    with pytest.raises(ConfigError, match=r"'training.weight_decay' = 0: 'newton' trains a linear model"):
        Newton().check("newton", scenario(), 1)
    Newton(converge=False).check("newton", scenario(), 1)
    Newton().check("newton", scenario(model="mlp"), 1)


def test_the_compact_matrix_is_the_recursive_one() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + torch.eye(12)
    steps = [torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(4)]
    compact = CompactBFGS(3)
    for step in steps:
        assert compact.add(1e-6 * step, 1e-6 * hessian @ step)
    last = steps[-1]
    matrix = (last @ hessian @ last) / (last @ last) * torch.eye(12).double()
    for step in steps[1:]:
        change, image = hessian @ step, matrix @ step
        matrix = (
            matrix
            - torch.outer(image, image) / (step @ image)
            + torch.outer(change, change) / (change @ step)
        )
    vector = torch.randn(12, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(compact.product(vector), matrix @ vector)
    torch.testing.assert_close(compact.product(last), hessian @ last)  # the secant equation
    assert not compact.add(last, -last)  # downwards
    assert not compact.add(last, 3 * last, most=2.0)
    torch.testing.assert_close(compact.product(vector), matrix @ vector)
    assert not CompactBFGS().product(vector).any()
