"""SPEAR on hidden layers and over local steps: inputs of the layer against the truth, steps, refusals."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adversaries.inversion.evidence.layers.hidden_layer import hidden_layers, layer_named
from adversaries.needs import Facts
from adversaries.reconstruction.algebra.spear import Read, Spear, _silenced
from adversaries.refusals import attack_refusals
from fedattack.config import CompressionConfig, DefenseConfig, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.metrics import match, psnr
from fedattack.models import build_model, initial_weights, resolve
from fedattack.models.live import held
from fedattack.observation import Observation, Scenario, Update
from fedattack.training import batch_positions, local_update

CPU = torch.device("cpu")
NONE = CompressionConfig(name="none")
PASS = {"protocol": "fedavg", "local_steps": 3, "batch_size": 2, "learning_rate": 0.05}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observe(
    model: ModelConfig,
    weights: dict[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    training: TrainingConfig,
    compression: CompressionConfig = NONE,
) -> tuple[Observation, list[np.ndarray]]:
    """One client's real update, and its batches."""
    batches = batch_positions(len(images), training, 0, 1, 0)
    sent = local_update(build_model(model), weights, images, labels, batches, training).update
    values = torch.cat([tensor.flatten() for tensor in sent.values()])
    shapes = tuple(tuple(tensor.shape) for tensor in sent.values())
    update = Update(
        tuple(sent), shapes, None, values, "gradient" if training.protocol == "fedsgd" else "delta"
    )
    scenario = Scenario(model, training, compression)
    return Observation(1, 0, scenario, weights, update, len(images)), batches


def truth(
    observation: Observation,
    images: torch.Tensor,
    labels: torch.Tensor,
    batches: list[np.ndarray],
    layer: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's inputs of a layer at its own step's weights, and its step."""
    module, training = build_model(observation.scenario.model), observation.scenario.training
    module.load_state_dict(observation.weights)
    module = module.double()
    inputs = torch.zeros(len(images), module.get_submodule(layer).in_features, dtype=torch.float64)
    steps = torch.zeros(len(images), dtype=torch.int64)
    seen: list[torch.Tensor] = []
    module.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    rule = torch.optim.SGD(module.parameters(), training.learning_rate, momentum=training.momentum)
    for step, batch in enumerate(torch.from_numpy(positions) for positions in batches):
        rule.zero_grad()
        F.cross_entropy(module(images[batch].double()), labels[batch]).backward()
        rule.step()
        inputs[batch], steps[batch] = seen[-1], step
    return inputs, steps


def scored(
    read: Read, inputs: torch.Tensor, labels: torch.Tensor, steps: torch.Tensor
) -> tuple[list[float], int, int]:
    """Relative error of each sample's inputs at the nearest answer; right labels, right steps."""
    distance = torch.cdist(inputs, read.inputs)
    found = distance.argmin(1)
    assert len(set(found.tolist())) == len(inputs)
    errors = distance.min(1).values / inputs.norm(dim=1)
    right = (read.steps.labels[found] == labels).sum(), (read.steps.steps[found] == steps).sum()
    return errors.tolist(), int(right[0]), int(right[1])


def wrongly_active(read: Read, inputs: torch.Tensor) -> tuple[int, float]:
    """Inputs that are zero and are taken for more; share of the others that are taken for zero."""
    found = read.inputs[torch.cdist(inputs, read.inputs).argmin(1)]
    on = _silenced(read.layer, found) > 0
    return int((on & (inputs == 0)).sum()), float((~on & (inputs > 0)).sum() / (inputs > 0).sum())


def pictures(count: int, size: int, channels: int = 1, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    coarse = torch.rand(count, channels, 4, 4, generator=generator(seed))
    images = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1)
    return images, torch.randint(0, 10, (count,), generator=generator(seed + 1))


class Functional(nn.Module):
    """Two linear layers, the activation a function, between what hands tensors on."""

    def __init__(self, activation, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.low = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 64, bias=bias)
        self.high, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.dropout, self.same, self.activation = nn.Dropout(), nn.Identity(), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.conv(x)).flatten(1)
        x = self.activation(self.same(self.dropout(self.low(x))))
        return self.head(F.relu(self.high(x).view(-1, 32)))


@pytest.mark.parametrize(
    ("activation", "bias", "layers", "why"),
    [
        (F.relu, True, ["low", "high"], ""),
        (torch.relu_, True, ["low", "high"], ""),
        (F.leaky_relu, True, ["high"], "leaky ReLU, which is zero for no neuron"),
        (F.gelu, True, ["high"], "GELU, whose slope is zero for no neuron"),
        (torch.tanh, True, ["high"], "followed by tanh"),
        (F.relu, False, ["high"], "no bias"),
    ],
)
def test_layers_before_a_relu_are_found_and_others_named(activation, bias, layers, why) -> None:
    with held(Functional(activation, bias)) as name:
        model = resolve(ModelConfig(name=name), 1, 8, 10)
        found = hidden_layers(model)
        assert [layer.name for layer in found] == layers
        assert (found[-1].neurons, found[-1].inputs, found[-1].pixels) == (32, 64, False)
        assert found[-1].positive == (activation in (F.relu, torch.relu_))
        with pytest.raises(NotApplicable, match="'head': it is followed by nothing; accepted: auto"):
            layer_named(model, "head")
        with pytest.raises(ConfigError, match=r"'spear\.layer' = 'conv'.*accepted: auto, "):
            layer_named(model, "conv")
        if why:
            with pytest.raises(NotApplicable, match=why):
                layer_named(model, "low")


def test_frozen_and_summed_layers_are_refused() -> None:
    class Summed(Functional):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.low(F.relu(self.conv(x)).flatten(1)))
            high = self.high(x)
            return self.head(torch.cat([F.relu(high), high], 1)[:, :32])

    module = Summed(F.relu)
    module.low.requires_grad_(False)
    with held(module) as name:
        model = resolve(ModelConfig(name=name), 1, 8, 10)
        with pytest.raises(NotApplicable, match=r"'low' is frozen.*'high' is followed by cat"):
            hidden_layers(model)


@pytest.mark.parametrize("layer", ["auto", "body.7"])
def test_inputs_of_a_hidden_layer_are_exact_with_labels(layer: str) -> None:
    model = resolve(ModelConfig(name="cnn-mcmahan", width=128), 1, 8, 10)
    images, labels = pictures(6, 8)
    given, batches = observe(model, initial_weights(model, 0), images, labels, TrainingConfig(batch_size=6))
    read = Spear(layer=layer).read(given, 0, CPU)
    inputs, _ = truth(given, images, labels, batches, "body.7")
    errors, right, _ = scored(read, inputs, labels, torch.zeros(6))
    assert max(errors) < 1e-5
    wrong, lost = wrongly_active(read, inputs)
    assert wrong == 0
    assert lost < 1e-3
    assert right == 6
    assert read.residual < 1e-5
    assert read.steps.misfit.max() < 1e-5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_local_steps_of_one_pass_are_told_apart_and_certified(momentum: float) -> None:
    """On the pixels each image is its own input whatever the weights, and the whole delta is replayed."""
    model = resolve(ModelConfig(name="mlp", width=128), 1, 8, 10)
    images, labels = pictures(6, 8)
    training = TrainingConfig.model_validate(PASS | {"momentum": momentum})
    given, batches = observe(model, initial_weights(model, 1), images, labels, training)
    answer = Spear().run([given], 0, CPU)[0]
    order = list(match(answer.images, images).order)
    assert psnr(answer.images[order], images).min() > 80
    assert torch.equal(answer.labels[order], labels)
    steps = truth(given, images, labels, batches, "1")[1]
    assert [answer.details["steps"][place] for place in order] == steps.tolist()
    assert answer.details["status"] == "certified"


def test_refusals_before_anything_starts() -> None:
    model = resolve(ModelConfig(name="cnn-mcmahan", width=128), 1, 8, 10)
    scene = Scenario(model, TrainingConfig(batch_size=4), NONE)

    def refused(part: str, samples: tuple[int, ...] = (), **changed) -> None:
        found = attack_refusals(Spear(), dataclasses.replace(scene, **changed), Facts(samples=samples))
        assert re.search(part, found[0])

    steps = TrainingConfig.model_validate(PASS)
    refused("seen again at other weights", (4,), training=steps)
    refused("seen again", (6,), training=steps.model_copy(update={"local_epochs": 2, "local_steps": 1}))
    refused("seen again", training=steps.model_copy(update={"batch_size": 0}))
    refused("weight_decay", training=steps.model_copy(update={"weight_decay": 0.1}))
    refused("128 < 130: too few neurons", training=TrainingConfig(batch_size=65))
    for rate in (0.1, 0.01):
        refused("every one is needed", compression=CompressionConfig(name="topk", rate=rate))
    Spear().probe(dataclasses.replace(scene, training=steps), Facts(samples=(5, 6)))


def test_a_dead_layer_says_so() -> None:
    model = resolve(ModelConfig(name="cnn-mcmahan", width=64), 1, 8, 10)
    weights = initial_weights(model, 0)
    weights["body.7.bias"] -= 100
    given, _ = observe(model, weights, *pictures(3, 8), TrainingConfig(batch_size=3))
    answer = Spear().run([given], 0, CPU)[0]
    assert answer.details["status"] == "failed"
    assert "'body.7' is zero or not finite" in answer.details["reason"]


@pytest.fixture(scope="module")
def trained(shared_dir) -> tuple[ModelConfig, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """McMahan's CNN, trained on 160 CIFAR-10 images in 10 federated rounds, and images it has not seen."""
    from fedattack.config import Config
    from fedattack.data import build_world

    settings = {"dataset": "cifar10", "data-dir": str(shared_dir / "data" / "CIFAR10"), "limit": "400"}
    world = build_world(Config.from_mapping(settings))
    images, labels = world.dataset.tensors(np.arange(400))
    model = resolve(ModelConfig(name="cnn-mcmahan"), 3, 32, 10)
    weights, module = initial_weights(model, 0), build_model(model)
    training = TrainingConfig(protocol="fedavg", local_steps=5, batch_size=16, learning_rate=0.05)
    for round in range(1, 11):
        sums: dict[str, torch.Tensor] = {}
        for client in range(10):
            own = slice(16 * client, 16 * client + 16)
            batches = batch_positions(16, training, 0, round, client)
            sent = local_update(module, weights, images[own], labels[own], batches, training).update
            sums = {name: sums.get(name, 0) + tensor / 10 for name, tensor in sent.items()}
        weights = {name: tensor + sums[name] for name, tensor in weights.items()}
    return model, weights, images[160:], labels[160:]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "steps"), [(16, 1), (24, 1), (48, 1), (15, 5)])
def test_trained_networks_give_the_inputs_of_every_sample(trained, count: int, steps: int) -> None:
    model, weights, images, labels = trained
    images, labels = images[:count], labels[:count]
    training = TrainingConfig(batch_size=count)
    if steps > 1:
        settings = {
            "protocol": "fedavg",
            "local_steps": steps,
            "batch_size": count // steps,
            "learning_rate": 0.01,
        }
        training = TrainingConfig.model_validate(settings)
    given, batches = observe(model, weights, images, labels, training)
    read = Spear().read(given, 0, CPU)
    inputs, when = truth(given, images, labels, batches, "body.7")
    errors, right, in_step = scored(read, inputs, labels, when)
    assert max(errors) < (1e-5 if steps == 1 else 1e-4)
    assert (right, in_step) == (count, count)
    assert read.followed
    wrong, lost = wrongly_active(read, inputs)
    assert wrong == 0
    assert lost < (1e-3 if steps == 1 else 1e-2)


def test_sums_of_several_local_steps_are_refused_before_the_run() -> None:
    model = resolve(ModelConfig(name="cnn-mcmahan", width=32), 1, 8, 4)
    hidden = DefenseConfig(names=("secure-aggregation",))
    facts = Facts(samples=(6,), clients=2, drawn=2)
    several = Scenario(model, TrainingConfig(**PASS), NONE, hidden)
    assert "from weights of its own" in attack_refusals(Spear(), several, facts)[0]
    one = Scenario(model, TrainingConfig(batch_size=2), NONE, hidden)
    assert not attack_refusals(Spear(), one, facts)
