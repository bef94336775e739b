"""Local training against autograd, hand-written SGD and torch.optim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedattack.config import ModelConfig, TrainingConfig
from fedattack.errors import DataError, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.training import batch_positions, evaluate, load_weights, local_update

MODEL = ModelConfig(name="tiny-cnn", classes=4, channels=1, image_size=8, activation="relu")


class WithBatchNorm(nn.Module):
    """A convolution, BatchNorm with running statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))


def samples(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(4, (count,), generator=generator)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fedavg(**settings) -> TrainingConfig:
    return TrainingConfig(protocol="fedavg", **settings)


# --- which samples are in which batch ---------------------------------------------------------------------------


def test_batches_walk_through_the_samples_without_replacement():
    batches = batch_positions(10, fedavg(batch_size=4, local_steps=8), seed=1, round=2, client=3)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4, 4]
    for epoch in (batches[:3], batches[3:6]):
        assert sorted(np.concatenate(epoch)) == list(range(10))
    assert len(np.unique(np.concatenate(batches[6:]))) == 8
    assert not np.array_equal(np.concatenate(batches[:3]), np.concatenate(batches[3:6]))


def test_batches_are_a_pure_function_of_seed_round_and_client():
    training = fedavg(batch_size=3, local_steps=4)
    first = np.concatenate(batch_positions(50, training, 1, 2, 3))
    np.random.default_rng(0).random(10)
    np.testing.assert_array_equal(first, np.concatenate(batch_positions(50, training, 1, 2, 3)))
    for other in [(0, 2, 3), (1, 3, 3), (1, 2, 4)]:
        assert not np.array_equal(first, np.concatenate(batch_positions(50, training, *other)))


@pytest.mark.parametrize("size", [0, 6, 7])
def test_large_batches_hold_all_samples(size):
    batches = batch_positions(6, fedavg(batch_size=size, local_steps=3), 0, 1, 0)
    assert [batch.tolist() for batch in batches] == [list(range(6))] * 3


def test_fedsgd_draws_one_batch_and_every_sample_is_equally_likely():
    training = TrainingConfig(protocol="fedsgd", batch_size=2)
    drawn = np.zeros(5)
    for number in range(1, 1001):
        batches = batch_positions(5, training, 0, number, 0)
        assert len(batches) == 1
        assert len(set(batches[0].tolist())) == 2
        drawn[batches[0]] += 1
    assert abs(drawn - 400).max() < 5 * math.sqrt(1000 * 0.4 * 0.6)


def test_a_client_without_samples_is_named():
    with pytest.raises(DataError, match="client 7 has no samples"):
        batch_positions(0, TrainingConfig(), 0, 1, 7)


# --- fedsgd -------------------------------------------------------------------------------------------------------


def test_fedsgd_is_the_gradient_of_the_mean_loss_at_the_received_weights():
    weights = initial_weights(MODEL, 3)
    images, labels = samples(12)
    batch = np.array([3, 0, 7, 11])
    model = build_model(MODEL)
    result = local_update(model, weights, images, labels, [batch], TrainingConfig(batch_size=4))

    reference = build_model(MODEL).double()
    reference.load_state_dict(weights)
    total = sum(
        cross_entropy(reference(images[i : i + 1].double()), labels[i : i + 1]) for i in batch.tolist()
    )
    (total / 4).backward()
    assert list(result.update) == [name for name, _ in reference.named_parameters()]
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(result.update[name].numpy(), parameter.grad.numpy(), rtol=1e-4, atol=1e-7)
        assert not result.update[name].requires_grad
        assert result.update[name].dtype == torch.float32
    assert result.loss == pytest.approx(total.item() / 4, rel=1e-6)
    assert result.num_examples == 4
    assert result.buffers == {}
    for name, tensor in model.state_dict().items():  # no step is taken
        assert torch.equal(tensor, weights[name])


def test_fedsgd_ignores_the_optimiser_settings():
    weights, (images, labels) = initial_weights(MODEL, 3), samples(5)
    batches = [np.arange(5)]
    plain = local_update(build_model(MODEL), weights, images, labels, batches, TrainingConfig())
    other = TrainingConfig(weight_decay=0.5, momentum=0.9, learning_rate=7.0)
    decayed = local_update(build_model(MODEL), weights, images, labels, batches, other)
    assert all(torch.equal(plain.update[name], decayed.update[name]) for name in plain.update)


# --- fedavg -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)])
def test_fedavg_is_a_hand_written_sgd_loop(momentum, decay):
    weights, (images, labels) = initial_weights(MODEL, 5), samples(9)
    training = fedavg(batch_size=4, local_steps=5, learning_rate=0.3, momentum=momentum, weight_decay=decay)
    batches = batch_positions(9, training, 0, 1, 0)
    result = local_update(build_model(MODEL), weights, images, labels, batches, training)

    model = build_model(MODEL).double()
    model.load_state_dict(weights)
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses = []
    for batch in batches:
        loss = cross_entropy(model(images[batch].double()), labels[batch])
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                velocity[name] = momentum * velocity[name] + (p.grad + decay * p)
                p -= 0.3 * velocity[name]
    for name, p in model.named_parameters():
        expected = (p.detach() - weights[name].double()).numpy()
        np.testing.assert_allclose(result.update[name].numpy(), expected, rtol=1e-3, atol=2e-6)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.num_examples == 9  # distinct: five steps of 4, 4, 1, 4, 4


def test_fedavg_agrees_with_torch_optim():
    weights, (images, labels) = initial_weights(MODEL, 6), samples(6)
    training = fedavg(batch_size=2, local_steps=4, learning_rate=0.2, momentum=0.5, weight_decay=0.1)
    batches = batch_positions(6, training, 0, 1, 0)
    result = local_update(build_model(MODEL), weights, images, labels, batches, training)
    model = build_model(MODEL)
    model.load_state_dict(weights)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5, weight_decay=0.1)
    for batch in batches:
        optimiser.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(result.update[name], p.detach() - weights[name], rtol=1e-5, atol=1e-7)


def test_one_plain_step_is_minus_rate_times_gradient():
    weights, (images, labels) = initial_weights(MODEL, 1), samples(4)
    model, batches = build_model(MODEL), [np.arange(4)]
    gradient = local_update(model, weights, images, labels, batches, TrainingConfig(batch_size=4)).update
    delta = local_update(model, weights, images, labels, batches, fedavg(learning_rate=0.25)).update
    for name in gradient:
        torch.testing.assert_close(delta[name], -0.25 * gradient[name], rtol=1e-4, atol=1e-7)


# --- the model object is scratch space -----------------------------------------------------------------------------


def test_a_used_model_gives_the_same_bits_as_a_fresh_one():
    torch.manual_seed(0)
    weights = state_of(WithBatchNorm())
    images, labels = samples(8)
    training = fedavg(batch_size=4, local_steps=3, momentum=0.9)
    batches = batch_positions(8, training, 0, 1, 0)
    fresh = local_update(WithBatchNorm(), weights, images, labels, batches, training)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    used = WithBatchNorm()
    evaluate(used, weights, *samples(3, seed=9))
    local_update(used, weights, *samples(8, seed=4), batches, training)
    again = local_update(used, weights, images, labels, batches, training)
    for name in fresh.update:
        assert torch.equal(fresh.update[name], again.update[name])
    for name in fresh.buffers:
        assert torch.equal(fresh.buffers[name], again.buffers[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())
    kept = {name: tensor.clone() for name, tensor in again.update.items()}
    local_update(used, weights, *samples(8, seed=5), batches, training)
    assert all(torch.equal(kept[name], tensor) for name, tensor in again.update.items())


def test_batchnorm_statistics_come_back_beside_the_update():
    torch.manual_seed(0)
    model = WithBatchNorm()
    weights, (images, labels) = state_of(model), samples(8)
    with torch.no_grad():
        maps = model.conv(images)
    result = local_update(model, weights, images, labels, [np.arange(8)], TrainingConfig(batch_size=8))
    assert set(result.buffers) == {"norm.running_mean", "norm.running_var"}  # not the integer step counter
    assert "norm.weight" in result.update
    assert not result.update.keys() & result.buffers.keys()
    torch.testing.assert_close(result.buffers["norm.running_mean"], 0.1 * maps.mean((0, 2, 3)))
    torch.testing.assert_close(result.buffers["norm.running_var"], 0.9 + 0.1 * maps.var((0, 2, 3)))


def test_a_parameter_without_influence_has_a_zero_gradient():
    model = WithBatchNorm()
    model.unused = nn.Parameter(torch.ones(3))
    result = local_update(model, state_of(model), *samples(4), [np.arange(4)], TrainingConfig(batch_size=4))
    assert torch.equal(result.update["unused"], torch.zeros(3))


# --- failures ------------------------------------------------------------------------------------------------------


def test_divergence_is_reported_with_the_settings():
    weights, (images, labels) = initial_weights(MODEL, 0), samples(4)
    training = fedavg(local_steps=6, learning_rate=1e20)
    with pytest.raises(RunFailed, match=r"loss became (nan|inf) \(learning_rate 1e\+20, 6 steps\)"):
        local_update(build_model(MODEL), weights, images, labels, [np.arange(4)] * 6, training)


def test_weights_that_do_not_fit_are_refused():
    model, weights = build_model(MODEL), initial_weights(MODEL, 0)
    with pytest.raises(RunFailed, match=r"do not fit the model: tensors \['head.bias'\]"):
        load_weights(model, {name: t for name, t in weights.items() if name != "head.bias"})
    with pytest.raises(RunFailed, match=r"'head.bias' is \(5,\), should be \(4,\)"):
        load_weights(model, {**weights, "head.bias": torch.zeros(5)})


def test_fedsgd_refuses_several_batches():
    weights, (images, labels) = initial_weights(MODEL, 0), samples(4)
    with pytest.raises(RunFailed, match="one batch a round, got 2"):
        local_update(build_model(MODEL), weights, images, labels, [np.arange(2)] * 2, TrainingConfig())


# --- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_evaluate_is_the_mean_over_all_samples(batch_size):
    torch.manual_seed(1)
    model = WithBatchNorm()
    weights, (images, labels) = state_of(model), samples(23)
    weights["norm.running_mean"] += 0.3
    scores = evaluate(model, weights, images, labels, batch_size)
    reference = WithBatchNorm()
    reference.load_state_dict(weights)
    with torch.no_grad():
        logits = reference.eval()(images)
    assert scores["loss"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
    assert scores["accuracy"] == float((logits.argmax(1) == labels).double().mean())
    assert torch.equal(model.norm.running_mean, weights["norm.running_mean"])  # evaluation leaves no trace


def test_evaluate_refuses_nothing():
    with pytest.raises(DataError, match="no samples"):
        evaluate(
            build_model(MODEL), initial_weights(MODEL, 0), torch.zeros(0, 1, 8, 8), torch.zeros(0).long()
        )


def test_rounds_of_training_learn():
    weights, (images, labels) = initial_weights(MODEL, 2), samples(64)
    for label in range(4):  # a bright quarter says the class
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[labels == label, :, row : row + 4, column : column + 4] += 0.3
    images.clamp_(0, 1)
    model, training = build_model(MODEL), fedavg(batch_size=16, local_steps=10, learning_rate=0.2)
    start = evaluate(model, weights, images, labels)["loss"]
    for number in range(1, 9):
        batches = batch_positions(64, training, 0, number, 0)
        result = local_update(model, weights, images, labels, batches, training)
        weights = {name: tensor + result.update[name] for name, tensor in weights.items()}
    end = evaluate(model, weights, images, labels)
    assert end["loss"] < 0.5 * start
    assert end["accuracy"] > 0.9


def test_frozen_batchnorm_uses_what_was_sent_and_keeps_it() -> None:
    model = WithBatchNorm()
    weights = state_of(model)
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 2
    training = TrainingConfig(batch_size=6, batch_norm="eval")
    sent = local_update(WithBatchNorm(), weights, images, labels, [np.arange(6)], training)
    assert sent.buffers
    assert all(torch.equal(sent.buffers[name], weights[name]) for name in sent.buffers)
    model.load_state_dict(weights)
    loss = torch.nn.functional.cross_entropy(model.eval()(images), labels)
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    for ours, theirs in zip(sent.update.values(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
