"""Images from a hidden layer's inputs: exact behind smooth networks, near behind trained ones, and refusals."""

from __future__ import annotations

import math
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adversaries.inversion.evidence.whitening import whitening
from adversaries.inversion.matching import features
from adversaries.inversion.matching.below import Below
from adversaries.inversion.matching.features import LayerInputs, invert_features
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.data.cifar import load_batch
from fedattack.errors import NotApplicable
from fedattack.metrics import psnr
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import Auxiliary, Observation, Scenario, Update
from fedattack.training import local_update

CPU = torch.device("cpu")


def read(
    weights: dict[str, torch.Tensor],
    model: ModelConfig,
    layer: str,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> LayerInputs:
    """What the layer was given and its part of the mean loss's derivative, of the true batch, perturbed by 1e-6."""
    module = build_model(model).double().eval()
    module.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    seen = {}
    module.get_submodule(layer).register_forward_hook(
        lambda part, given, out: seen.update(z=given[0], out=out)
    )
    loss = F.cross_entropy(module(images.double()), labels)
    (back,) = torch.autograd.grad(loss, seen["out"])
    noise = torch.randn(seen["z"].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return LayerInputs(layer, seen["z"].detach() * (1 + 1e-6 * noise), back)


def observe(
    model: ModelConfig,
    weights: dict[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    public: torch.Tensor | None = None,
    sent: float = 1.0,
) -> Observation:
    """One gradient; of the entries only the share `sent`, drawn at random."""
    training = TrainingConfig(batch_size=len(images))
    everything = [np.arange(len(images))]
    found = local_update(build_model(model), weights, images, labels, everything, training).update
    values, indices = torch.cat([tensor.flatten() for tensor in found.values()]), None
    if sent < 1:
        indices = torch.nonzero(torch.rand(len(values), generator=torch.Generator().manual_seed(4)) < sent)[
            :, 0
        ]
        values = values[indices]
    update = Update(tuple(found), tuple(tuple(t.shape) for t in found.values()), indices, values)
    scenario = Scenario(model, training, CompressionConfig(name="none"))
    return Observation(
        1, 0, scenario, weights, update, len(images), auxiliary=None if public is None else Auxiliary(public)
    )


def images_of(count: int, shape: tuple[int, int, int], seed: int = 1) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.2


def prior_of(observation: Observation) -> object:
    return whitening(observation.auxiliary, observation.scenario.image_shape, CPU, torch.float32)


class TestBelow:
    @pytest.mark.parametrize(("name", "layer"), [("cnn-mcmahan", "body.7"), ("cnn-flower", "body.7")])
    def test_leaves_out_the_last_relu_behind_which_only_pooling_stands(self, name: str, layer: str) -> None:
        model = resolve(ModelConfig(name=name), 3, 16, 10)
        weights = initial_weights(model, 0)
        images = images_of(3, (3, 16, 16))
        below = Below(
            Scenario(model, TrainingConfig(), CompressionConfig(name="none")), layer, CPU, torch.float32
        )
        truth = read(weights, model, layer, images, torch.zeros(3, dtype=torch.int64)).features
        assert below.rectified
        assert (below.values(images, weights) < 0).any()
        assert torch.allclose(below.inputs(images, weights).double(), truth, atol=1e-5)

    def test_keeps_what_another_layer_follows(self) -> None:
        model = resolve(ModelConfig(name="cnn-mcmahan", width=32), 1, 8, 4)
        scenario = Scenario(model, TrainingConfig(), CompressionConfig(name="none"))
        assert not Below(scenario, "body.0", CPU, torch.float32).rectified

    def test_normalisation_by_the_batch_is_refused(self) -> None:
        model = resolve(ModelConfig(name="resnet20"), 3, 16, 4)
        training = TrainingConfig(batch_norm="train")
        with pytest.raises(NotApplicable, match="batch_norm"):
            Below(Scenario(model, training, CompressionConfig(name="none")), "head", CPU, torch.float32)


def test_smooth_networks_give_their_images_back(monkeypatch) -> None:
    """As many features as pixels and no kink: least squares alone."""
    monkeypatch.setattr(features, "JOINT_STEPS", 0)
    monkeypatch.setattr(features, "STEPS", 4)
    model = resolve(ModelConfig(name="tiny-cnn", activation="sigmoid"), 1, 8, 4)
    weights, images, labels = initial_weights(model, 0), images_of(2, (1, 8, 8)), torch.tensor([0, 1])
    observation = observe(model, weights, images, labels)
    given = read(weights, model, "head", images, labels)
    answer = invert_features(observation, given, prior_of(observation), labels, 0, CPU)
    assert answer.images.shape == images.shape
    assert answer.misfit.max() < 1e-2
    assert psnr(answer.images.float(), images).min() > 20


def test_no_entry_below_the_layer_leaves_nothing_to_compare() -> None:
    model = resolve(ModelConfig(name="mlp", width=32), 1, 4, 3)
    weights, images, labels = initial_weights(model, 0), images_of(2, (1, 4, 4)), torch.tensor([0, 1])
    observation = observe(model, weights, images, labels)
    given = read(weights, model, "1", images, labels)
    answer = invert_features(observation, given, prior_of(observation), labels, 0, CPU)
    assert math.isinf(answer.residual)
    assert psnr(answer.images.float(), images).min() > 50


def test_answers_repeat(monkeypatch) -> None:
    monkeypatch.setattr(features, "JOINT_STEPS", 1)
    monkeypatch.setattr(features, "STEPS", 2)
    model = resolve(ModelConfig(name="tiny-cnn"), 1, 8, 3)
    weights, images, labels = initial_weights(model, 0), images_of(2, (1, 8, 8)), torch.tensor([0, 1])
    observation = observe(model, weights, images, labels, sent=0.5)
    given = read(weights, model, "head", images, labels)
    first, second = (
        invert_features(observation, given, prior_of(observation), labels, 0, CPU) for _ in range(2)
    )
    assert torch.equal(first.images, second.images)
    assert math.isfinite(first.residual)


def test_true_images_lead_to_the_weights_of_each_step() -> None:
    model = resolve(ModelConfig(name="tiny-cnn"), 1, 8, 3)
    weights, images, labels = initial_weights(model, 0), images_of(6, (1, 8, 8)), torch.arange(6) % 3
    training = TrainingConfig(
        protocol="fedavg", local_steps=3, batch_size=2, learning_rate=0.05, momentum=0.5
    )
    batches = [np.arange(2 * step, 2 * step + 2) for step in range(3)]

    def update_after(steps: int) -> dict[str, torch.Tensor]:
        shorter = training.model_copy(update={"local_steps": steps})
        return local_update(build_model(model), weights, images, labels, batches[:steps], shorter).update

    sent = update_after(3)
    values = torch.cat([tensor.flatten() for tensor in sent.values()])
    update = Update(tuple(sent), tuple(tuple(t.shape) for t in sent.values()), None, values, "delta")
    scenario = Scenario(model, training, CompressionConfig(name="none"))
    observation = Observation(1, 0, scenario, weights, update, 6)
    path = features._simulated(observation, images.double(), labels, torch.arange(6) // 2, 3)
    for step in (1, 2):
        for name, change in update_after(step).items():
            assert torch.allclose(path[step][name], (weights[name] + change).double(), atol=1e-6)


@pytest.mark.slow
def test_a_briefly_trained_network_of_mcmahan_gives_its_images_near(shared_dir) -> None:
    """CIFAR-10: trained for a few steps on some images, then one gradient of four others."""
    with tarfile.open(shared_dir / "data" / "CIFAR10" / "cifar-10-subset-python.tar.xz") as archive:
        names = sorted(member.name for member in archive.getmembers() if "_batch" in member.name)
        batches = [load_batch(archive.extractfile(name).read(), name) for name in names]
    images = torch.from_numpy(np.concatenate([np.array(batch["data"]) for batch in batches]))
    images = images.view(-1, 3, 32, 32).float() / 255
    labels = torch.cat([torch.tensor(batch["labels"]) for batch in batches])
    model = resolve(ModelConfig(name="cnn-mcmahan"), 3, 32, 10)
    weights = initial_weights(model, 0)
    training = TrainingConfig(protocol="fedavg", local_steps=15, batch_size=16, learning_rate=0.05)
    steps = [np.arange(16 * step, 16 * step + 16) for step in range(15)]
    trained = local_update(build_model(model), weights, images, labels, steps, training).update
    weights = {name: weights[name] + trained[name] for name in weights}
    victims, own, public = images[1000:1004], labels[1000:1004], images[1500:]
    observation = observe(model, weights, victims, own, public)
    given = read(weights, model, "body.7", victims, own)
    answer = invert_features(observation, given, prior_of(observation), own, 0, CPU, turns=4)
    floor = psnr(public.mean(0).expand_as(victims), victims).mean()
    found = psnr(answer.images.float().clamp(0, 1), victims)
    assert found.mean() > 26
    assert found.min() > 24
    assert found.mean() > floor + 10
    assert answer.misfit.max() < 0.1
