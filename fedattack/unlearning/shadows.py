"""Many models of one architecture at once, as the rows of a matrix, and the trainings that an audit compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedattack.config import ModelConfig, TrainingConfig
from fedattack.errors import RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.task import tied_names, trained_parameters
from fedattack.training import batch_positions

SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, classes) and what they are held against, (B, ...), to each sample's loss, (B,)."""


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Each sample's cross-entropy."""
    return cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class Batch:
    """A batch for each of M models."""

    positions: Tensor  # int64 (M, B)
    shares: Tensor  # float32 (M, B): what each sample's loss counts; 0: not in the batch

    @classmethod
    def of(cls, rows: Sequence[NDArray[np.int64]], width: int) -> Batch:
        """Means over batches of different sizes, at most `width`; an empty one counts nothing."""
        positions = torch.zeros(len(rows), width, dtype=torch.int64)
        shares = torch.zeros(len(rows), width)
        for number, row in enumerate(rows):
            positions[number, : len(row)] = torch.from_numpy(row)
            shares[number, : len(row)] = 1 / max(1, len(row))
        return cls(positions, shares)

    @property
    def filled(self) -> Tensor:
        """Which models have a sample in it, bool (M, 1)."""
        return self.shares.any(1, keepdim=True)


@dataclass
class Stack:
    """M models on the same samples; their trained parameters are the rows of a matrix (M, P), in evaluation mode.

    Parameters
    ----------
    images, labels : Tensor
        float32 (N, C, H, W) in [0, 1] and int64 (N,).
    base : mapping of str to Tensor
        Where buffers and frozen parameters, alike in all models, come from.
    """

    model: ModelConfig
    images: Tensor
    labels: Tensor
    base: Mapping[str, Tensor]
    passes: int = 0  # samples taken forwards and backwards so far
    at_once: int | None = None  # models; None: all

    def __post_init__(self) -> None:
        self._module = build_model(self.model).eval()
        own = trained_parameters(self._module)
        self._names, self._shapes = list(own), [parameter.shape for parameter in own.values()]
        self._tied = tied_names(self._module)
        self._rest = {name: tensor for name, tensor in self.base.items() if name not in own}

    @property
    def classes(self) -> int:
        """Width of the head."""
        return self.model.resolved[2]

    def rows(self, states: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The models' trained parameters, float32 (M, P)."""
        return torch.stack([torch.cat([state[n].flatten() for n in self._names]) for state in states])

    def state(self, row: Tensor) -> dict[str, Tensor]:
        """The state dict of one row, (P,)."""
        state = {**self.base, **{name: part.clone() for name, part in self._parts(row).items()}}
        return state | {name: state[kept] for name, kept in self._tied.items()}

    def logits(self, rows: Tensor, images: Tensor) -> Tensor:
        """The models' answers to the same images, float32 (M, n, classes)."""
        with torch.no_grad():
            answer = vmap(self._answer, in_dims=(0, None), chunk_size=self.at_once)
            return torch.cat([answer(rows, some) for some in images.split(512)], 1)

    def gradient(
        self, rows: Tensor, batch: Batch, targets: Tensor | None = None, loss: SampleLoss = label_loss
    ) -> Tensor:
        """Gradient of the sum of ``shares * loss`` of each model, (M, P).

        `targets`, (M, N, ...): what each model's answers are held against; None: the labels.
        """

        def summed(row: Tensor, images: Tensor, held: Tensor, shares: Tensor) -> Tensor:
            return (loss(self._answer(row, images), held) * shares).sum()

        own = torch.arange(len(rows))[:, None]
        held = self.labels[batch.positions] if targets is None else targets[own, batch.positions]
        self.passes += int((batch.shares > 0).sum())
        gradient = vmap(grad(summed), chunk_size=self.at_once)
        return gradient(rows, self.images[batch.positions], held, batch.shares)

    def _answer(self, row: Tensor, images: Tensor) -> Tensor:
        return functional_call(self._module, {**self._rest, **self._parts(row)}, (images,))

    def _parts(self, row: Tensor) -> dict[str, Tensor]:
        parts = row.split([shape.numel() for shape in self._shapes])
        return {n: p.view(s) for n, p, s in zip(self._names, parts, self._shapes, strict=True)}


def drawn(members: NDArray[np.bool_], size: int, steps: int, draws: Sequence[Generator]) -> Iterator[Batch]:
    """Batches of each model's members, (M, N), one for each step: a random order of them, drawn anew when used up.

    `size` 0, or no less than a model has: all of them in every step.
    """
    walks = [_walk(np.flatnonzero(row), size, draw) for row, draw in zip(members, draws, strict=True)]
    for _ in range(steps):
        rows = [next(walk) for walk in walks]
        yield Batch.of(rows, max(len(row) for row in rows))


def _walk(positions: NDArray[np.int64], size: int, draw: Generator) -> Iterator[NDArray[np.int64]]:
    """One model's batches, without end."""
    while True:
        if size == 0 or size >= len(positions):
            yield positions
            continue
        order = positions[torch.randperm(len(positions), generator=draw).numpy()]
        yield from (order[start : start + size] for start in range(0, len(order), size))


def trained(
    stack: Stack,
    rows: Tensor,
    members: NDArray[np.bool_],
    training: TrainingConfig,
    rounds: int,
    seeds: Sequence[int],
) -> Tensor:
    """Train each model on its members, (M, N), as a federation of one client does, from `rows`; (M, P).

    Model m draws its batches as client 0 of seed m does of all N samples, and leaves out of them what is not its own.
    An empty batch is a step without movement. RunFailed if a training diverges.
    """
    rate = training.learning_rate
    if training.protocol == "fedsgd":
        rate = training.server_learning_rate or rate
    count = len(stack.labels)
    for number in range(1, rounds + 1):
        # as batches_without leaves them, quicker
        walks = [
            [batch[own[batch]] for batch in batch_positions(count, training, seed, number, 0)]
            for seed, own in zip(seeds, members, strict=True)
        ]
        velocity = torch.zeros_like(rows)
        for step in zip(*walks, strict=True):
            batch = Batch.of(step, max(len(positions) for positions in step))
            slope = stack.gradient(rows, batch)
            if training.protocol == "fedavg":
                slope = slope + training.weight_decay * rows
                velocity = slope = torch.where(batch.filled, training.momentum * velocity + slope, velocity)
            rows = torch.where(batch.filled, rows - rate * slope, rows)
    if not bool(rows.isfinite().all()):
        raise RunFailed("a shadow training diverged; lower 'training.learning_rate'")
    return rows


def first_rows(stack: Stack, seeds: Sequence[int]) -> Tensor:
    """Initial weights of each seed, as a federation draws them, (M, P)."""
    return stack.rows([initial_weights(stack.model, seed) for seed in seeds])
