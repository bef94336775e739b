"""A network's rows, one beside the other: what each answers to an image, and which parameters are its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedattack.errors import NotApplicable
from fedattack.task import tied_names, trained_parameters


@dataclass(frozen=True)
class Row:
    """One output of a linear layer, or one filter of a convolution."""

    layer: str  # the module's name in the model
    index: int  # along the first dimension of its weight


class Hypercolumn:
    """All rows of a model's ``Linear`` and ``Conv2d`` layers, in the order in which the model names them.

    A row's answer is its layer's output: of a convolution the mean over the pixels, of a linear layer that is
    applied to several places (B, ..., features) the mean over these; where a layer is called more than once, the mean
    over its calls. A row's parameters are its line of the weight, and its bias. Layers are told apart by name, so
    that equal ones do not matter. What belongs to no such row (BatchNorm, embeddings) is in no hypercolumn, nor is a
    layer of which nothing is trained.

    Raises
    ------
    NotApplicable
        If the model has no such layer.
    """

    def __init__(self, model: nn.Module) -> None:
        trained, starts = trained_parameters(model), dict[str, int]()
        self.count = 0  # of the trained parameters, P
        for name, parameter in trained.items():
            starts[name] = self.count
            self.count += parameter.numel()
        first = tied_names(model)
        self.rows: list[Row] = []
        self._layers: dict[str, nn.Module] = {}
        self._widths: dict[str, int] = {}
        self._own: list[Tensor] = []
        for layer, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            pieces = []
            for part in ("weight", "bias"):
                name = f"{layer}.{part}" if layer else part
                name = first.get(name, name)
                if name in trained:
                    size = trained[name].numel()
                    every = torch.arange(starts[name], starts[name] + size)
                    pieces.append(every.view(len(trained[name]), -1))
            if pieces:
                own = torch.cat(pieces, 1)
                self._layers[layer], self._widths[layer] = module, len(own)
                self.rows += [Row(layer, index) for index in range(len(own))]
                self._own += list(own)
        if not self.rows:
            raise NotApplicable(
                f"a scrub needs a model with a linear layer or a convolution that is trained, which "
                f"{type(model).__name__} is not"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def positions(self, columns: Sequence[int]) -> Tensor:
        """Where the parameters of these rows are in the flat vector of the trained ones, int64, ascending."""
        if not len(columns):
            return torch.zeros(0, dtype=torch.int64)
        return torch.cat([self._own[column] for column in columns]).unique()

    def answers(self, forward: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """The hypercolumn of each image (B, rows), and what `forward`, the model, answers to it.

        The model must be in evaluation mode, or one image's hypercolumn depends on the others'.
        """
        seen: dict[str, list[Tensor]] = {layer: [] for layer in self._layers}
        with ExitStack() as hooks, torch.no_grad():
            for layer, module in self._layers.items():
                hooks.callback(module.register_forward_hook(partial(_note, seen[layer])).remove)
            answer = forward(images)
        parts = [
            torch.stack(calls).mean(0) if calls else images.new_zeros(len(images), self._widths[layer])
            for layer, calls in seen.items()
        ]
        return torch.cat(parts, 1), answer


def _note(seen: list[Tensor], module: nn.Module, _: Any, output: Tensor) -> None:
    if isinstance(module, nn.Conv2d):
        seen.append(output.mean((2, 3)))
    else:
        seen.append(output.flatten(1, -2).mean(1) if output.ndim > 2 else output)
