"""Fishing's head and the samples it isolates: read from a gradient, and made a batch of their own."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.evidence.first_layer import dense_layer, first_layer
from adversaries.inversion.evidence.head import head_of
from adversaries.inversion.evidence.priors import smooth_prior
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.models.normalise import pixels
from fedattack.observation import Auxiliary, Observation, Scenario, Update

SATURATED = 1e3
"""Logits apart, at which a softmax is 0 or 1."""

_IMAGES = 2048


@dataclass(frozen=True)
class Isolated:
    """What the armed head tells: its name, and of its only row that is not zero, `target`, what that let through.

    `count` samples, with residual `sign` (-1 for samples of the class, 1 for others) and mean `features`, float32
    (F,).
    """

    head: str
    target: int
    count: float
    sign: float
    features: Tensor


def name_of_head(scenario: Scenario) -> str:
    """Name of the last linear layer, which must have a bias, whose gradient counts the samples."""
    return head_of(scenario.model).weight.removesuffix(".weight")


def is_readable(scenario: Scenario) -> bool:
    """Whether a single image can be read off the first layer."""
    try:
        return first_layer(scenario.model).biased
    except NotApplicable:
        return False


def lone_scenario(scenario: Scenario, count: int) -> Scenario:
    """The scenario in which `count` samples alone send one complete gradient."""
    training = scenario.training.model_copy(
        update={"protocol": "fedsgd", "batch_size": count, "local_steps": 1, "local_epochs": None}
    )
    return dataclasses.replace(
        scenario, training=training, compression=scenario.compression.model_copy(update={"name": "none"})
    )


def public_images(scenario: Scenario, auxiliary: Auxiliary | None, generator: torch.Generator) -> Tensor:
    """Images to place the threshold by: the public ones, or draws of a smooth prior."""
    if auxiliary is not None and len(auxiliary) > 1:
        return auxiliary.images[:_IMAGES]
    prior = smooth_prior(scenario.image_shape)
    draws = torch.randn(prior.size, 256, generator=generator, dtype=torch.float64)
    images = prior.mean[:, None] + prior.factor() @ draws
    return images.T.reshape(-1, *scenario.image_shape).clamp(0, 1).float()


@torch.no_grad()
def features_of(scenario: Scenario, weights: dict[str, Tensor], head: str, images: Tensor) -> Tensor:
    """What the head sees of images (N, C, H, W), (N, F)."""
    module = build_model(scenario.model).eval()
    module.load_state_dict(weights)
    seen: list[Tensor] = []
    module.get_submodule(head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for part in images.split(256):
        module(part)
    return torch.cat(seen)


def row_of(observation: Observation, head: str) -> int:
    """The only row of the head that is not zero; NotApplicable for a head that is not this attack's."""
    rows = torch.nonzero(observation.weights[f"{head}.weight"].abs().amax(1))[:, 0]
    if len(rows) != 1:
        raise NotApplicable(
            f"the head that was sent has {len(rows)} rows (an honest server's): all samples reach the body; let the "
            "server send the attack's weights (attack.names with 'fishing' arms the rounds in attack.rounds)"
        )
    return int(rows[0])


def read_head(observation: Observation) -> Isolated:
    """Read the armed head's gradient; NotApplicable for a head that is not this attack's."""
    head = name_of_head(observation.scenario)
    target = row_of(observation, head)
    sent = one_gradient.as_gradient(observation).dense()
    signed = observation.num_examples * float(sent[f"{head}.bias"][target])
    sign = 1.0 if signed > 0 else -1.0
    features = observation.num_examples * sent[f"{head}.weight"][target] / (signed or math.inf)
    return Isolated(head, target, abs(signed), sign, features)


def as_whole_batch(observation: Observation, isolated: Isolated, count: int) -> Observation:
    """The observation as if the isolated samples had been the whole batch, under a head with the same residuals.

    The body's gradient is theirs already, but for the batch size in the mean and the steepness of the row. The
    head's is written anew from their features, as other samples are in it too. In the new head the residual is
    constant, so that no search starts on the dark side of the threshold.
    """
    update, head, target = one_gradient.as_gradient(observation), isolated.head, isolated.target
    classes = len(observation.weights[f"{head}.bias"])
    row = observation.weights[f"{head}.weight"]
    steep = float(row[target].norm())
    weights = dict(observation.weights)
    weights[f"{head}.weight"] = row / steep
    bias = torch.zeros(classes)
    bias[target] = isolated.sign * SATURATED
    weights[f"{head}.bias"] = bias
    residual = torch.full((classes,), 1 / (classes - 1)) if isolated.sign < 0 else torch.zeros(classes)
    residual[target] = isolated.sign
    if isolated.sign > 0:
        residual[
            (target + 1) % classes
        ] = -1.0  # which label leaves no trace in the body: any other class will do
    scale = observation.num_examples / (count * steep)
    tensors = {name: tensor * scale for name, tensor in update.dense().items()}
    tensors[f"{head}.weight"] = torch.outer(residual, isolated.features)
    tensors[f"{head}.bias"] = residual
    values = torch.cat([tensors[name].flatten() for name in update.names])
    single = Update(update.names, update.shapes, None, values, "gradient")
    return dataclasses.replace(
        observation,
        scenario=lone_scenario(observation.scenario, count),
        weights=weights,
        update=single,
        num_examples=count,
    )


def read_off(single: Observation) -> Tensor:
    """The image (C, H, W) in a first linear layer's gradient: all rows hold it, weighted by what their bias holds."""
    weight, bias = dense_layer(single.update, first_layer(single.scenario.model))
    assert bias is not None
    image = bias @ weight / bias.square().sum().clamp_min(1e-300)
    read = image.reshape(single.scenario.image_shape)
    return pixels(read, single.scenario.model).clamp(0, 1).float()


def misfit_of(observation: Observation, isolated: Isolated, images: Tensor) -> float:
    """Relative difference between the features of what was found and of what was isolated: the attack's own check."""
    found = features_of(observation.scenario, observation.weights, isolated.head, images).mean(0)
    return float((found - isolated.features).norm() / isolated.features.norm().clamp_min(1e-12))
