"""Local steps read as one gradient at a point between the weights before and after them."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hcgla_scenes import observe, psnr, scenario, smooth_images
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from adversaries.inversion.evidence.one_gradient import FIRST_POINT, mean_gradient, moves
from adversaries.inversion.gradients import SurrogateGradients, gradient_model
from adversaries.inversion.gradients.products import Network
from adversaries.reconstruction.gauss_newton import GaussNewton
from adversaries.reconstruction.matching.dlg import DLG
from adversaries.reconstruction.matching.inverting_gradients import InvertingGradients
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.data.cifar import load_batch
from fedattack.data.dataset import as_float
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Auxiliary, Observation, Scenario, Update
from fedattack.training import batch_gradient, batch_positions, local_update

CPU = torch.device("cpu")
LABELS = torch.tensor([1, 3])


def client(
    steps: int, rate: float = 0.05, model: str = "lenet-zhu", **more: Any
) -> tuple[Observation, Tensor]:
    """A client that trains on all of two images in each step, and the images."""
    training = TrainingConfig(protocol="fedavg", local_steps=steps, learning_rate=rate, **more)
    images = smooth_images(2, 16, seed=3)
    return observe(scenario(5, model=model, size=16, training=training, name="none"), images, LABELS), images


def gradient_at(seen: Observation, images: Tensor, point: float) -> Tensor:
    """The plain gradient, (numel,), so far between the weights before and after."""
    changes, module = moves(seen), build_model(seen.scenario.model)
    module.load_state_dict({name: w + point * changes.get(name, 0.0) for name, w in seen.weights.items()})
    return torch.cat([piece.flatten() for piece in batch_gradient(module, images, LABELS)[1]])


def backend(seen: Observation) -> SurrogateGradients:
    one = dataclasses.replace(seen, update=mean_gradient(seen))
    found = gradient_model([one, one], LABELS.repeat(2, 1), moves=[moves(seen)] * 2, device=CPU)
    assert isinstance(found, SurrogateGradients)
    return found


def test_the_gradient_is_the_one_at_the_point_and_knows_its_slope() -> None:
    seen, images = client(3, rate=0.01)
    points = torch.tensor([0.25, 1.0], requires_grad=True)
    model = backend(seen)
    entries = model.at(points, slice(0, 2)).predict(images.repeat(2, 1, 1, 1, 1), slice(0, 2)).entries
    for row, point in enumerate(points.tolist()):
        torch.testing.assert_close(entries[row], gradient_at(seen, images, point), rtol=1e-4, atol=1e-7)
    along = torch.randn(entries.shape[1], generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((entries @ along).sum(), points)
    for row, point in enumerate(points.tolist()):
        ahead, behind = (
            gradient_at(seen, images, point + step).double() @ along.double() for step in (0.2, -0.2)
        )
        assert float(slope[row]) == pytest.approx(float(ahead - behind) / 0.4, rel=0.02)


def test_networks_and_back_end_agree_and_a_point_explains_two_steps() -> None:
    """Of two full-batch steps the mean gradient is that half way to the first: a quarter of the whole way."""
    seen, images = client(2, rate=0.002)
    network = Network(
        seen.scenario.model,
        seen.weights,
        mean_gradient(seen),
        LABELS,
        "train",
        CPU,
        moves=moves(seen),
    )
    found = {}
    for point in (0.0, 0.25, 0.5):
        network.put(point)
        found[point] = network.rms(images)
    assert found[0.25] < 0.1 * min(found[0.0], found[0.5])
    model = backend(seen).at(torch.full((1,), 0.25), slice(0, 1))
    entries = model.predict(images[None], slice(0, 1)).entries.detach()
    assert float((entries - model.sent.values[:1]).norm() / entries.norm()) < 1e-3


@pytest.mark.parametrize(
    "attack", [DLG(iterations=6), InvertingGradients(iterations=6), GaussNewton(products=100, starts=1)]
)
def test_of_one_step_the_surrogate_is_the_gradient_itself(
    attack: DLG | InvertingGradients | GaussNewton,
) -> None:
    seen, _ = client(1)
    (plain,) = attack.run([seen], 0, CPU)
    (read,) = dataclasses.replace(attack, local_steps="surrogate").run([seen], 0, CPU)
    assert torch.equal(plain.images, read.images)
    assert plain.history == read.history
    assert "point" not in read.details


def test_gauss_newton_reads_local_steps_where_the_setting_says_so() -> None:
    seen, images = client(3, rate=0.03)
    with pytest.raises(NotApplicable, match="local_steps 'surrogate'"):
        GaussNewton().check(seen.scenario)
    attack = GaussNewton(products=300, starts=1, local_steps="surrogate")
    attack.check(seen.scenario)
    (answer,) = attack.run([seen], 0, CPU)
    assert answer.details["point"] == pytest.approx(0.5, abs=0.15)
    ignorant = dataclasses.replace(seen, update=mean_gradient(seen), scenario=client(1)[0].scenario)
    (ignored,) = GaussNewton(products=300, starts=1).run([ignorant], 0, CPU)
    assert psnr(answer.images, images) > psnr(ignored.images, images) + 5
    assert answer.certificate is not None
    assert ignored.certificate is not None
    assert answer.certificate < 0.5 * ignored.certificate


@pytest.mark.parametrize("how", [{}, {"optimizer": "lbfgs"}, {"preset": "backtracking", "labels": "joint"}])
def test_matching_learns_the_point_beside_the_images(how: dict[str, Any]) -> None:
    seen, _ = client(3, rate=0.03)
    attack = InvertingGradients(iterations=12, restarts=2, local_steps="surrogate", **how)
    attack.check(seen.scenario)
    (answer,) = attack.run([seen], 0, CPU)
    assert 0 <= answer.details["point"] <= 1
    assert answer.details["point"] != FIRST_POINT
    assert "one gradient at a learned point" in answer.details["notes"]
    assert answer.loss < answer.history[0]


def test_signs_do_not_say_how_far_the_weights_moved() -> None:
    training = TrainingConfig(protocol="fedavg", local_steps=2)
    with pytest.raises(NotApplicable, match="only signs are sent"):
        InvertingGradients(local_steps="surrogate").check(scenario(5, training=training, name="sign"))


@pytest.mark.slow
def test_bar_on_photographs_that_a_network_was_trained_on(shared_dir: Path) -> None:
    """FedAvg, 5 steps of 3, one pass, from a network that ten clients trained for 15 rounds: above the floor.

    A quarter of the default budget, for a test's sake.
    """
    with tarfile.open(shared_dir / "data" / "CIFAR10" / "cifar-10-subset-python.tar.xz") as archive:
        file = archive.extractfile(next(m for m in archive.getmembers() if m.name.endswith("data_batch_1")))
        assert file is not None
        held = load_batch(file.read(), "data_batch_1")
    images, classes = as_float(np.array(held["data"]).reshape(-1, 3, 32, 32)), torch.tensor(held["labels"])
    model = ModelConfig(name="cnn-mcmahan", classes=10, channels=3, image_size=32, activation="relu")
    honest = TrainingConfig(protocol="fedavg", local_steps=5, batch_size=16, learning_rate=0.05)
    module, weights = build_model(model), initial_weights(model, 0)
    for round in range(15):
        changes = []
        for one in range(10):
            own = slice(16 * one, 16 * one + 16)
            batches = batch_positions(16, honest, 0, round, one)
            changes.append(local_update(module, weights, images[own], classes[own], batches, honest).update)
        weights = {name: w + sum(c[name] for c in changes) / 10 for name, w in weights.items()}
    attacked = TrainingConfig(protocol="fedavg", local_steps=5, batch_size=3, learning_rate=0.01)
    truth, labels = images[:15], classes[:15]
    found = local_update(
        module, weights, truth, labels, batch_positions(15, attacked, 0, 16, 0), attacked
    ).update
    update = Update(
        tuple(found), tuple(tuple(c.shape) for c in found.values()), None,
        torch.cat([c.flatten() for c in found.values()]), "delta",
    )  # fmt: skip
    scene = Scenario(model, attacked, CompressionConfig(name="none"))
    seen = Observation(16, 0, scene, weights, update, 15, auxiliary=Auxiliary(images[160:]))
    (answer,) = GaussNewton(products=700, starts=1, local_steps="surrogate").run([seen], 0, CPU)
    gain = matched(answer.images, truth) - matched(answer.floors["prior"], truth)
    assert gain.mean() > 1.5  # 2.6, 95 % within 2.4 of it


def matched(found: Tensor, truth: Tensor) -> NDArray[np.float64]:
    """PSNR of each true image, in the assignment that makes their mean largest."""
    errors = (found[:, None] - truth[None]).square().flatten(2).mean(2).clamp(min=1e-12)
    figures = -10 * errors.log10().double().numpy()
    rows, columns = linear_sum_assignment(-figures)
    return figures[rows, columns][columns.argsort()]
