"""The gradient back-ends: soft targets, BatchNorm modes and statistics, unrolled local training, layout."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from hcgla_scenes import psnr, scenario, smooth_images
from torch import Tensor

from adversaries.inversion.gradients import (
    AutogradGradients,
    DirectGradients,
    ExplicitGradients,
    GradientModel,
    Schedule,
    gradient_model,
    schedule_for,
)
from adversaries.inversion.gradients.sent import lay_out
from adversaries.inversion.matching.match import match
from adversaries.inversion.matching.settings import Matching
from fedattack.config import TrainingConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Observation, Scenario, Update
from fedattack.training import local_update

CPU = torch.device("cpu")
SLOW_STEP = TrainingConfig(protocol="fedavg", learning_rate=0.05)


def fedavg(model: str, activation: str, **training: object) -> Scenario:
    settings = SLOW_STEP.model_copy(update=training)
    return scenario(10, model=model, activation=activation, size=16, training=settings, name="none")


def send(scene: Scenario, images: Tensor, labels: Tensor, orders: Schedule, client: int = 0) -> Observation:
    """What a real client with these images sends, uncompressed."""
    weights = initial_weights(scene.model, 3)
    batches = [torch.tensor(order).numpy() for order in orders.orders]
    module = build_model(scene.model)
    sent = local_update(module, weights, images, labels, batches, scene.training)
    kind = "gradient" if scene.training.protocol == "fedsgd" else "delta"
    shapes = tuple(tuple(tensor.shape) for tensor in sent.update.values())
    values = torch.cat([tensor.flatten() for tensor in sent.update.values()])
    update = Update(tuple(sent.update), shapes, None, values, kind)  # type: ignore[arg-type]
    return Observation(1, client, scene, weights, update, sent.num_examples, buffers=sent.buffers)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.norm())


# Layout


def test_segments_and_rows_address_the_update() -> None:
    scene = scenario(30, rate=0.02, size=16)
    images, labels = smooth_images(2, 16), torch.tensor([3, 4])
    everything = Schedule(((0,),))
    seen = send(dataclasses.replace(scene, training=TrainingConfig()), images[:1], labels[:1], everything)
    dense = gradient_model([seen], labels[:1, None], device=CPU).sent
    assert dense.complete
    kept = torch.arange(0, seen.update.numel, 37)
    update = Update(seen.update.names, seen.update.shapes, kept, seen.update.values[kept])
    sparse = gradient_model([dataclasses.replace(seen, update=update)], labels[:1, None], device=CPU).sent
    assert int(sparse.valid.sum()) == len(kept)
    pieces = seen.update.dense()
    for sent in (dense, sparse):
        assert sent.segments[0].start == 0
        assert sent.segments[-1].stop == sent.values.shape[1]
        for segment in sent.segments:
            columns = slice(segment.start, segment.stop)
            known = sent.valid[0, columns] > 0
            rows, values = sent.rows[0, columns][known], sent.values[0, columns][known]
            tensor = pieces[segment.name]
            assert tuple(tensor.shape) == segment.shape
            for row, value in list(zip(rows.tolist(), values, strict=True))[::50]:
                assert bool((tensor[row] == value).any())


# Soft targets


@pytest.mark.parametrize("model", ["lenet-zhu", "mlp"])
def test_soft_targets(model: str) -> None:
    scene = dataclasses.replace(fedavg(model, "sigmoid"), training=TrainingConfig(batch_size=2))
    images, labels = smooth_images(4, 16).reshape(2, 2, 3, 16, 16), torch.tensor([[1, 2], [3, 3]])
    both = Schedule(((0, 1),))
    seen = [send(scene, images[v], labels[v], both, v) for v in range(2)]
    backend = gradient_model(seen, None, device=CPU)
    with pytest.raises(ValueError, match="needs `shares`"):
        backend.predict(images, slice(0, 2))
    hard = F.one_hot(labels, 10).float()
    found = backend.predict(images, slice(0, 2), shares=hard)
    assert relative(found.entries, backend.sent.values) < 1e-5
    shares = torch.rand(2, 2, 10).softmax(2).requires_grad_()
    loss = backend.predict(images, slice(0, 2), shares=shares).entries.square().sum()
    (slope,) = torch.autograd.grad(loss, shares)
    module = build_model(scene.model)
    module.load_state_dict(seen[0].weights)
    again = shares.detach().clone().requires_grad_()
    reference = torch.zeros(())
    for v in range(2):
        loss = F.cross_entropy(module(images[v]), again[v])
        gradients = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        reference = reference + torch.stack([g.square().sum() for g in gradients]).sum()
    (wanted,) = torch.autograd.grad(reference, again)
    # Along the simplex: back-ends may differ in the direction in which rows no longer sum to 1.
    centred = [one - one.mean(2, keepdim=True) for one in (slope, wanted)]
    assert relative(centred[0], centred[1]) < 1e-4


# BatchNorm


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batchnorm_modes_and_statistics(mode: str) -> None:
    scene = dataclasses.replace(fedavg("resnet20", "gelu"), training=TrainingConfig(batch_size=2))
    images, labels = smooth_images(2, 16), torch.tensor([1, 7])
    seen = send(scene, images, labels, Schedule(((0, 1),)))
    weights = {name: tensor.clone() for name, tensor in seen.weights.items()}
    module = build_model(scene.model).train(mode == "train")
    module.load_state_dict(weights)
    loss = F.cross_entropy(module(images), labels)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
    backend = gradient_model([seen], labels[None], batch_norm=mode, device=CPU)  # type: ignore[arg-type]
    found = backend.predict(images[None], slice(0, 1), statistics=True)
    assert relative(found.entries[0], wanted) < 1e-5
    assert len(found.statistics) == 21
    if mode == "train":
        # running' = 0.9 running + 0.1 batch, the variance unbiased: what the client itself sent says the same.
        mean, variance = found.statistics[0]
        old, new = seen.weights["body.1.running_mean"], seen.buffers["body.1.running_mean"]
        torch.testing.assert_close(mean[0], (new - 0.9 * old) / 0.1, rtol=1e-4, atol=1e-5)
        count = images.shape[0] * images.shape[2] * images.shape[3]
        old, new = seen.weights["body.1.running_var"], seen.buffers["body.1.running_var"]
        biased = (new - 0.9 * old) / 0.1 * (count - 1) / count
        torch.testing.assert_close(variance[0], biased, rtol=1e-4, atol=1e-5)
    assert not backend.predict(images[None], slice(0, 1)).statistics
    assert all(torch.equal(weights[name], seen.weights[name]) for name in weights)


@pytest.mark.parametrize("declared", ["train", "eval"])
def test_batchnorm_is_matched_as_the_client_declared_it(declared: str) -> None:
    training = TrainingConfig(batch_size=2, batch_norm=declared)
    scene = scenario(10, model="resnet20", activation="relu", size=16, training=training, name="none")
    images, labels = smooth_images(2, 16), torch.tensor([3, 4])
    seen = send(scene, images, labels, Schedule(((0, 1),)))
    settings = Matching(objective="cosine", optimiser="adam", iterations=1)
    other = dataclasses.replace(settings, batch_norm="eval" if declared == "train" else "train")
    found, wrong = (
        match([seen], labels[None], images[None, None], how, CPU)[0].history[0] for how in (settings, other)
    )
    assert abs(found) < 1e-5
    assert wrong > 1e-3


# The explicit second derivative against automatic differentiation


def odd_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """BatchNorm as after some training: nothing in it is 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    changed = dict(weights)
    for name, tensor in weights.items():
        if name.endswith("running_mean"):
            changed[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
        elif name.endswith("running_var") or (
            f"{name[:-6]}running_var" in weights and name.endswith("weight")
        ):
            changed[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
    return changed


def full_gradients(scene: Scenario, images: Tensor, labels: Tensor) -> list[Observation]:
    batch = Schedule((tuple(range(images.shape[1])),))
    return [send(scene, *pair, batch, client) for client, pair in enumerate(zip(images, labels, strict=True))]


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize(("victims", "batch"), [(1, 1), (1, 3), (5, 1), (2, 2)])
@pytest.mark.parametrize(
    ("model", "activation", "mode", "statistics"),
    [
        ("lenet-zhu", "sigmoid", "train", False),
        ("tiny-cnn", "softplus", "train", False),
        ("mlp", "tanh", "train", False),
        ("resnet20", "gelu", "train", True),
        ("resnet20", "gelu", "eval", True),
        ("resnet20", "gelu", "eval", False),
    ],
)
def test_explicit_is_autograd_twice(
    model: str, activation: str, mode: str, statistics: bool, victims: int, batch: int, layers: str
) -> None:
    scene = dataclasses.replace(fedavg(model, activation), training=TrainingConfig(batch_size=batch))
    images = smooth_images(victims * batch, 16).unflatten(0, (victims, batch))
    labels = torch.arange(victims * batch).reshape(victims, batch) % 10
    seen = full_gradients(scene, images, labels)
    weights, updates = odd_weights(seen[0].weights), [one.update for one in seen]
    point = smooth_images(victims * batch, 16, seed=5).reshape(images.shape)
    found = []
    for kind in (ExplicitGradients, AutogradGradients):
        layout = lay_out(updates, layers, CPU)  # type: ignore[arg-type]
        backend = kind(scene.model, weights, layout, labels, mode)  # type: ignore[arg-type]
        x = point.clone().requires_grad_()
        shares = (0.9 * F.one_hot(labels, 10) + 0.01).requires_grad_()
        prediction = backend.predict(x, slice(0, victims), whole=True, shares=shares, statistics=statistics)
        assert prediction.square is not None
        unit = backend.sent.values.square().sum()
        loss = (
            (prediction.entries - backend.sent.values).square().sum() + 0.3 * prediction.square.sum()
        ) / unit
        for pair in prediction.statistics:
            loss = loss + 1e-3 * sum((one - 1).square().sum() for one in pair)
        found.append((prediction.entries.detach(), *torch.autograd.grad(loss, (x, shares))))
    (entries, slope, at_shares), (wanted, wanted_slope, wanted_shares) = found
    assert relative(entries, wanted) < 1e-4
    assert relative(slope, wanted_slope) < 2e-4
    centred = [one - one.mean(2, keepdim=True) for one in (at_shares, wanted_shares)]
    assert relative(centred[0], centred[1]) < 1e-4


@pytest.mark.parametrize("rate", [1.0, 0.03])
def test_slopes_without_a_graph_are_those_with_one(rate: float) -> None:
    scene = dataclasses.replace(fedavg("resnet20", "gelu"), training=TrainingConfig())
    images, labels = smooth_images(2, 16)[:, None], torch.tensor([[1], [7]])
    seen = full_gradients(scene, images, labels)
    for number, one in enumerate(seen):
        kept = torch.randperm(one.update.numel, generator=torch.Generator().manual_seed(number))
        kept = kept[: int(rate * one.update.numel) - number].sort().values
        update = dataclasses.replace(one.update, indices=kept, values=one.update.values[kept])
        seen[number] = dataclasses.replace(one, update=update)
    backend = gradient_model(seen, labels, batch_norm="eval", device=CPU)
    assert isinstance(backend, DirectGradients)
    sent = backend.sent

    def distance(entries: Tensor, victims: slice) -> tuple[Tensor, Tensor]:
        difference = entries - sent.values[victims]
        return (difference.square() * sent.valid[victims]).sum(
            1
        ), 2 * difference  # also where nothing was sent

    point = smooth_images(2, 16, seed=5)[:, None]
    losses, slopes = backend.slope(point, slice(0, 2), distance)
    x = point.clone().requires_grad_()
    entries = backend.predict(x, slice(0, 2)).entries
    wanted = ((entries - sent.values).square() * sent.valid).sum(1)
    torch.testing.assert_close(losses, wanted.detach())
    assert relative(slopes, torch.autograd.grad(wanted.sum(), x)[0]) < 1e-5
    # A victim's slope does not depend on its companions.
    alone = backend.slope(point[1:], slice(1, 2), distance)
    assert relative(alone[1][0], slopes[1]) < 1e-4


def test_what_has_no_explicit_derivative_is_differentiated_twice(caplog: pytest.LogCaptureFixture) -> None:
    scene = dataclasses.replace(fedavg("two-layer", "poly3"), training=TrainingConfig())
    scene = dataclasses.replace(scene, model=scene.model.model_copy(update={"width": 32}))
    images, labels = smooth_images(1, 16)[None], torch.tensor([[1]])
    seen = full_gradients(scene, images, labels)
    with caplog.at_level(logging.INFO, logger="fedattack.attacks"):
        backend = gradient_model(seen, labels, device=CPU)
    assert isinstance(backend, AutogradGradients)
    assert "no explicit second derivative" in caplog.text
    assert relative(backend.predict(images, slice(0, 1)).entries, backend.sent.values) < 1e-5


# Unrolled local training

FIVE = Schedule(((0, 1), (2, 3), (4,), (0, 1), (2, 3)))


@pytest.mark.parametrize(
    ("model", "activation"), [("lenet-zhu", "sigmoid"), ("tiny-cnn", "relu"), ("resnet20", "gelu")]
)
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.01}])
def test_unrolled_training_is_the_clients(model: str, activation: str, settings: dict[str, float]) -> None:
    scene = fedavg(model, activation, local_steps=5, batch_size=2, **settings)
    images, labels = smooth_images(5, 16), torch.tensor([1, 2, 3, 4, 4])
    seen = send(scene, images, labels, FIVE)
    assert seen.num_examples == 5
    backend = gradient_model([seen, seen], labels.repeat(2, 1), unroll=FIVE, device=CPU)
    found = backend.predict(images.repeat(2, 1, 1, 1, 1), slice(0, 2), statistics=True)
    assert relative(found.entries, backend.sent.values) < 2e-4
    assert torch.equal(found.entries[0], found.entries[1])
    # In units of a gradient, whatever the learning rate.
    torch.testing.assert_close(backend.sent.values[0], -seen.update.values / (0.05 * 5))
    assert len(found.statistics) == (21 if model == "resnet20" else 0)
    # The order matters: the same images the other way round are no explanation.
    other = backend.predict(images.flip(0).repeat(2, 1, 1, 1, 1), slice(0, 2))
    assert relative(other.entries, backend.sent.values) > 0.05


def slope_error(backend: GradientModel, images: Tensor, step: float) -> float:
    """Relative error of the directional derivative of the masked squared distance, against central differences."""

    def objective(x: Tensor) -> Tensor:
        return (backend.predict(x, slice(0, 1)).entries - backend.sent.values).double().square().sum()

    x = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(x), x)
    direction = slope / slope.norm()
    with torch.enable_grad():
        ahead, behind = objective(images + step * direction), objective(images - step * direction)
    numeric = float((ahead - behind).detach()) / (2 * step)
    return abs(numeric / float((slope * direction).sum()) - 1)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5, "weight_decay": 0.01}])
def test_unrolled_derivative(settings: dict[str, float]) -> None:
    scene = fedavg("lenet-zhu", "sigmoid", local_steps=3, batch_size=2, **settings)
    orders = Schedule(((0, 1), (2, 0), (1, 2)))
    images, labels = smooth_images(3, 16), torch.tensor([1, 2, 3])
    seen = send(scene, images, labels, orders)
    backend = gradient_model([seen], labels[None], unroll=orders, device=CPU)
    assert slope_error(backend, smooth_images(3, 16, seed=9)[None], 1e-1) < 2e-2


def test_what_a_server_can_assume_about_the_order() -> None:
    def assumed(size: int, steps: int, declared: int) -> tuple[tuple[int, ...], ...]:
        training = TrainingConfig(protocol="fedavg", batch_size=size, local_steps=steps)
        return schedule_for(scenario(10, training=training), declared).orders

    assert assumed(0, 2, 3) == ((0, 1, 2), (0, 1, 2))
    assert assumed(2, 3, 6) == ((0, 1), (2, 3), (4, 5))
    assert assumed(2, 4, 5) == ((0, 1), (2, 3), (4,), (0, 1))  # the client has five samples
    assert assumed(8, 2, 3) == ((0, 1, 2), (0, 1, 2))
    with pytest.raises(NotApplicable, match="hold 4"):
        assumed(2, 2, 5)
    with pytest.raises(NotApplicable, match="nothing to reconstruct"):
        assumed(2, 2, 0)
    with pytest.raises(ValueError, match="must be in some step"):
        Schedule(((0, 2),))


@pytest.mark.slow
def test_unrolling_beats_taking_the_delta_for_one_gradient() -> None:
    """Five full-batch steps on four images: at least 5 dB (10 on photographs)."""
    training = TrainingConfig(protocol="fedavg", learning_rate=0.1, local_steps=5, batch_size=0)
    scene = scenario(10, activation="sigmoid", training=training, name="none")
    images, labels = smooth_images(4), torch.tensor([1, 2, 3, 4])
    orders = schedule_for(scene, 4)
    seen = send(scene, images, labels, orders)
    as_one = Update(seen.update.names, seen.update.shapes, None, -seen.update.values / (0.1 * 5), "gradient")
    settings = Matching(parametrisation="spectrum", iterations=150)
    starts = torch.full((1, 1, 4, 3, 32, 32), 0.5)
    starts = starts + 0.1 * torch.randn(starts.shape, generator=torch.Generator().manual_seed(0))
    unrolled = match([seen], labels[None], starts, settings, CPU, unroll=orders)[0]
    ignored = match([dataclasses.replace(seen, update=as_one)], labels[None], starts, settings, CPU)[0]
    assert psnr(unrolled.images, images) > psnr(ignored.images, images) + 5
