"""The gradient as a function of the images, and both products with its Jacobian.

With L the loss of the batch, one backward pass that keeps its graph gives dL/dx and dL/dtheta. The Jacobian of the
gradient is the mixed second derivative of L, so that both products are plain double backward passes on that graph::

    J v   = d/dtheta <dL/dx, v>          J^T u = d/dx <dL/dtheta, u>

Neither needs another forward pass, and nothing of the size of J is ever formed.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adversaries.inversion.gradients.autograd import twice_differentiable
from adversaries.inversion.gradients.closed_form import normal_density
from adversaries.inversion.gradients.sent import BatchNormMode, Moves
from fedattack.config import ModelConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Update
from fedattack.task import objective


class _Slope(torch.autograd.Function):
    """grad * Phi(u / width), with Phi the normal distribution function."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, grad: Tensor, width: float) -> Tensor:
        t = u / width
        above, density = torch.special.ndtr(t), normal_density(t) / width
        ctx.save_for_backward(above, density * grad)
        return grad * above

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        above, bent = ctx.saved_tensors
        return grads[0] * bent, grads[0] * above, None


class _Value(torch.autograd.Function):
    """E max(0, u + width * e) for a normal e, with :class:`_Slope` as its backward pass."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.width = width
        t = u / width
        return u * torch.special.ndtr(t) + width * normal_density(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return _Slope.apply(u, grads[0], ctx.width), None


class SmoothedReLU(nn.Module):
    """ReLU as it is on average over normal noise on its inputs: smooth, and exact at width zero.

    Its kink is a Dirac comb in the second derivative, of which automatic differentiation sees nothing;
    smoothed it is a normal density. Written out instead of left to automatic differentiation, for speed.
    `width` is the noise's deviation relative to that of the layer's inputs, which counts as a constant.
    """

    def __init__(self, width: float = 0.0) -> None:
        super().__init__()
        self.width = width

    def forward(self, u: Tensor) -> Tensor:
        """Elementwise, any shape."""
        width = self.width * float(u.detach().std(correction=0)) if self.width > 0 else 0.0
        # A layer that is constant has no scale to measure a kink by.
        return _Value.apply(u, width) if width > 0 else F.relu(u)


class FunctionalReLUs(TorchFunctionMode):
    """Has ReLUs that a model calls as functions smoothed as :class:`SmoothedReLU` does; `seen`: whether it does."""

    def __init__(self) -> None:
        super().__init__()
        self.smoothed = SmoothedReLU()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RELUS:
            self.seen = True
            return self.smoothed(args[0] if args else (kwargs or {})["input"])
        return func(*args, **(kwargs or {}))


RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
"""What calls ReLU as a function."""


class Network:
    """A classifier at fixed weights, what was sent of its gradient, and how much each entry counts.

    Entries of the update, one gradient, that were not sent have weight zero. `count` is the number that were,
    `kinked` tells whether :meth:`linearise` has ReLUs to smooth, `products` counts the Jacobian products made
    so far. With `moves`, what the client's local steps did, the weights can be put to a :attr:`point` between those
    before and after.

    NotApplicable if the gradient of a batch is random (dropout), or nothing but zeros was sent.
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
        moves: Moves | None = None,
    ) -> None:
        self._module = prepare(model, weights, batch_norm).to(device, dtype)
        self._kinks = [part for part in self._module.modules() if isinstance(part, SmoothedReLU)]
        self._functions = _functions(self._module, model)
        if self._functions is not None:
            self._kinks.append(self._functions.smoothed)
        self.kinked = bool(self._kinks)
        parameters = dict(self._module.named_parameters())
        self._parameters = [parameters[name] for name in update.names]
        self._sizes = update.sizes
        self.labels = labels.to(device)
        self._target, self._scale = (t.to(device, dtype) for t in _scaled(update))
        self._received = {name: p.detach().clone() for name, p in parameters.items()} if moves else {}
        self._moves = {name: move.to(device, dtype) for name, move in (moves or {}).items()}
        self.point = 0.0
        self.count = update.kept
        self.products = 0

    @property
    def movable(self) -> bool:
        """Whether the weights have a :attr:`point` to be put to."""
        return bool(self._moves)

    @torch.no_grad()
    def put(self, point: float) -> None:
        """Put the weights so far, 0 to 1, along the moves; linearisations made before are void."""
        self.point = point
        for name, parameter in self._module.named_parameters():
            if name in self._moves:
                torch.add(self._received[name], self._moves[name], alpha=point, out=parameter)

    def linearise(self, images: Tensor, kink: float = 0.0) -> Linearisation:
        """Residual and Jacobian of the scaled gradient at images (B, C, H, W), ReLU's kinks as wide as `kink`."""
        images = images.detach().requires_grad_()
        loss = self._loss(images, kink)
        by_image, *by_weight = torch.autograd.grad(loss, [images, *self._parameters], create_graph=True)
        residual = self._flat(by_weight).detach() * self._scale - self._target
        return Linearisation(self, images, by_image, by_weight, residual)

    def rms(self, images: Tensor) -> float:
        """:attr:`Linearisation.rms` of the client's own network, and no Jacobian."""
        gradients = torch.autograd.grad(self._loss(images, 0.0), self._parameters)
        return self._rms(self._flat(gradients) * self._scale - self._target)

    def _loss(self, images: Tensor, kink: float) -> Tensor:
        for part in self._kinks:
            part.width = kink
        with twice_differentiable(), contextlib.nullcontext() if self._functions is None else self._functions:
            return objective(self._module, self._module(images), self.labels)

    def _rms(self, residual: Tensor) -> float:
        return math.sqrt(float(residual.double().square().sum()) / self.count)

    def _flat(self, pieces: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        return torch.cat([piece.reshape(-1) for piece in pieces])


@dataclass(frozen=True)
class Linearisation:
    """The scaled gradient near images (B, C, H, W).

    `residual` (N,) is the scaled prediction minus the scaled update, zero where nothing was sent.
    """

    network: Network
    images: Tensor
    by_image: Tensor
    by_weight: list[Tensor]
    residual: Tensor

    @property
    def rms(self) -> float:
        """Root mean square of the residual over the sent entries; about 1 for a gradient of zero."""
        return self.network._rms(self.residual)

    def push(self, direction: Tensor) -> Tensor:
        """J v: (B, C, H, W) -> (N,)."""
        net = self.network
        net.products += 1
        pieces = torch.autograd.grad(
            self.by_image, net._parameters, direction, retain_graph=True, materialize_grads=True
        )
        return net._flat(pieces) * net._scale

    def pull(self, cotangent: Tensor) -> Tensor:
        """J^T u: (N,) -> (B, C, H, W)."""
        net = self.network
        net.products += 1
        parts = (cotangent * net._scale).split(net._sizes)
        shaped = [part.view_as(p) for part, p in zip(parts, net._parameters, strict=True)]
        (found,) = torch.autograd.grad(
            self.by_weight, self.images, shaped, retain_graph=True, materialize_grads=True
        )
        return found


def prepare(model: ModelConfig, weights: Mapping[str, Tensor] | None, batch_norm: BatchNormMode) -> nn.Module:
    """The classifier (with its weights), ReLU exchanged for :class:`SmoothedReLU` and no statistics written.

    NotApplicable if the same images do not give the same gradient each time.
    """
    with torch.random.fork_rng(devices=[]):
        module = build_model(model)
        _refuse_chance(module, model)
    if weights is not None:
        module.load_state_dict(dict(weights))
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.ReLU):
            module.set_submodule(name, SmoothedReLU())
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and batch_norm == "train":
            part.track_running_stats = False
    return module.train(batch_norm == "train")


@torch.no_grad()
def _functions(module: nn.Module, model: ModelConfig) -> FunctionalReLUs | None:
    """What smooths the ReLUs that a model calls as functions; None where it calls none beside its modules."""
    plain, mode = copy.deepcopy(module), FunctionalReLUs()
    for name, part in list(plain.named_modules()):
        if isinstance(part, SmoothedReLU):
            plain.set_submodule(name, nn.Identity())  # calls one too
    channels, side, _ = model.resolved
    given = next(plain.parameters())
    with mode:
        plain(torch.full((2, channels, side, side), 0.5, dtype=given.dtype, device=given.device))
    return mode if mode.seen else None


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
