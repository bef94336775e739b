"""What a federation trains and measures: the loss of a batch, the figures of a model, the shape of its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedattack.config import ModelConfig
from fedattack.registry import Registry

LossAndGradient = tuple[Tensor, tuple[Tensor, ...]]
"""The loss of a batch, a scalar, and its gradient in the order of the model's trained parameters."""

GradientStep = Callable[[nn.Module, Tensor, Tensor], LossAndGradient]
"""Takes the model in the mode it is to be used in, images (n, C, H, W) and labels (n,), on one device."""


@runtime_checkable
class Penalised(Protocol):
    """A model that adds something of its own to the loss."""

    def penalty(self) -> Tensor:
        """What its last forward pass adds, a scalar."""
        ...


def objective(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """What a classifier's client minimises: the mean cross-entropy, and the model's own penalty where it has one."""
    loss = cross_entropy(logits, labels)
    return loss + model.penalty() if isinstance(model, Penalised) else loss


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training moves and an update consists of: each tied parameter once, frozen ones not at all."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every further name of a parameter that has several -> the name by which :meth:`named_parameters` knows it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in named if name != first[id(parameter)]}


class Task(ABC):
    """What the clients minimise and what a model is measured by; stateless."""

    figures: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of what :meth:`measure` answers; "loss" is one of them."""

    @abstractmethod
    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of one batch with its graph, a scalar."""

    @abstractmethod
    def measure(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Sum over the samples of each of :attr:`figures`; the model is in evaluation mode."""

    @abstractmethod
    def output(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the model's answer to one sample."""

    def gradient(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        """Loss and gradient of one batch: what an undefended client computes."""
        loss = self.loss(model, images, labels)
        parameters = list(trained_parameters(model).values())
        return loss, torch.autograd.grad(loss, parameters, materialize_grads=True)


class Classify(Task):
    """Tell the class of an image: cross-entropy and the share of right answers."""

    figures = ("loss", "accuracy")

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The :func:`objective` of the model's logits."""
        return objective(model, model(images), labels)

    def measure(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Cross-entropies and right answers, summed."""
        logits = model(images)
        return {
            "loss": float(cross_entropy(logits, labels, reduction="sum")),
            "accuracy": int((logits.argmax(1) == labels).sum()),
        }

    def output(self, model: ModelConfig) -> tuple[int, ...]:
        """One logit for each class."""
        return (model.resolved[2],)


TASKS: Registry[type[Task]] = Registry(
    "task", {"classify": "fedattack.task:Classify"}, group="fedattack.tasks"
)

CLASSIFY = Classify()
