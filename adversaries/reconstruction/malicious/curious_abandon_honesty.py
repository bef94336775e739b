"""Curious abandon honesty: trap weights in the first linear layer, each neuron waiting for one image of the batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adversaries.inversion.evidence.first_layer import first_layer, for_inputs, for_pixels, is_complete
from adversaries.needs import Facts, Needs
from adversaries.reconstruction.malicious.base import UNKNOWN_BATCH, Reading, ReplayedClient, RowReading
from fedattack.config import Strength
from fedattack.errors import NotApplicable
from fedattack.observation import Auxiliary, Candidates, Scenario
from fedattack.rng import torch_rng

_WOKEN = 3
"""Images that wake a neuron on average where they are peeled: neurons that wake for one alone leave images out."""

_BLIND = 0.95
"""The factor s without public images."""

_IMAGES = 2048


@dataclass
class CuriousAbandonHonesty(RowReading):
    """CAH: a malicious server draws first-layer weights that few images activate, and reads those that come alone.

    Half of each neuron's weights, at random places, are negative draws of a half-normal, the other half the same
    numbers times -s: with s below 1 the sum over an image is mostly negative, and a ReLU neuron sleeps for most
    images. One that a single image of the batch woke holds that image times a number that its bias holds (Boenisch
    et al. 2023). Beyond the paper, images are peeled and labelled as by :class:`~.imprint.Imprint`.

    Exact for one gradient, approximate for several local steps, and under top-k as far as the rows survive.

    Parameters
    ----------
    shrink : float, optional
        The factor s, the same for all neurons as published. None: for each neuron the one with which three public
        images in `training.batch_size` wake it (one without peeling and under top-k); 0.95 without public images.
    peel : bool
        False: as published, only neurons that one image woke.
    scale : float
        Deviation of the normal that weights are drawn from. Behind a ReLU it changes the gradient's size against
        other layers', and how much several local steps turn the neurons.

    References
    ----------
    Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov, Papernot, "When the Curious Abandon Honesty: Federated
    Learning Is Not Private", EuroS&P 2023.
    """

    name: ClassVar[str] = "cah"
    needs: ClassVar[Needs] = dataclasses.replace(RowReading.needs, activations=("relu",), helped=True)

    shrink: Annotated[float, Field(gt=0, le=1)] | None = None
    peel: bool = True
    scale: Strength = 0.05

    def needs_now(self, scenario: Scenario) -> Needs:
        """A neuron must sleep for images it does not wait for: ReLU, which model imprint's block has of its own."""
        own = scenario.model.name == "imprint"
        return dataclasses.replace(self.needs, activations=()) if own else self.needs

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse a block of bins that never sleeps."""
        if scenario.model.name == "imprint-sparse":
            raise NotApplicable(
                "model.name = 'imprint-sparse': a neuron must sleep for images it does not wait for, as ReLU's do; "
                "use --model mlp --activation relu, or --model imprint"
            )

    def arm(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        seed: int,
        auxiliary: Auxiliary | None,
        candidates: Candidates | None = None,
        turn: int = 0,
    ) -> dict[str, Tensor]:
        """The global model with trap weights, and zero biases, in the first layer."""
        layer = first_layer(scenario.model)
        generator = torch_rng(seed, "cah.arm")
        neurons, pixels = weights[layer.weight].shape
        half = pixels // 2
        drawn = torch.randn(neurons, half, generator=generator, dtype=torch.float64).abs() * self.scale
        places = torch.rand(neurons, pixels, generator=generator).argsort(1)
        mixed = torch.gather(drawn, 1, torch.rand(neurons, half, generator=generator).argsort(1))
        negative = torch.zeros(neurons, pixels, dtype=torch.float64).scatter(1, places[:, :half], -drawn)
        positive = torch.zeros(neurons, pixels, dtype=torch.float64)
        positive.scatter_(1, places[:, half : 2 * half], mixed)
        factors = torch.full((neurons,), self.shrink or _BLIND, dtype=torch.float64)
        if self.shrink is None and auxiliary is not None and len(auxiliary) > 1:
            images = auxiliary.images[:_IMAGES].double().flatten(1).cpu()
            # A neuron wakes where s exceeds this ratio.
            ratios = -(images @ negative.T) / (images @ positive.T).clamp_min(1e-9)
            woken = _WOKEN if self.peel and is_complete(scenario) else 1
            share = woken / (scenario.training.batch_size or UNKNOWN_BATCH)
            factors = torch.quantile(ratios, min(share, 0.5), dim=0)
        sent = dict(weights)
        traps = negative + factors[:, None] * positive
        wide, bias = for_inputs(scenario.model, traps, torch.zeros(neurons, dtype=torch.float64))
        sent[layer.weight], sent[layer.bias] = wide.to(weights[layer.weight]), bias.to(weights[layer.bias])
        return sent

    def _reading(self, client: ReplayedClient) -> Reading:
        wide, bias = for_pixels(client.observation.scenario.model, client.weight, client.bias)
        rounding = 1e-5 * wide.norm(dim=1).max()
        if (
            float(bias.abs().max()) > rounding
            or float((wide < 0).double().mean(1).sub(0.5).abs().max()) > 0.05
        ):
            raise NotApplicable(
                "the first layer that was sent holds no trap weights (an honest server's); let the server send the "
                "attack's weights (attack.names with 'cah' arms the rounds in attack.rounds)"
            )
        return Reading(sweeps=None if self.peel else 1)
