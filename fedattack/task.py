"""What a federation trains and measures: the loss of a batch, the figures of a model, the shape of its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from fedattack.config import GanConfig, ModelConfig
from fedattack.observation import Scenario
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


@runtime_checkable
class PerSample(Protocol):
    """A :data:`GradientStep` that can take a batch's samples apart, quicker than one after the other."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, /) -> LossAndGradient: ...

    def per_sample(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        """Each sample's own loss, (n,), and gradient, a tensor (n, ...) for each parameter."""
        ...


@dataclass(frozen=True)
class LocalRound:
    """What a client trains by in one round.

    Attributes
    ----------
    weights : mapping of str to Tensor
        The received state dict; not to be modified.
    images, labels : Tensor
        All samples of the client: float32 (N, C, H, W) in [0, 1] and int64 (N,).
    batches : sequence of ndarray of int64
        Positions in the samples, one array per local step.
    step : callable
        :meth:`Task.step`, behind the client's defences.
    draws : Generator
        The client's own stream for this round.
    memory : mapping of str to Tensor
        :attr:`LocalResult.memory` of its last round; empty at first.
    """

    weights: Mapping[str, Tensor]
    images: Tensor
    labels: Tensor
    batches: Sequence[NDArray[np.int64]]
    scenario: Scenario
    step: GradientStep
    draws: Generator
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalResult:
    """What local training leaves."""

    update: dict[str, Tensor]  # trained parameter -> gradient (fedsgd) or weight change (fedavg)
    buffers: dict[str, Tensor]  # floating-point buffers after training (BatchNorm statistics)
    loss: float  # mean over the batches, each at the weights it met
    num_examples: int  # distinct samples used
    memory: dict[str, Tensor] = field(default_factory=dict)  # what the client keeps until its next round


class Task(ABC):
    """What the clients minimise and what a model is measured by; stateless."""

    kind: ClassVar[Literal["classify", "generate"]] = "classify"
    """Which attacks can apply (:attr:`adversaries.needs.Needs.trains`)."""
    figures: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of what :meth:`measure` answers; "loss" is one of them."""
    called: ClassVar[tuple[str, str]] = ("test loss", "training loss")
    """What people call "loss" on held-out samples, and the loss that clients report."""
    proximal: ClassVar[bool] = False
    """Whether :meth:`step` is the gradient of all that is sent, so that a client can add a proximal term's to it."""

    def check(self, scenario: Scenario) -> None:
        """Refuse (ConfigError), before anything starts, settings that the task cannot work with."""
        return None

    def model(self, model: ModelConfig, gan: GanConfig) -> ModelConfig:
        """The resolved model, as this task has it sent."""
        return model

    def keeps_memory(self, scenario: Scenario) -> bool:
        """Whether clients keep something of it from round to round."""
        return False

    @abstractmethod
    def step(self, scenario: Scenario, draws: Generator) -> GradientStep:
        """How an undefended client computes the loss and gradient of one batch; random numbers come from `draws`."""

    def stepped(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What the gradient of :meth:`step` is of, in its order, as far as it is sent."""
        return trained_parameters(model)

    @abstractmethod
    def train(self, model: nn.Module, given: LocalRound) -> LocalResult:
        """One client's round; `model` is scratch space, whose weights are overwritten."""

    @abstractmethod
    def measure(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Sum over the samples of each of :attr:`figures`; the model is in evaluation mode."""

    @abstractmethod
    def output(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the model's answer to one sample."""


TASKS: Registry[type[Task]] = Registry(
    "task",
    {"classify": "fedattack.training:Classify", "wgan-gp": "fedattack.generative.wgan_gp:WganGp"},
    group="fedattack.tasks",
    base="fedattack.task:Task",
)


def task_of(scenario: Scenario) -> Task:
    """What the scenario's clients train."""
    return TASKS.get(scenario.training.task)()
