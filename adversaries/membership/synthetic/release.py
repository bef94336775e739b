"""What an attacker of synthetic data has before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from adversaries.membership.synthetic.neighbours import nearest
from fedattack.errors import NotApplicable
from fedattack.generative.nets import Gan
from fedattack.models import build_model, initial_weights
from fedattack.observation import Scenario
from fedattack.rng import adversary_seed, torch_rng
from fedattack.training import load_weights, train_alone


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

    def start(self, images: Tensor) -> tuple[nn.Module, Tensor]:
        """The generator, and the latent of the synthetic image nearest to each of `images`, where these are."""
        assert self.generator is not None
        assert self.latents is not None
        places = nearest(self.images, images, 1, images.device)[1][:, 0]
        return self.generator, self.latents[places].to(images.device)

    def check(self, images: Tensor, name: str = "candidates") -> None:
        """NotApplicable where `images` are not of the size and the scale of the release's, or either are broken."""
        known = {"synthetic images": self.images, name: images}
        if self.public is not None:
            known["public images"] = self.public
        if self.reference is not None:
            known["reference images"] = self.reference.images
        for what, some in known.items():
            if some.dim() != 4 or not len(some):
                raise NotApplicable(
                    f"{what}: shape {tuple(some.shape)}; accepted: (count, channels, height, width), at least one"
                )
            if not bool(some.isfinite().all()):
                raise NotApplicable(f"{what}: pixels hold NaN or infinite values")
            low, high = float(some.min()), float(some.max())
            if low < 0 or high > 1:
                raise NotApplicable(
                    f"{what}: pixels from {low:g} to {high:g}; accepted: 0 to 1, as all images are"
                )
            if some.shape[1:] != self.images.shape[1:]:
                (c, h, w), (cs, hs, ws) = some.shape[1:], self.images.shape[1:]
                raise NotApplicable(
                    f"{what}: {c} x {h} x {w} (channels, height, width), and synthetic images {cs} x {hs} x {ws}; "
                    "bring all to one size"
                )
        brightest = {what: float(some.max()) for what, some in known.items()}
        dark, bright = min(brightest, key=brightest.__getitem__), max(brightest.values())
        if 0 < brightest[dark] < bright / _DARKER:
            raise NotApplicable(
                f"{dark}: no pixel above {brightest[dark]:g}, and elsewhere up to {bright:g}: another scale; bring "
                "all to 0 to 1"
            )


_DARKER = 100
"""Times darker than others that images are of another scale (0 to 1 was divided by 255 once more)."""


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
    model = build_model(scenario.model).to(device)
    start = initial_weights(scenario.model, adversary_seed(seed, "weights"))
    labels = torch.zeros(len(images), dtype=torch.int64)
    found = train_alone(model, start, images, labels, scenario, rounds, seed)
    return {name: tensor.cpu() for name, tensor in found.items()}


def reference_weights(
    public: Tensor | None, scenario: Scenario, rounds: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Weights of a reference generator; NotApplicable without public images."""
    if public is None or not len(public):
        raise NotApplicable("calibrated: no public images are granted; raise setting 'data.auxiliary_size'")
    return trained_on(public, scenario, rounds, adversary_seed(seed, "reference generator"), device)


@dataclass
class Releases:
    """What attacks see of one generator: its images are drawn, and a reference generator is trained, once for all.

    `weights` are its nets' state dict, `rounds` those of the federation that trained it, `public` the adversary's own
    images; `seed` is the adversary's.
    """

    scenario: Scenario
    weights: Mapping[str, Tensor]
    public: Tensor | None
    rounds: int
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self._drawn: dict[tuple[int, bool], Release] = {}

    def of(self, count: int, calibrated: bool) -> Release:
        """`count` images; with `calibrated` as many of the reference generator (NotApplicable: no public images)."""
        if (count, calibrated) not in self._drawn:
            if calibrated:
                seed = adversary_seed(self.seed, "reference images")
                reference = released(self.scenario, self._reference, count, seed, self.device)
                found = replace(self.of(count, False), reference=replace(reference, public=self.public))
            else:
                found = released(self.scenario, self.weights, count, self.seed, self.device)
                found = replace(found, public=self.public)
            self._drawn[count, calibrated] = found
        return self._drawn[count, calibrated]

    @cached_property
    def _reference(self) -> dict[str, Tensor]:
        """Weights of the reference generator."""
        return reference_weights(self.public, self.scenario, self.rounds, self.seed, self.device)
