"""What an attacker of synthetic data has before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedattack.errors import NotApplicable
from fedattack.generative.nets import Gan
from fedattack.models import build_model, initial_weights
from fedattack.observation import Scenario
from fedattack.rng import adversary_seed, torch_rng
from fedattack.task import task_of
from fedattack.training import batch_positions, load_weights


@dataclass(frozen=True)
class Release:
    """Images of a generator, float32 (M, C, H, W) in [0, 1], and what else of it is known; None: nothing.

    Attributes
    ----------
    latents : Tensor or None
        (M, latent), from which the images were made.
    generator, critic : nn.Module or None
        Latents to images in [0, 1], and images to scores (n, 1), in evaluation mode.
    public : Tensor or None
        Real images of the same kind, (P, C, H, W), that nobody trained on: the adversary's own.
    reference : Release or None
        Of a generator that the adversary trained on its public images.
    """

    images: Tensor
    latents: Tensor | None = None
    generator: nn.Module | None = None
    critic: nn.Module | None = None
    public: Tensor | None = None
    reference: Release | None = None


@torch.no_grad()
def released(
    scenario: Scenario, weights: Mapping[str, Tensor], count: int, seed: int, device: torch.device
) -> Release:
    """`count` images of the generator of `weights`, and both nets where both were sent."""
    model = build_model(scenario.model).to(device)
    assert isinstance(model, Gan)
    load_weights(model, weights)
    model.eval().requires_grad_(False)
    latents = torch.randn(count, model.latent, generator=torch_rng(seed, "release"))
    parts = [model.generator(some.to(device)).cpu() for some in latents.split(512)]
    critic = model.critic if scenario.gan.share == "both" else None
    return Release(torch.cat(parts), latents, model.generator, critic)


def trained_on(
    images: Tensor, scenario: Scenario, rounds: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Weights of nets trained on `images` as a federation of one client trains for so many rounds."""
    task, kept = task_of(scenario), dict[str, Tensor]()
    model = build_model(scenario.model).to(device)
    weights = initial_weights(scenario.model, adversary_seed(seed, "weights"))
    labels = torch.zeros(len(images), dtype=torch.int64)
    for number in range(1, rounds + 1):
        batches = batch_positions(len(images), scenario.training, seed, number, 0)
        draws = torch_rng(seed, "training", number)
        step = task.step(scenario, draws)
        found = task.train(model, weights, images, labels, batches, scenario, step, draws, kept)
        weights = weights | {name: weights[name] + change.cpu() for name, change in found.update.items()}
        kept = found.memory
    return weights


def with_reference(
    release: Release, scenario: Scenario, rounds: int, seed: int, device: torch.device
) -> Release:
    """The release with as many images of a reference generator; NotApplicable without public images."""
    public = release.public
    if public is None or not len(public):
        raise NotApplicable("calibrated: no public images are granted; raise setting 'data.auxiliary_size'")
    seed = adversary_seed(seed, "reference generator")
    weights = trained_on(public, scenario, rounds, seed, device)
    return replace(release, reference=released(scenario, weights, len(release.images), seed, device))
