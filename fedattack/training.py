"""What a client does with the weights it gets: one gradient, or a few optimiser steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedattack.config import GanConfig, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, DataError, RunFailed
from fedattack.observation import Scenario, UpdateKind
from fedattack.rng import numpy_rng, torch_rng
from fedattack.task import (
    GradientStep,
    LocalResult,
    LocalRound,
    LossAndGradient,
    Task,
    objective,
    task_of,
    trained_parameters,
)

DIVERGED = "local training diverged"
"""How the error of a client whose training diverged begins."""

HOPELESS_LOSS = 1000.0
"""A mean cross-entropy from which no training comes back: logits that are wrong by a thousand."""


def batch_positions(
    count: int, training: TrainingConfig, seed: int, round: int, client: int
) -> list[NDArray[np.int64]]:
    """Which of a client's `count` samples are in the batch of each local step: positions, int64, one array a step.

    A pure function of its arguments, so that the auditor can recompute what a client saw. There are
    ``training.steps(count)`` of them: under local epochs as many as the passes take. Steps walk through a random
    permutation, which is drawn anew when it is used up; the last batch of such an epoch may be smaller (McMahan et
    al. 2017). `batch_size` 0, or no less than `count`, takes all samples in every step. Raises DataError without
    samples.
    """
    if count < 1:
        raise DataError(f"client {client} has no samples to train on; use fewer clients or another partition")
    size, steps = training.batch_size, training.steps(count)
    if size == 0 or size >= count:
        return [np.arange(count)] * steps
    rng = numpy_rng(seed, "batch", round, client)
    batches: list[NDArray[np.int64]] = []
    while len(batches) < steps:
        order = rng.permutation(count)
        batches += [order[start : start + size] for start in range(0, count, size)]
    return batches[:steps]


def remaining_positions(size: int, excluded: Collection[int] = ()) -> NDArray[np.int64]:
    """Positions of a partition of `size` samples that are left after `excluded` are taken out, ascending."""
    positions = np.arange(size)
    return np.setdiff1d(positions, np.asarray(sorted(excluded), np.int64)) if excluded else positions


def batches_without(
    count: int,
    training: TrainingConfig,
    seed: int,
    round: int,
    client: int,
    excluded: Collection[int] = (),
    draws: Literal["kept", "anew"] = "kept",
) -> list[NDArray[np.int64]]:
    """:func:`batch_positions` without the `excluded` positions.

    `draws` "kept": left out of the batches as they were, some of which may then be empty; "anew": out of what batches
    are drawn from. Raises DataError where nothing is left of the partition.
    """
    if not excluded:
        return batch_positions(count, training, seed, round, client)
    left = remaining_positions(count, excluded)
    if draws == "kept" and len(left):
        batches = batch_positions(count, training, seed, round, client)
        return [batch[np.isin(batch, left)] for batch in batches]
    return [left[batch] for batch in batch_positions(len(left), training, seed, round, client)]


def weight_step(training: TrainingConfig, kind: UpdateKind) -> float:
    """What an update of this kind is multiplied by to become a change of the global weights."""
    return 1.0 if kind == "delta" else -(training.server_learning_rate or training.learning_rate)


def training_mode(model: nn.Module, batch_norm: Literal["train", "eval"]) -> nn.Module:
    """The model in training mode; under "eval" its BatchNorm layers use, and keep, the running statistics."""
    model.train()
    if batch_norm == "eval":
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
    return model


class LossTask(Task):
    """Minimise one loss by SGD; a subclass brings :meth:`loss`, :meth:`measure` and :meth:`output`."""

    proximal = True

    @abstractmethod
    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of one batch with its graph, a scalar."""

    def gradient(self, model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        """Loss and gradient of one batch: what an undefended client computes."""
        loss = self.loss(model, images, labels)
        parameters = list(trained_parameters(model).values())
        return loss, torch.autograd.grad(loss, parameters, materialize_grads=True)

    def step(self, scenario: Scenario, draws: Generator) -> GradientStep:
        """:meth:`gradient`, which draws nothing."""
        return self.gradient

    def train(self, model: nn.Module, given: LocalRound) -> LocalResult:
        """See :func:`local_update`."""
        samples = given.images, given.labels, given.batches
        return local_update(model, given.weights, *samples, given.scenario.training, given.step)


class Classify(LossTask):
    """Tell the class of an image: cross-entropy and the share of right answers."""

    figures = ("loss", "accuracy")

    def model(self, model: ModelConfig, gan: GanConfig) -> ModelConfig:
        """Itself; ConfigError for a generator and its critic, which tell no classes."""
        if model.name.startswith("wgan-gp"):
            raise ConfigError(
                f"setting 'model.name' = {model.name!r}: a generator and a critic, which tell no classes; use --task "
                "wgan-gp, or a classifier"
            )
        return model

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The :func:`fedattack.task.objective` of the model's logits."""
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


CLASSIFY = Classify()

batch_gradient: GradientStep = CLASSIFY.gradient
"""Loss and gradient of the mean cross-entropy of one batch: what an undefended client of a classifier computes."""


def objective_step(name: str) -> GradientStep:
    """How the gradient of a named objective of one batch is computed: "forget", the mean of ``-log(1 - p_y / 2)``.

    Its gradient vanishes where the label's probability does, so that ascent has an end (Pan et al., Federated
    unlearning with gradient descent and conflict mitigation, 2024).
    """
    if name != "forget":
        raise ConfigError(f"objective {name!r}: accepted: loss, forget")

    def step(model: nn.Module, images: Tensor, labels: Tensor) -> LossAndGradient:
        right = model(images).softmax(1).gather(1, labels[:, None]).squeeze(1)
        loss = -torch.log1p(-right / 2).mean()
        parameters = list(trained_parameters(model).values())
        return loss, torch.autograd.grad(loss, parameters, materialize_grads=True)

    return step


def local_update(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    batches: Sequence[NDArray[np.int64]],
    training: TrainingConfig,
    step: GradientStep = batch_gradient,
) -> LocalResult:
    """Train on the client's batches, from the received weights.

    Parameters
    ----------
    model : nn.Module
        Scratch space that is reused for every client: its weights are overwritten. Its layers must not draw random
        numbers (dropout), for those would come from torch's global stream.
    weights : mapping of str to Tensor
        The received state dict; not modified.
    images, labels : Tensor
        All samples of the client: float32 (N, C, H, W) in [0, 1] and int64 (N,).
    batches : sequence of ndarray of int64
        Positions in the samples, one array per step (:func:`batch_positions`).
    training : TrainingConfig
        BatchNorm uses the batch's or the received statistics, as `batch_norm` says. Under "fedsgd" the update is the
        gradient of the mean cross-entropy over the only batch, without weight decay (the optimiser is the server's).
        Under "fedavg" it is the weight change of SGD with learning rate, momentum and weight decay as in
        ``torch.optim.SGD``, its momentum starting at zero.
    step : callable
        How the loss and gradient of one batch are computed; a defence may have a say in it.

    Raises
    ------
    RunFailed
        If the loss becomes NaN or infinite, or the weights do not fit the model.
    """
    load_weights(model, weights)
    training_mode(model, training.batch_norm)
    trained = trained_parameters(model)
    if not trained:
        raise RunFailed("the model has no parameter that is trained: all are frozen (requires_grad False)")
    names, parameters = zip(*trained.items(), strict=True)
    device = parameters[0].device
    losses: list[Tensor] = []

    def gradient(batch: NDArray[np.int64]) -> tuple[Tensor, ...]:
        index = torch.from_numpy(batch)
        loss, found = step(model, images[index].to(device), labels[index].to(device))
        losses.append(loss.detach())
        return found

    if training.protocol == "fedsgd":
        if len(batches) != 1:
            raise RunFailed(f"protocol 'fedsgd' takes one batch a round, got {len(batches)}")
        update = gradient(batches[0])
    else:
        received = torch._foreach_clone([parameter.detach() for parameter in parameters])
        velocity: tuple[Tensor, ...] | None = None
        for batch in batches:
            slope = gradient(batch)
            with torch.no_grad():
                if training.weight_decay:
                    slope = torch._foreach_add(slope, parameters, alpha=training.weight_decay)
                if training.momentum:
                    if velocity is not None:
                        slope = torch._foreach_add(slope, velocity, alpha=training.momentum)
                    velocity = slope
                torch._foreach_add_(parameters, slope, alpha=-training.learning_rate)
        with torch.no_grad():
            update = torch._foreach_sub([parameter.detach() for parameter in parameters], received)
    loss = float(torch.stack(losses).mean())
    if not math.isfinite(loss):
        raise RunFailed(
            f"{DIVERGED}: the loss became {loss} (learning_rate {training.learning_rate}, "
            f"{len(batches)} steps); lower 'training.learning_rate'"
        )
    buffers = {name: b.detach().clone() for name, b in model.named_buffers() if b.is_floating_point()}
    seen = len(batches[0]) if len(batches) == 1 else np.unique(np.concatenate(batches)).size
    return LocalResult(dict(zip(names, update, strict=True)), buffers, loss, int(seen))


def train_alone(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    scenario: Scenario,
    rounds: int,
    seed: int,
    *keys: int,
) -> dict[str, Tensor]:
    """The state dict that a federation of one undefended client comes to, on the model's device.

    `model` is overwritten; every draw is of (seed, purpose, round, `keys`).
    """
    task, training, kept = task_of(scenario), scenario.training, dict[str, Tensor]()
    device = next(model.parameters()).device
    current = {name: tensor.to(device) for name, tensor in weights.items()}
    images, labels = images.to(device), labels.to(device)
    kind = weight_step(training, "gradient" if training.protocol == "fedsgd" else "delta")
    for number in range(1, rounds + 1):
        batches = batch_positions(len(labels), training, seed, number, keys[0] if keys else 0)
        draws = torch_rng(seed, "training", number, *keys)
        step = task.step(scenario, draws)
        given = LocalRound(current, images, labels, batches, scenario, step, draws, kept)
        result = task.train(model, given)
        kept = result.memory
        moved = {name: current[name] + kind * change for name, change in result.update.items()}
        current = {**current, **moved, **result.buffers}
    return current


def evaluate(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    batch_size: int = 512,
    task: Task = CLASSIFY,
) -> dict[str, float]:
    """The task's figures of `weights` in evaluation mode, as means over the samples; `model` is overwritten.

    Of a classifier "loss", the mean cross-entropy (NaN or infinite where the model has diverged), and "accuracy" in
    [0, 1]. Raises DataError without samples, RunFailed if the weights do not fit the model.
    """
    if len(labels) == 0:
        raise DataError("no samples to evaluate on")
    load_weights(model, weights)
    model.eval()
    device = next(model.parameters()).device
    total = dict.fromkeys(task.figures, 0.0)
    with torch.inference_mode():
        # in parts of one size: a last part of one image would have no figure that needs two
        parts = -(-len(labels) // batch_size)
        for some, truth in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            for name, figure in task.measure(model, some.to(device), truth.to(device)).items():
                total[name] += figure
    return {name: figure / len(labels) for name, figure in total.items()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a state dict into the model's own tensors, parameters and buffers; RunFailed where it does not fit."""
    own = model.state_dict()
    if own.keys() != weights.keys():
        raise RunFailed(f"weights do not fit the model: tensors {sorted(own.keys() ^ weights.keys())}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            found, wanted = tuple(weights[name].shape), tuple(tensor.shape)
            raise RunFailed(f"weights do not fit the model: {name!r} is {found}, should be {wanted}")
        tensor.copy_(weights[name])


@torch.no_grad()
def sample_logits(model: nn.Module, state: Mapping[str, Tensor], images: Tensor, chunk: int = 256) -> Tensor:
    """The model's answers under `state`, float32 (N, classes), on the CPU; `model` in eval mode."""
    device = next(model.parameters()).device
    state = {name: tensor.to(device) for name, tensor in state.items()}
    parts = [functional_call(model, state, (x.to(device),)).cpu() for x in images.split(chunk)]
    return torch.cat(parts)


def sample_losses(
    model: nn.Module, state: Mapping[str, Tensor], images: Tensor, labels: Tensor, chunk: int = 256
) -> Tensor:
    """Cross-entropy of each sample under `state`, float64 (N,), on the CPU; `model` in eval mode."""
    return cross_entropy(sample_logits(model, state, images, chunk), labels, reduction="none").double()
