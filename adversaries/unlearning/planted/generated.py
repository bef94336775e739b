"""Samples that a generator draws for a class, trained on and then forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as judged
from torch.nn.functional import one_hot

from adversaries.seats import ClientView
from adversaries.unlearning.planted.base import Planted

_NOISE = 32


@dataclass
class Generated(Planted):
    """Trains on samples that a conditional GAN draws from noise and a label, and has them forgotten.

    The GAN is trained on its own samples, ``min max E log D(x | y) + log(1 - D(G(z, y) | y))`` (the generator by
    the non-saturating loss), both perceptrons of one hidden layer. Training poison of the published attack on
    L-CODEC; its boundary samples are attack 'unlearn-boundary'.

    Parameters
    ----------
    width : int
        Of the hidden layers.
    steps : int
        Of the training, on 64 samples each.

    References
    ----------
    Mirza, Osindero, "Conditional Generative Adversarial Nets", arXiv:1411.1784, 2014.
    """

    reason: ClassVar[str] = "generated samples"

    width: Annotated[int, Field(ge=1)] = 256
    steps: Annotated[int, Field(ge=1)] = 2000

    def make(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Generated samples with the labels that were asked for, those of random samples of its own."""
        classes = view.scenario.model.resolved[2]
        generator = torch.Generator().manual_seed(view.seed)
        chosen = torch.randperm(len(labels), generator=generator)[: view.requests]
        size = images[0].numel()
        draw = self._net(_NOISE + classes, size, generator)
        judge = self._net(size + classes, 1, generator)
        moves = [torch.optim.Adam(one.parameters(), 5e-4, betas=(0.5, 0.999)) for one in (judge, draw)]

        def drawn(y: Tensor) -> Tensor:
            z = torch.randn(len(y), _NOISE, generator=generator)
            return draw(torch.cat([z, y], 1)).sigmoid()

        for _ in range(self.steps):
            batch = torch.randint(len(labels), (64,), generator=generator)
            x, y = images[batch].flatten(1), one_hot(labels[batch], classes).float()
            made = drawn(y)
            told = judge(torch.cat([torch.cat([x, made.detach()]), y.repeat(2, 1)], 1))[:, 0]
            truth = torch.cat([torch.ones(64), torch.zeros(64)])
            moves[0].zero_grad()
            judged(told, truth).backward()
            moves[0].step()
            moves[1].zero_grad()
            judged(judge(torch.cat([made, y], 1))[:, 0], torch.ones(64)).backward()
            moves[1].step()
        with torch.no_grad():
            found = drawn(one_hot(labels[chosen], classes).float())
        return found.reshape(images[chosen].shape), labels[chosen], chosen

    def _net(self, inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
        """A perceptron, drawn from the client's own stream."""
        net = nn.Sequential(nn.Linear(inputs, self.width), nn.LeakyReLU(0.2), nn.Linear(self.width, outputs))
        with torch.no_grad():
            for parameter in net.parameters():
                bound = (
                    inputs if parameter is net[0].weight or parameter is net[0].bias else self.width
                ) ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
        return net
