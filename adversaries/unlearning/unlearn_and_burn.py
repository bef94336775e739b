"""Samples made so that forgetting them burns the model (black box)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from adversaries.needs import Needs
from adversaries.seats import ClientView
from adversaries.unlearning.surrogate import SurrogateAttack
from fedattack.observation import UnlearningRequest
from fedattack.task import trained_parameters


@dataclass
class UnlearnAndBurn(SurrogateAttack):
    """Sends samples that nobody trained on, made so that the model is worst once they are forgotten.

    Noise on samples of its own climbs the loss that its own model has on its other samples after a simulated
    forgetting, one step of gradient ascent on the request's mean loss; the slope is estimated from differences,
    ``[L(x + s u) - L(x - s u)] u / 2 s`` over Gaussian u, so that any simulation will do (the black-box attack).

    Parameters
    ----------
    radius : float
        Most 2-norm of one image's noise; pixels stay in [0, 1].
    steps, step
        Of the climb: how many, and how long each is, in parts of `radius`.
    directions, spread
        Of the differences: how many are taken for a step, and how far they reach, in deviations of a pixel.
    rate : float
        Of the simulated ascent.

    References
    ----------
    Huang, Liu, Chua, Ghazi, Kamath, Kumar, Manurangsi, Nasr, Sinha, Zhang, "Unlearn and Burn: Adversarial Machine
    Unlearning Requests Destroy Model Accuracy", arXiv:2410.09591, 2024.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, foreign=True)
    access: ClassVar[Literal["weights", "queries", "none"]] = "none"

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    radius: Annotated[float, Field(gt=0)] = 3.0
    steps: Annotated[int, Field(ge=1)] = 40
    directions: Annotated[int, Field(ge=1)] = 20
    rate: Annotated[float, Field(gt=0)] = 1.0
    step: Annotated[float, Field(gt=0)] = 0.1
    spread: Annotated[float, Field(gt=0)] = 0.05

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        """At most `view.requests` samples with the labels of those that they were made of."""
        model, rest = self.surrogate(view, images, labels)
        generator = torch.Generator().manual_seed(view.seed + 1)
        chosen = rest[torch.randperm(len(rest), generator=generator)[: view.requests]]
        state, named = model.state_dict(), trained_parameters(model)
        x, y, others = images[chosen], labels[chosen], (images[rest], labels[rest])

        def burnt(made: Tensor) -> float:
            loss = cross_entropy(model(made), y)
            slope = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            with torch.no_grad():
                moved = {n: p + self.rate * g for (n, p), g in zip(named.items(), slope, strict=True)}
                return float(
                    cross_entropy(functional_call(model, {**state, **moved}, (others[0],)), others[1])
                )

        return UnlearningRequest(
            view.client, reason="made to burn", images=self.climb(x, burnt, generator), labels=y
        )

    def climb(self, start: Tensor, height: Callable[[Tensor], float], generator: torch.Generator) -> Tensor:
        """Images near `start` of greater `height`, the best that were met; float32 in [0, 1]."""
        best, top, made = start, height(start), start
        for _ in range(self.steps):
            slope = torch.zeros_like(made)
            for _ in range(self.directions):
                u = torch.randn(made.shape, generator=generator)
                slope += (height(made + self.spread * u) - height(made - self.spread * u)) * u
            each = slope.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
            noise = made + self.step * self.radius * slope / each - start
            long = noise.flatten(1).norm(dim=1)[:, None, None, None].clamp(min=1e-12)
            made = (start + noise * (self.radius / long).clamp(max=1.0)).clamp(0.0, 1.0)
            if (reached := height(made)) > top:
                best, top = made, reached
        return best
