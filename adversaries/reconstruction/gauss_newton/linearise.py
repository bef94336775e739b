"""The gradient as a function of the images, and both products with its Jacobian.

With L the loss of the batch, one backward pass that keeps its graph gives dL/dx and dL/dtheta. The Jacobian of the
gradient is the mixed second derivative of L, so that both products are plain double backward passes on that graph::

    J v   = d/dtheta <dL/dx, v>          J^T u = d/dx <dL/dtheta, u>

Neither needs another forward pass, and nothing of the size of J is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.reconstruction.gradients import BatchNormMode
from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Update
from fedattack.training import objective


class _Slope(torch.autograd.Function):
    """grad * 1[u > 0], whose own derivative by u is a Gaussian instead of zero."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, grad: Tensor, width: float) -> Tensor:
        above = (u > 0).to(u.dtype)
        deviation = width * u.std(correction=0)
        bend = torch.exp(-0.5 * (u / deviation).square()) / (deviation * math.sqrt(2 * math.pi))
        # A layer that is constant has no scale to measure a kink by.
        ctx.save_for_backward(above, (bend * grad).nan_to_num(0.0, 0.0, 0.0))
        return grad * above

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        above, bent = ctx.saved_tensors
        return grads[0] * bent, grads[0] * above, None


class _Value(torch.autograd.Function):
    """ReLU with :class:`_Slope` as its backward pass."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.width = width
        return u.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return _Slope.apply(u, grads[0], ctx.width), None


class SurrogateReLU(nn.Module):
    """ReLU that shows a smoothed kink to a second differentiation.

    Value and first derivative are exact, so that the gradient it belongs to is the client's. The second derivative,
    a Dirac comb of which automatic differentiation sees nothing, is replaced by a normal density of standard
    deviation `width` times that of the layer's inputs.

    Attributes
    ----------
    width : float
        Of the kink, relative to the inputs' deviation; 0: no second derivative, as torch has it.
    """

    def __init__(self, width: float = 0.0) -> None:
        super().__init__()
        self.width = width

    def forward(self, u: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return _Value.apply(u, self.width) if self.width > 0 else F.relu(u)


class Network:
    """A classifier at fixed weights, what was sent of its gradient, and how much each entry counts.

    Parameters
    ----------
    model : ModelConfig
        Resolved.
    weights : mapping of str to Tensor
        State dict that was sent out.
    update : Update
        One gradient; entries that were not sent have weight zero.
    labels : Tensor
        int64 (B,).
    batch_norm : {"train", "eval"}
        Whether BatchNorm uses the batch's statistics, as a client does that trains, or the sent running ones.
    device : torch.device
    dtype : torch.dtype

    Attributes
    ----------
    count : int
        Entries that were sent.
    kinked : bool
        Whether the activation is ReLU, so that :meth:`linearise` smooths kinks.
    products : int
        Jacobian products made so far, each counted by its cost.
    separable : bool
        Whether images do not see each other, so that a gradient is a mean over them: no BatchNorm in training mode.

    Raises
    ------
    NotApplicable
        If the gradient of a batch is random (dropout), or nothing but zeros was sent.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Mapping[str, Tensor],
        update: Update,
        labels: Tensor,
        batch_norm: BatchNormMode,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._module = prepare(model, weights, batch_norm).to(device, dtype)
        self._kinks = [part for part in self._module.modules() if isinstance(part, SurrogateReLU)]
        self.kinked = bool(self._kinks)
        normed = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self._module.modules())
        self.separable = batch_norm == "eval" or not normed
        parameters = dict(self._module.named_parameters())
        self._parameters = [parameters[name] for name in update.names]
        self._sizes = update.sizes
        self.labels = labels.to(device)
        self._target, self._scale = (t.to(device, dtype) for t in _scaled(update))
        self.count = update.kept
        self.products = 0

    def linearise(self, images: Tensor, kink: float = 0.0, offsets: Tensor | None = None) -> Linearisation:
        """Residual and Jacobian of the scaled gradient.

        Parameters
        ----------
        images : Tensor
            (B, C, H, W).
        kink : float
            Width of ReLU's surrogate kinks.
        offsets : Tensor, optional
            (M, B, C, H, W): the gradient is averaged over so many copies of the images, each moved by its offset.
        """
        for part in self._kinks:
            part.width = kink
        images = images.detach().requires_grad_()
        loss = self._loss(images, offsets)
        by_image, *by_weight = torch.autograd.grad(loss, [images, *self._parameters], create_graph=True)
        residual = self._flat(by_weight).detach() * self._scale - self._target
        return Linearisation(self, images, by_image, by_weight, residual, 1 + _copies(offsets) // 8)

    def rms(self, images: Tensor) -> float:
        """:attr:`Linearisation.rms` at `images` alone, without its Jacobian."""
        gradients = torch.autograd.grad(self._loss(images, None), self._parameters)
        return self._rms(self._flat(gradients) * self._scale - self._target)

    def _loss(self, images: Tensor, offsets: Tensor | None) -> Tensor:
        moved, labels = images, self.labels
        if offsets is not None:
            moved = (images + offsets).flatten(0, 1)
            labels = labels.repeat(len(offsets))
        return objective(self._module, self._module(moved), labels)

    def _rms(self, residual: Tensor) -> float:
        return math.sqrt(float(residual.double().square().sum()) / self.count)

    def _flat(self, pieces: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        return torch.cat([piece.reshape(-1) for piece in pieces])


def _copies(offsets: Tensor | None) -> int:
    return 1 if offsets is None else len(offsets)


@dataclass(frozen=True)
class Linearisation:
    """The scaled gradient near one point.

    Attributes
    ----------
    images : Tensor
        (B, C, H, W): the point.
    residual : Tensor
        (N,): scaled prediction minus scaled update, zero where nothing was sent.
    cost : int
        What a product counts for: one, and one more for each eight copies, about what small networks take.
    """

    network: Network
    images: Tensor
    by_image: Tensor
    by_weight: list[Tensor]
    residual: Tensor
    cost: int = 1

    @property
    def rms(self) -> float:
        """Root mean square of the residual over the sent entries; about 1 for a gradient of zero."""
        return self.network._rms(self.residual)

    def push(self, direction: Tensor) -> Tensor:
        """J v: (B, C, H, W) -> (N,)."""
        net = self.network
        net.products += self.cost
        pieces = torch.autograd.grad(
            self.by_image, net._parameters, direction, retain_graph=True, materialize_grads=True
        )
        return net._flat(pieces) * net._scale

    def pull(self, cotangent: Tensor) -> Tensor:
        """J^T u: (N,) -> (B, C, H, W)."""
        net = self.network
        net.products += self.cost
        parts = (cotangent * net._scale).split(net._sizes)
        shaped = [part.view_as(p) for part, p in zip(parts, net._parameters, strict=True)]
        (found,) = torch.autograd.grad(
            self.by_weight, self.images, shaped, retain_graph=True, materialize_grads=True
        )
        return found


def prepare(model: ModelConfig, weights: Mapping[str, Tensor] | None, batch_norm: BatchNormMode) -> nn.Module:
    """The classifier (with its weights), ReLU exchanged for :class:`SurrogateReLU` and no statistics written.

    Raises
    ------
    NotApplicable
        If the same images do not give the same gradient each time.
    """
    with torch.random.fork_rng(devices=[]):
        module = build_model(model)
        _refuse_chance(module, model)
    if weights is not None:
        module.load_state_dict(dict(weights))
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.ReLU):
            module.set_submodule(name, SurrogateReLU())
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and batch_norm == "train":
            part.track_running_stats = False
    return module.train(batch_norm == "train")


@torch.no_grad()
def _refuse_chance(module: nn.Module, model: ModelConfig) -> None:
    sizes = [model.channels, model.image_size, model.image_size]
    grey = torch.full([2, *(size or 0 for size in sizes)], 0.5)
    if not torch.equal(module(grey), module(grey)):
        raise NotApplicable(
            f"model.name = {model.name!r} draws random numbers in its forward pass, so that no gradient can be "
            "computed again; use a model without them"
        )


def _scaled(update: Update) -> tuple[Tensor, Tensor]:
    """The update and each entry's weight, 1 / rms of its tensor's sent entries and 0 where unsent: (N,) each."""
    values, weights = [], []
    for _, shape, positions, sent in update.layers():
        value, weight = (torch.zeros(torch.Size(shape).numel()) for _ in range(2))
        deviation = float(sent.double().square().mean().sqrt()) if len(sent) else 0.0
        value[positions] = sent.float().cpu()
        weight[positions] = 1 / deviation if deviation > 0 else 0.0
        values.append(value * weight)
        weights.append(weight)
    target, scale = torch.cat(values), torch.cat(weights)
    if not bool(target.any()):
        raise NotApplicable("the update holds nothing but zeros, and there is no gradient to solve for")
    return target, scale
