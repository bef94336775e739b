"""One holder of all data who is the server: what a mechanism that needs the data itself works on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedattack.models import build_model
from fedattack.observation import Scenario
from fedattack.rng import torch_rng
from fedattack.task import objective, tied_names, trained_parameters
from fedattack.training import batches_without, remaining_positions, training_mode, weight_step
from fedattack.unlearning.cost import Cost
from fedattack.unlearning.history import Weights

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One step of SGD, before it is taken."""

    round: int  # from 1
    index: int  # within the round, from 0
    batch: Positions  # may be empty: a step that moves nothing
    before: Tensor  # trained parameters, flat (P,)
    gradient: Tensor  # of the mean loss over the batch, weight decay included, flat (P,)
    state: Weights  # parameters and buffers before the step, in the central type; not to be modified


@dataclass
class Central:
    """The data, the model and the training of the one who holds everything; every pass over samples is counted.

    Trained parameters go as one flat vector (P,) of type `dtype`, in the model's order. The model is in evaluation
    mode (BatchNorm by its running statistics) but in :meth:`walk`.

    Parameters
    ----------
    images, labels
        All samples: float32 (N, C, H, W) in [0, 1] and int64 (N,); positions count in them.
    seed, rounds
        Of the training: its batches are those of client 0.
    draws
        Batches after a deletion, as :func:`fedattack.training.batches_without`.
    """

    scenario: Scenario
    images: Tensor
    labels: Tensor
    seed: int
    rounds: int
    draws: Literal["kept", "anew"] = "kept"
    cost: Cost = field(default_factory=Cost)
    dtype: torch.dtype = torch.float64
    chunk: int = 1024  # samples in one pass
    brought: int = 0  # samples at the end that are not of the training (:meth:`joined`)

    @cached_property
    def model(self) -> nn.Module:
        """Scratch, in evaluation mode; its own weights mean nothing."""
        return build_model(self.scenario.model).to(self.dtype).eval()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the trained parameters."""
        return tuple(trained_parameters(self.model))

    @cached_property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the trained parameters."""
        return tuple(parameter.shape for parameter in trained_parameters(self.model).values())

    def __len__(self) -> int:
        return len(self.labels) - self.brought

    def joined(self, images: Tensor, labels: Tensor) -> tuple[Central, Positions]:
        """The same with samples that a request brings, whoever's they are, behind its own; and their positions.

        They can be looked at like any others, and are in no batch and not among the retained.
        """
        more = replace(
            self,
            images=torch.cat([self.images, images]),
            labels=torch.cat([self.labels, labels]),
            brought=self.brought + len(labels),
        )
        return more, np.arange(len(self.labels), len(more.labels))

    # ------------------------------------------------------------------ flat and not

    def flat(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The trained parameters of a state dict, (P,)."""
        return torch.cat([weights[name].detach().to(self.dtype).reshape(-1) for name in self.names])

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector as tensors by name."""
        pieces = flat.split([shape.numel() for shape in self.shapes])
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}

    def weights(self, flat: Tensor, base: Mapping[str, Tensor]) -> Weights:
        """The state dict `base` with these trained parameters, in its types."""
        whole = dict(base) | {n: p.detach().to(base[n].dtype).clone() for n, p in self.parts(flat).items()}
        return whole | {n: whole[first] for n, first in tied_names(self.model).items()}

    def _state(self, flat: Tensor, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers = {
            n: base[n].to(self.dtype) if base[n].is_floating_point() else base[n]
            for n in base
            if n not in self.names and n not in tied_names(self.model)
        }
        return buffers | self.parts(flat)

    # ------------------------------------------------------------------ losses and their derivatives

    def samples(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Images in the central type, and labels, at `positions`."""
        index = torch.from_numpy(np.asarray(positions, np.int64))
        return self.images[index].to(self.dtype), self.labels[index]

    def logits(self, flat: Tensor, base: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """The model's answers (n, classes), with their graph where `flat` has one."""
        return functional_call(self.model, self._state(flat, base), (images.to(self.dtype),))

    def loss(self, flat: Tensor, base: Mapping[str, Tensor], positions: Positions) -> Tensor:
        """Sum of the cross-entropies over `positions`, a scalar, with its graph where `flat` has one."""
        total = torch.zeros((), dtype=self.dtype)
        for part in self._chunks(positions):
            images, labels = self.samples(part)
            total = total + cross_entropy(self.logits(flat, base, images), labels, reduction="sum")
        return total

    def losses(self, flat: Tensor, base: Mapping[str, Tensor], positions: Positions) -> Tensor:
        """Each sample's cross-entropy, (n,), without a graph."""
        with torch.no_grad():
            pairs = (self.samples(part) for part in self._chunks(positions))
            found = [
                cross_entropy(self.logits(flat, base, images), labels, reduction="none")
                for images, labels in pairs
            ]
        return torch.cat(found) if found else torch.zeros(0, dtype=self.dtype)

    def gradient(self, flat: Tensor, base: Mapping[str, Tensor], positions: Positions) -> Tensor:
        """Gradient of :meth:`loss`, (P,)."""
        total = torch.zeros_like(flat)
        for part in self._chunks(positions):
            point = flat.detach().requires_grad_()
            total += torch.autograd.grad(self.loss(point, base, part), point)[0]
        self.count(len(positions))
        return total

    def product(
        self, flat: Tensor, base: Mapping[str, Tensor], vector: Tensor, positions: Positions
    ) -> Tensor:
        """The Hessian of :meth:`loss` times a vector, (P,); counts as two gradients."""
        total = torch.zeros_like(flat)
        for part in self._chunks(positions):
            point = flat.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(point, base, part), point, create_graph=True)
            if slope.requires_grad:
                (found,) = torch.autograd.grad(slope @ vector, point, allow_unused=True)
                total += 0 if found is None else found
        self.count(2 * len(positions))
        return total

    def count(self, samples: int) -> None:
        """Note that a forward and backward pass went over so many samples."""
        self.cost.gradients += samples / max(1, len(self))

    def _chunks(self, positions: Positions) -> list[Positions]:
        if not len(positions):
            return []
        return list(np.array_split(positions, -(-len(positions) // self.chunk)))

    # ------------------------------------------------------------------ the training, step by step

    def retained(self, excluded: Collection[int]) -> Positions:
        """Positions that are left, ascending."""
        return remaining_positions(len(self), excluded)

    def batches(self, round: int, excluded: Collection[int] = ()) -> list[Positions]:
        """Positions of each step's batch in a round."""
        training = self.scenario.training
        return batches_without(len(self), training, self.seed, round, 0, excluded, self.draws)

    def walk(
        self, weights: Mapping[str, Tensor], excluded: Collection[int] = (), first_round: int = 1
    ) -> Iterator[Step]:
        """Train from `weights` as the client would, step by step; the last thing to come is the end, its batch empty.

        SGD with the training's learning rate, momentum (which starts at zero in every round) and weight decay.
        """
        training = self.scenario.training
        rate = -weight_step(training, "gradient") if training.protocol == "fedsgd" else training.learning_rate
        names = [*self.names, *(n for n, _ in self.model.named_buffers())]
        state = {
            n: weights[n].detach().to(self.dtype if weights[n].is_floating_point() else weights[n].dtype)
            for n in names
        }
        state = {n: t.clone() for n, t in state.items()}
        empty = np.zeros(0, np.int64)
        nothing = torch.zeros(sum(shape.numel() for shape in self.shapes), dtype=self.dtype)
        for number in range(first_round, self.rounds + 1):
            velocity: Tensor | None = None
            for index, batch in enumerate(self.batches(number, excluded)):
                before = self.flat(state)
                if not len(batch):
                    yield Step(number, index, batch, before, nothing, state)
                    continue
                slope = self._training_gradient(state, batch)
                if training.weight_decay and training.protocol == "fedavg":
                    slope = slope + training.weight_decay * before
                yield Step(number, index, batch, before, slope, state)
                if training.momentum and training.protocol == "fedavg":
                    slope = slope if velocity is None else training.momentum * velocity + slope
                    velocity = slope
                state |= self.parts(before - rate * slope)
        yield Step(self.rounds + 1, 0, empty, self.flat(state), nothing, state)

    def train(
        self, weights: Mapping[str, Tensor], excluded: Collection[int] = (), first_round: int = 1
    ) -> Weights:
        """Where :meth:`walk` ends, as a state dict in the types of `weights`."""
        for step in self.walk(weights, excluded, first_round):
            last = step
        buffers = {n: last.state[n].to(weights[n].dtype) for n, _ in self.model.named_buffers()}
        return self.weights(last.before, {**weights, **buffers})

    def _training_gradient(self, state: dict[str, Tensor], batch: Positions) -> Tensor:
        """Gradient of the mean loss over a batch in training mode; BatchNorm's statistics in `state` move."""
        images, labels = self.samples(batch)
        training_mode(self.model, self.scenario.training.batch_norm)
        try:
            points = {n: state[n].detach().requires_grad_() for n in self.names}
            logits = functional_call(self.model, {**state, **points}, (images,))
            found = torch.autograd.grad(
                objective(self.model, logits, labels), list(points.values()), materialize_grads=True
            )
        finally:
            self.model.eval()
        self.count(len(batch))
        return torch.cat([one.reshape(-1) for one in found])

    # ------------------------------------------------------------------ the mechanism's own draws

    def rng(self, purpose: str, *keys: int) -> torch.Generator:
        """The stream of what a mechanism draws for `purpose`."""
        return torch_rng(self.seed, f"unlearning: {purpose}", *keys)
