"""R-GAP: one image from a convolutional network, layer by layer, by linear equations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adversaries.base import Progress, no_progress
from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.evidence.first_layer import Player, misfits
from adversaries.inversion.evidence.floors import floors, prior_image
from adversaries.inversion.gradients import closed_form
from adversaries.inversion.gradients.closed_form import Chain, Convolution
from adversaries.needs import Needs
from adversaries.reconstruction.base import ReconstructionAttack, status_of
from fedattack.config import Strength
from fedattack.errors import NotApplicable
from fedattack.observation import Observation, Reconstruction

_EDGE = 1e-7
"""How near to the end of its range a bounded activation's value is still turned back."""


@dataclass
class RGap(ReconstructionAttack):
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

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack the observations of one round; see :meth:`ReconstructionAttack.run`."""
        del seed
        if device.type == "mps":  # has no float64
            device = torch.device("cpu")
        answers = []
        for number, observation in enumerate(observations):
            progress(number / len(observations), f"client {observation.client}: layer by layer")
            self.check(observation.scenario)
            if observation.num_examples != 1:
                raise NotApplicable(
                    f"client {observation.client} declares {observation.num_examples} samples; R-GAP follows one"
                )
            tried = [_recursion(observation, ridge, device) for ridge in self.ridges]
            answers.append(min(tried, key=lambda answer: answer.loss))
        return answers


def _logit(a: Tensor) -> tuple[Tensor, Tensor]:
    a = a.clamp(_EDGE, 1 - _EDGE)
    return torch.logit(a), torch.ones_like(a, dtype=torch.bool)


def _atanh(a: Tensor) -> tuple[Tensor, Tensor]:
    a = a.clamp(-1 + _EDGE, 1 - _EDGE)
    return torch.atanh(a), torch.ones_like(a, dtype=torch.bool)


def _rectified(a: Tensor) -> tuple[Tensor, Tensor]:
    return a, a > 0


def _softplus(a: Tensor) -> tuple[Tensor, Tensor]:
    a = a.clamp_min(_EDGE)
    return a + torch.log(-torch.expm1(-a)), torch.ones_like(a, dtype=torch.bool)


_UNDO = {"sigmoid": _logit, "tanh": _atanh, "relu": _rectified, "softplus": _softplus}
"""Activation -> (value -> pre-activation and where it is known)."""


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
        shape = layer.output
        name = str(observation.scenario.model.activation)
        output, known = _UNDO[name](values.reshape(1, *shape))
        delta = slopes.reshape(1, *shape) * chain.activation.slope(output)
        solved, figures = _solve(
            layer, weights, sent[layer.weight], output, known, delta, typical.inputs[position], ridge
        )
        layers.append({"layer": layer.name, **figures})
        values = solved
        slopes = closed_form.transpose(layer, weights, delta, (solved.shape[2], solved.shape[3]))
    return _answer(observation, chain, sent, values, label, {"ridge": ridge, "layers": layers}, device)


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


def _answer(
    observation: Observation,
    chain: Chain,
    sent: dict[str, Tensor],
    image: Tensor,
    label: Tensor,
    figures: dict[str, Any],
    device: torch.device,
) -> Reconstruction:
    image = image.clamp(0, 1)
    played = Player(observation, chain.convolutions[0].name, device).play(image.flatten(1), label)
    parts = misfits(sent, played.gradients)
    left = max(parts.values())
    status = status_of(left)
    return Reconstruction(
        image.float().cpu(),
        label,
        loss=left,
        label_confidence=1.0,
        method="rgap",
        floors=floors(observation, label),
        details={
            "status": status,
            "reason": ""
            if status != "failed"
            else f"residual {left:.0e}: the image does not explain the update",
            "residual": left,
            "residual_parts": parts,
            "kept": observation.update.kept,
            **figures,
        },
    )
