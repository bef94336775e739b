"""A variational bottleneck between a model's features and its head (PRECODE)."""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedattack.errors import NotApplicable
from fedattack.models.classifiers.layers import kaiming_uniform


class Headed(Protocol):
    """A model with features below a linear head."""

    head: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, shape (B, head.in_features)."""
        ...


def headed(model: nn.Module, what: str) -> Headed:
    """`model`, if it has ``features(images)`` and a linear ``head``, which `what` needs (else NotApplicable)."""
    if hasattr(model, "features") and isinstance(getattr(model, "head", None), nn.Linear):
        return cast(Headed, model)
    raise NotApplicable(
        f"{what} needs a model with features below a linear head, which {type(model).__name__} is not; use "
        "lenet-zhu, tiny-cnn, a ResNet or two-layer"
    )


class Bottlenecked(nn.Module):
    """Features -> Gaussian code -> features -> head; the code is drawn in training, elsewhere it is its mean.

    Draws come from :attr:`generator` alone, the client's for the duration of its training step. Where that is None,
    as with the server and every adversary, the mean is used in training mode too: what is left to those who do not
    know the client's draws. `beta` is the weight in the loss of the code's divergence from N(0, 1), for whoever
    draws. The code's standard deviation is the softplus of the encoder's second half (Scheliga, Mäder and Seeland,
    PRECODE: A Generic Model Extension to Prevent Deep Gradient Leakage, 2022, section 3).
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        inputs = headed(model, f"setting 'model.bottleneck' = {width}").head.in_features
        self.encoder = nn.Linear(inputs, 2 * width)
        self.decoder = nn.Linear(width, inputs)
        self.model = model  # last, so that the head's tensors are the last ones, as everywhere
        self.generator: torch.Generator | None = None
        self.beta = 0.0
        self._divergence: Tensor | None = None

    @property
    def head(self) -> nn.Linear:
        """The model's own."""
        return cast(Headed, self.model).head

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, shape (B, head.in_features)."""
        mean, raw = self.encoder(cast(Headed, self.model).features(images)).chunk(2, dim=1)
        if not self.training or self.generator is None:
            return self.decoder(mean)
        spread = F.softplus(raw)
        drawn = torch.randn(mean.shape, generator=self.generator).to(mean)
        each = 0.5 * (mean.square() + spread.square() - 2 * spread.log() - 1)
        self._divergence = each.sum(dim=1).mean()
        return self.decoder(mean + spread * drawn)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.head(self.features(images))

    def penalty(self) -> Tensor:
        """What the last forward pass adds to the loss; zero where nothing is drawn."""
        if self.generator is None or self._divergence is None:
            return torch.zeros(())
        return self.beta * self._divergence

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """The model's own initialisation, and Kaiming-uniform weights with zero biases around the code."""
        initialise = getattr(self.model, "initialise", None)
        if initialise is not None:
            initialise(generator)
        else:
            kaiming_uniform(self.model, generator)
        kaiming_uniform(self.encoder, generator)
        kaiming_uniform(self.decoder, generator)
