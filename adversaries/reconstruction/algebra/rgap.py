"""R-GAP: one image from a convolutional network, layer by layer, by linear equations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adversaries.base import Progress
from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.evidence.first_layer import Player, misfits
from adversaries.inversion.evidence.floors import floors, prior_image
from adversaries.inversion.gradients import closed_form
from adversaries.inversion.gradients.closed_form import Convolution
from adversaries.needs import Needs
from adversaries.reconstruction.base import OneByOne, status_of
from fedattack.config import Strength
from fedattack.errors import NotApplicable
from fedattack.models.normalise import pixels, shown
from fedattack.observation import Observation, Reconstruction

_EDGE = 1e-7
"""How near to the end of its range a bounded activation's value is still turned back."""


@dataclass
class RGap(OneByOne):
    """R-GAP: solves for the input of each layer in turn, from the head down to the image; batch size 1.

    The head's weight and bias gradients give the last features h. Going down, the output u of a convolution is known
    by undoing the activation and dL/du by the chain rule; its input a then obeys two sets of linear equations, the
    convolution itself (``K * a + b = u``) and its kernel's gradient (``dL/du correlated with a``). They are solved
    together by least squares, drawn towards what the layer sees of the prior image where they leave room.

    Errors grow from layer to layer, and ReLU hides u wherever it is zero: `details` gives equations and unknowns of
    each layer, and the residual of the whole gradient tells whether the image explains it.

    Parameters
    ----------
    ridges : tuple of float
        Weights of the pull towards the prior, relative to the mean diagonal of the equations' Gram matrix: each is
        tried, and the image is answered that explains most of the update.

    References
    ----------
    Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021. There the head is binary and its
    residual is found by a search; here the bias gradient gives it.
    """

    needs: ClassVar[Needs] = Needs(
        update="gradient",
        entries="all",
        sums="dense",
        fresh=True,
        images=1,
        chain=True,
        activations=("sigmoid", "tanh", "relu", "softplus"),
    )

    ridges: Annotated[tuple[Strength, ...], Field(min_length=1)] = (1e-12, 1e-8, 1e-4)

    def one(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """Follow the image through the layers, once for each ridge."""
        progress(0.0, "layer by layer")
        self.check(observation.scenario)
        if observation.num_examples != 1:
            raise NotApplicable(
                f"client {observation.client} declares {observation.num_examples} samples; R-GAP follows one"
            )
        return min(
            (_recursion(observation, ridge, device) for ridge in self.ridges), key=lambda one: one.loss
        )


_UNDO: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda a: torch.logit(a.clamp(_EDGE, 1 - _EDGE)),
    "tanh": lambda a: torch.atanh(a.clamp(-1 + _EDGE, 1 - _EDGE)),
    "relu": lambda a: a,
    "softplus": lambda a: a.clamp_min(_EDGE) + torch.log(-torch.expm1(-a.clamp_min(_EDGE))),
}


def _undone(activation: str, a: Tensor) -> tuple[Tensor, Tensor]:
    """The pre-activations of values, and where they are known."""
    return _UNDO[activation](a), a > 0 if activation == "relu" else torch.ones_like(a, dtype=torch.bool)


def _recursion(observation: Observation, ridge: float, device: torch.device) -> Reconstruction:
    update = one_gradient.as_gradient(observation)
    sent = {name: tensor.to(device).double() for name, tensor in update.dense().items()}
    weights = {name: tensor.to(device).double() for name, tensor in observation.weights.items()}
    chain = closed_form.describe(observation.scenario.model)
    residual = sent["head.bias"]
    if not float(residual.norm()) > 0:
        raise NotApplicable("the head's bias gradient is zero: the image is fitted already and nothing leaks")
    label = residual.argmin()[None].cpu()
    typical = closed_form.run_forward(chain, weights, prior_image(observation)[None].to(device).double())
    # Row c of the head's gradient is r_c h.
    values = residual @ sent["head.weight"] / residual.square().sum()
    slopes = residual @ weights["head.weight"]
    layers: list[dict[str, Any]] = []
    for position in reversed(range(len(chain.convolutions))):
        layer = chain.convolutions[position]
        output, known = _undone(str(observation.scenario.model.activation), values.reshape(1, *layer.output))
        delta = slopes.reshape(1, *layer.output) * chain.activation.slope(output)
        solved, figures = _solve(
            layer, weights, sent[layer.weight], output, known, delta, typical.inputs[position], ridge
        )
        layers.append({"layer": layer.name, **figures})
        values = solved
        slopes = closed_form.transpose(layer, weights, delta, (solved.shape[2], solved.shape[3]))
    model = observation.scenario.model
    image = pixels(values, model).clamp(0, 1)
    player = Player(observation, chain.convolutions[0].name, device)
    parts = misfits(sent, player.play(shown(image, model).flatten(1), label).gradients)
    left = max(parts.values())
    status = status_of(left)
    reason = f"residual {left:.0e}: the image does not explain the update" if status == "failed" else ""
    return Reconstruction(
        image.float().cpu(),
        label,
        loss=left,
        label_confidence=1.0,
        method="rgap",
        floors=floors(observation, label),
        details={
            "status": status,
            "reason": reason,
            "residual": left,
            "residual_parts": parts,
            "kept": observation.update.kept,
            "ridge": ridge,
            "layers": layers,
        },
    )


def _solve(
    layer: Convolution,
    weights: dict[str, Tensor],
    gradient: Tensor,
    output: Tensor,
    known: Tensor,
    delta: Tensor,
    typical: Tensor,
    ridge: float,
) -> tuple[Tensor, dict[str, Any]]:
    """The input (1, channels, H, W) of one convolution, by its outputs and its kernel's gradient."""
    size = typical.numel()
    unit = torch.eye(size, dtype=typical.dtype, device=typical.device).reshape(size, *typical.shape[1:])
    through = closed_form.convolve(layer, weights, unit, bias=False).flatten(1)[:, known.flatten()]
    pulled = closed_form.correlate_directions(layer, delta, unit).flatten(1)
    del unit
    # What the typical input leaves unexplained; each set of equations counts as one.
    missing = (output - closed_form.convolve(layer, weights, typical)).flatten()[known.flatten()]
    wanted = gradient.flatten() - typical.flatten() @ pulled
    gram = torch.zeros(size, size, dtype=typical.dtype, device=typical.device)
    right = torch.zeros(size, dtype=typical.dtype, device=typical.device)
    for matrix, target in ((through, missing), (pulled, wanted)):
        scale = matrix.square().sum().clamp_min(1e-300)
        gram.addmm_(matrix, matrix.T, alpha=float(1 / scale))
        right.addmv_(matrix, target, alpha=float(1 / scale))
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()))
    found = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(gram))[:, 0]
    left = (missing - found @ through).norm() / missing.norm().clamp_min(1e-300)
    figures = {
        "equations": through.shape[1] + pulled.shape[1],
        "unknowns": size,
        "outputs_known": float(known.double().mean()),
        "unexplained": float(left),
    }
    return typical + found.reshape(typical.shape), figures
