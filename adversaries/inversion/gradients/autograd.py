"""Gradients and unrolled local training of any differentiable model, by automatic differentiation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from adversaries.inversion.gradients.closed_form import Weights
from adversaries.inversion.gradients.schedule import Schedule
from adversaries.inversion.gradients.sent import (
    BatchNormMode,
    Layout,
    Moves,
    Prediction,
    Statistics,
    targets_of,
)
from fedattack.config import ModelConfig, TrainingConfig
from fedattack.models import build_model


def twice_differentiable() -> contextlib.AbstractContextManager[None]:
    """Inside the block attention is computed so that its gradient can be differentiated; fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH)


class AutogradGradients:
    """Any differentiable model, by a backward pass that is itself differentiated.

    No running statistics are written, whatever the BatchNorm mode. Arguments as for :func:`gradient_model`.
    """

    joint = False

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        layout: Layout,
        labels: Tensor | None,
        batch_norm: BatchNormMode,
    ) -> None:
        self._layout, self.sent = layout, layout.sent
        device = self.sent.values.device
        self._module = build_model(model).to(device).train(batch_norm == "train")
        self._module.load_state_dict(dict(weights))
        self._inputs = _BatchNormInputs(self._module)
        self._parameters = dict(self._module.named_parameters())
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(self._moves(name))
        self._labels = None if labels is None else labels.to(device)

    def predict(
        self,
        images: Tensor,
        victims: slice,
        *,
        whole: bool = False,
        shares: Tensor | None = None,
        statistics: bool = False,
    ) -> Prediction:
        targets = targets_of(shares, self._labels, victims)
        first = victims.indices(len(self.sent.values))[0]
        rows, squares, seen = [], [], []
        for v in range(len(images)):
            with self._inputs.recorded(statistics) as inputs:
                gradients = self._gradients(images[v], targets[v], first + v)
            seen.append([_moments(one) for one in inputs])
            flat = [gradient.reshape(1, -1) for gradient in gradients]
            rows.append(self._layout.select(flat, slice(first + v, first + v + 1)))
            if whole:
                squares.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum())
        return Prediction(torch.cat(rows), torch.stack(squares) if whole else None, self._statistics(seen))

    def _moves(self, name: str) -> bool:
        """Whether this tensor's gradient is needed."""
        return name in self._layout.names

    def _gradients(self, images: Tensor, targets: Tensor, victim: int) -> Sequence[Tensor]:
        """What one victim's images (B, C, H, W) give for each tensor that takes part."""
        del victim
        wanted = [self._parameters[name] for name in self._layout.names]
        with twice_differentiable():
            loss = F.cross_entropy(self._module(images), targets)
        return torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)

    def _statistics(self, seen: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Statistics:
        """Moments per layer, (V, channels), from moments per victim and layer."""
        return tuple(
            (torch.stack([mean for mean, _ in layer]), torch.stack([variance for _, variance in layer]))
            for layer in zip(*seen, strict=True)
        )


class UnrolledGradients(AutogradGradients):
    """Several local steps of SGD, simulated from the received weights and differentiated through.

    Predicted and laid out is the mean step in units of a gradient, -delta / (learning rate * steps), so that
    objectives and regularisers weigh as they do for one gradient. BatchNorm statistics are means over the steps.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        layout: Layout,
        labels: Tensor | None,
        batch_norm: BatchNormMode,
        training: TrainingConfig,
        schedule: Schedule,
    ) -> None:
        super().__init__(model, weights, layout, labels, batch_norm)
        self._training = training
        self._batches = [torch.tensor(order, device=self.sent.values.device) for order in schedule.orders]

    def _moves(self, name: str) -> bool:
        return True

    def _gradients(self, images: Tensor, targets: Tensor, victim: int) -> Sequence[Tensor]:
        del victim
        training, received = self._training, list(self._parameters.values())
        current: Sequence[Tensor] = received
        moved: Sequence[Tensor] = [torch.zeros_like(parameter) for parameter in received]
        velocity = moved
        for batch in self._batches:
            state = dict(zip(self._parameters, current, strict=True))
            with twice_differentiable():
                logits = functional_call(self._module, state, (images[batch],))
            loss = F.cross_entropy(logits, targets[batch])
            step = torch.autograd.grad(loss, current, create_graph=True, materialize_grads=True)
            if training.weight_decay:
                step = _add(step, current, training.weight_decay)
            if training.momentum:
                step = velocity = _add(step, velocity, training.momentum)
            # The sum of the steps is kept apart from the weights: their difference would lose its last digits.
            moved = _add(moved, step)
            current = _add(received, moved, -training.learning_rate)
        steps = dict(zip(self._parameters, (total / len(self._batches) for total in moved), strict=True))
        return [steps[name] for name in self._layout.names]

    def _statistics(self, seen: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Statistics:
        layers = len(seen[0]) // len(self._batches) if seen else 0
        by_layer = [[_mean_moments(victim[layer::layers]) for layer in range(layers)] for victim in seen]
        return super()._statistics(by_layer)


class SurrogateGradients(AutogradGradients):
    """One gradient at a point between each victim's weights before and after its local steps (Zhu et al. 2023).

    `moves`: what the steps did, one for each of the V victims. Predictions are at the weights that were sent until
    :meth:`at` says otherwise.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        layout: Layout,
        labels: Tensor | None,
        batch_norm: BatchNormMode,
        moves: Sequence[Moves],
    ) -> None:
        super().__init__(model, weights, layout, labels, batch_norm)
        device = self.sent.values.device
        self._changes = [{name: move.to(device) for name, move in one.items()} for one in moves]
        self._points: dict[int, Tensor] = {}

    def at(self, points: Tensor, victims: slice) -> SurrogateGradients:
        """The same, with these victims' points (V',) in [0, 1]; predictions are differentiable in them."""
        first = victims.indices(len(self.sent.values))[0]
        found = copy.copy(self)
        found._points = dict(enumerate(points, first))
        return found

    def _gradients(self, images: Tensor, targets: Tensor, victim: int) -> Sequence[Tensor]:
        point, moves = self._points.get(victim), self._changes[victim]
        state = {
            name: value if point is None or name not in moves else value + point * moves[name]
            for name, value in self._parameters.items()
        }
        with twice_differentiable():
            loss = F.cross_entropy(functional_call(self._module, state, (images,)), targets)
        wanted = [state[name] for name in self._layout.names]
        return torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)


def _add(these: Sequence[Tensor], those: Sequence[Tensor], times: float = 1.0) -> tuple[Tensor, ...]:
    return torch._foreach_add(list(these), list(those), alpha=times)


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of (B, channels, ...)."""
    samples = inputs.transpose(0, 1).flatten(1)
    return samples.mean(1), samples.var(1, correction=0)


def _mean_moments(steps: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([mean for mean, _ in steps]).mean(0), torch.stack([var for _, var in steps]).mean(0)


class _BatchNormInputs:
    """What reaches the BatchNorm layers of a module, on request; also keeps their running statistics as they are."""

    def __init__(self, module: nn.Module) -> None:
        self._seen: list[Tensor] | None = None
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.track_running_stats = False
                part.register_forward_pre_hook(self._take)

    def _take(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._seen is not None:
            self._seen.append(inputs[0])

    @contextlib.contextmanager
    def recorded(self, wanted: bool) -> Iterator[list[Tensor]]:
        """The inputs of all layers that run inside the context, in their order; none unless `wanted`."""
        seen: list[Tensor] = []
        self._seen = seen if wanted else None
        try:
            yield seen
        finally:
            self._seen = None
