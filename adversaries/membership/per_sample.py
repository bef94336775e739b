"""Per-sample gradients of a classifier, and what membership statistics ask of them: norms and inner products."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from adversaries.membership import layers
from adversaries.membership.layers import RULES, Outer, Part, Piece, Rows
from fedattack.errors import PayloadError
from fedattack.observation import Candidates, Update
from fedattack.task import trained_parameters
from fedattack.training import load_weights

Block = dict[str, Piece]
"""Trained parameter, in the model's order -> the gradients of some samples."""

HELD = 256 * 2**20
"""Numbers of per-sample gradients that are kept (1 GiB of float32); more are worked out again."""

SMALL = 10_000
"""Parameters up to which everything is in double precision, where the device has it."""

_TOGETHER = 64
"""Samples that go through the model at once."""


class Gradients:
    """Gradients of the cross-entropy of N samples at some weights, block by block, as far as they must be formed.

    Parameters
    ----------
    model : nn.Module
        In eval mode, on the device to compute on. Only its architecture is used.
    weights : mapping of str to Tensor
        Parameters and buffers to differentiate at.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], samples: Candidates) -> None:
        self.names = list(trained_parameters(model))
        self._tensors = (
            self.names,
            [tuple(parameter.shape) for parameter in trained_parameters(model).values()],
        )
        self.device = next(model.parameters()).device
        small = sum(parameter.numel() for parameter in model.parameters()) <= SMALL
        self.dtype = torch.float64 if small and self.device.type != "mps" else torch.float32
        self._model = copy.deepcopy(model).to(self.dtype)
        load_weights(self._model, weights)
        self._samples = samples
        self._kept: list[Block] = []

    def __len__(self) -> int:
        return len(self._samples.labels)

    def blocks(self) -> Iterator[Block]:
        """The samples' gradients in order, some samples at a time; the second time without work where all fit."""
        if self._kept or not len(self):
            yield from self._kept
            return
        each = sum(piece.floats for piece in self._some(0, 1).values())
        size = max(1, HELD // (4 * each))
        keep = each * len(self) <= HELD
        some = (self._some(start, start + size) for start in range(0, len(self), min(size, len(self))))
        if keep:
            self._kept = list(some)
        yield from self._kept if keep else some

    def _some(self, start: int, stop: int) -> Block:
        found: dict[str, list[Piece]] = {name: [] for name in self.names}
        samples = self._samples
        for images, labels in zip(
            samples.images[start:stop].split(_TOGETHER),
            samples.labels[start:stop].split(_TOGETHER),
            strict=True,
        ):
            x, y = images.to(self.device, self.dtype), labels.to(self.device)
            for name, piece in per_sample(self._model, x, y).items():
                found[name].append(piece)
        return {name: _joined(pieces) for name, pieces in found.items()}

    def parts(self, update: Update) -> dict[str, Part]:
        """An update's entries by tensor; PayloadError if it is not over the model's parameters."""
        theirs, own = (list(zip(*one, strict=True)) for one in ((update.names, update.shapes), self._tensors))
        if theirs != own:
            has, wanted = next(pair for pair in zip_longest(theirs, own) if pair[0] != pair[1])
            raise PayloadError(f"an update of another model: tensor {has} where the model has {wanted}")
        whole = update.indices is None
        return {
            name: Part(None if whole else positions.to(self.device), values.to(self.device, self.dtype))
            for name, _, positions, values in update.layers()
        }


class _Tap(torch.autograd.Function):
    """Hands on what it is given, and keeps the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, pulled: Tensor, slopes: list[Tensor]) -> Tensor:
        ctx.slopes = slopes
        return output.detach()  # no copy, and free to be overwritten

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.slopes.append(slope)
        return slope, slope.new_zeros(()), None


def per_sample(model: nn.Module, images: Tensor, labels: Tensor) -> Block:
    """Gradients of every sample's cross-entropy at the model's own weights."""
    wanted = trained_parameters(model)
    names = {id(parameter): name for name, parameter in wanted.items()}
    owners = [
        (module, own, names[id(p)])
        for module in model.modules()
        for own, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in names
    ]
    shared = {name for _, _, name in owners if sum(name == other for _, _, other in owners) > 1}
    seen: dict[nn.Module, list[tuple[Tensor, list[Tensor]]]] = {}
    pulled = torch.zeros((), dtype=images.dtype, device=images.device, requires_grad=True)

    def tap(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        slopes: list[Tensor] = []
        seen.setdefault(layer, []).append((inputs[0].detach(), slopes))
        return _Tap.apply(output, pulled, slopes)

    tapped = dict.fromkeys(module for module, _, name in owners if type(module) in RULES)
    handles = [module.register_forward_hook(tap) for module in tapped]
    try:
        with torch.enable_grad():
            loss = functional.cross_entropy(model(images), labels, reduction="sum")
    finally:
        for handle in handles:
            handle.remove()
    if seen:
        torch.autograd.grad(loss, pulled)
    found: dict[str, Piece] = {}
    with torch.no_grad():
        for module, calls in seen.items():
            (inputs, slopes), *again = calls
            pieces = {} if again else RULES[type(module)](module, inputs, slopes[0]) or {}
            found |= {
                name: pieces[own]
                for owner, own, name in owners
                if owner is module and own in pieces and name not in shared
            }
    if rest := [name for name in wanted if name not in found]:
        found |= _differentiated(model, rest, images, labels)
    return {name: found[name] for name in wanted}


def _differentiated(model: nn.Module, names: list[str], images: Tensor, labels: Tensor) -> dict[str, Rows]:
    """Per-sample gradients over some parameters, whatever layers they are of."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: tensor.detach() for name, tensor in state.items()}

    def loss(moving: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**state, **moving}, (image[None],))
        return functional.cross_entropy(logits, label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))({name: state[name] for name in names}, images, labels)
    return {name: Rows(found[name].flatten(1)) for name in names}


def _joined(pieces: Sequence[Piece]) -> Piece:
    """The gradients of all samples of one tensor."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], Outer):
        outer = [piece for piece in pieces if isinstance(piece, Outer)]
        return Outer(torch.cat([piece.left for piece in outer]), torch.cat([piece.right for piece in outer]))
    return Rows(torch.cat([piece.rows for piece in pieces if isinstance(piece, Rows)]))


def products(gradients: Gradients, updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """Inner product of every sample's gradient with every update, and the gradients' norms.

    Returns float64 (K, N) and (N,), on the CPU; norms are over all parameters, sent or not, and a sparse update
    counts as zero where nothing was sent. PayloadError if an update is not over the model's parameters.
    """
    parts = [gradients.parts(update) for update in updates]
    found, lengths = [torch.zeros(len(updates), 0).double()], [torch.zeros(0).double()]
    for block in gradients.blocks():
        some = [piece.dot([part[name] for part in parts]) for name, piece in block.items()]
        found.append(torch.stack(some).sum(0).double().cpu())
        lengths.append(_lengths(block))
    return torch.cat(found, 1), torch.cat(lengths)


def norms(gradients: Gradients) -> Tensor:
    """Norm of every sample's gradient over all parameters, float64 (N,), on the CPU."""
    return torch.cat([torch.zeros(0).double(), *(_lengths(block) for block in gradients.blocks())])


def _lengths(block: Block) -> Tensor:
    return torch.stack([piece.squares() for piece in block.values()]).sum(0).sqrt().double().cpu()


def gram(sets: Sequence[Gradients], entries: Update | None = None) -> Tensor:
    """Inner products among the gradients of all samples of some sets, float64 (n, n), on the CPU.

    `entries`: over the entries that this update sent, instead of all.
    """
    found = torch.zeros(sum(map(len, sets)), sum(map(len, sets)), dtype=torch.float64)
    if entries is None or entries.indices is None:
        for start, first in _numbered(sets):
            for place, second in _numbered(sets):
                if place > start:
                    break
                found[_rows(start, first), _rows(place, second)] = _gram(first, second).double().cpu()
    else:
        places = {name: part.positions for name, part in sets[0].parts(entries).items()}
        for some in _chunks(places, max(1, layers.MEMORY // max(1, len(found)))):
            picked = [
                torch.cat([block[name].columns(positions) for name, positions in some.items()], 1)
                for _, block in _numbered(sets)
            ]
            # In few blocks, of which half the pairs will do.
            for start, rows in (tall := _tall(torch.cat(picked))):
                for place, others in tall:
                    if place <= start:
                        here = slice(start, start + len(rows)), slice(place, place + len(others))
                        found[here] += (rows @ others.T).double().cpu()
    return found.tril() + found.tril(-1).T


def _numbered(sets: Sequence[Gradients]) -> Iterator[tuple[int, Block]]:
    """The blocks of all sets, and the number of each one's first sample."""
    start = 0
    for one in sets:
        for block in one.blocks():
            yield start, block
            start += _count(block)


def _count(block: Block) -> int:
    piece = next(iter(block.values()))
    return len(piece.left if isinstance(piece, Outer) else piece.rows)


def _rows(start: int, block: Block) -> slice:
    return slice(start, start + _count(block))


def _gram(first: Block, second: Block) -> Tensor:
    each = (piece.gram(second[name]) for name, piece in first.items())  # type: ignore[arg-type]
    found = next(each)
    for part in each:
        found += part
    return found


def _tall(rows: Tensor, blocks: int = 6) -> list[tuple[int, Tensor]]:
    size = max(1, -(-len(rows) // blocks))
    return [(start, rows[start : start + size]) for start in range(0, len(rows), size)]


def _chunks(places: Mapping[str, Tensor | None], size: int) -> Iterator[dict[str, Tensor]]:
    """Positions by tensor, `size` of them at a time."""
    waiting: dict[str, Tensor] = {}
    room = size
    for name, positions in places.items():
        while positions is not None and len(positions):
            waiting[name], positions = positions[:room], positions[room:]
            room -= len(waiting[name])
            if not room:
                yield waiting
                waiting, room = {}, size
    if waiting:
        yield waiting
