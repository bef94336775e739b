"""Training on public images: what is held out, the descent, the share that is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adversaries.base import Progress, no_progress
from adversaries.inversion.learning import files
from adversaries.inversion.matching.checkpoint import checkpoints_in
from fedattack.errors import DataError, NotApplicable, RunFailed
from fedattack.observation import Auxiliary, Observation, Scenario
from fedattack.rng import numpy_rng


def hold_out(auxiliary: Auxiliary, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to train on and to test on, sorted; whole people where the auxiliary data says who is who.

    DataError if either side would be empty.
    """
    groups = auxiliary.groups if auxiliary.groups is not None else torch.arange(len(auxiliary))
    names = groups.unique()
    order = numpy_rng(seed, "learned.hold-out").permutation(len(names))
    held = names[torch.from_numpy(order[: round(len(names) * share)])]
    mask = torch.isin(groups, held)
    if not mask.any() or mask.all():
        raise DataError(
            f"{len(auxiliary)} auxiliary images of {len(names)} people or images cannot be cut {share:.0%} to "
            f"{1 - share:.0%}; grant more of them"
        )
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def check_shapes(scenario: Scenario, auxiliary: Auxiliary) -> None:
    """DataError for auxiliary images that are not of the federation's shape."""
    found = tuple(auxiliary.images.shape[1:])
    if found != scenario.image_shape:
        raise DataError(
            f"auxiliary images of shape {found} do not fit the federation's {scenario.image_shape}"
        )


def descend(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    count: int,
    epochs: int,
    learning_rate: float,
    stream: torch.Generator,
    progress: Progress = no_progress,
    batch: int = 64,
) -> None:
    """Adam over shuffled batches, its rate falling from `learning_rate` to zero along half a cosine.

    `loss` maps positions (n,) among the `count` samples to a scalar; RunFailed if it becomes NaN or infinite.
    """
    batch = min(batch, count)
    steps = epochs * (count // batch)
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    for epoch in range(epochs):
        order = torch.randperm(count, generator=stream)
        # A last short batch would make BatchNorm's statistics noisy.
        for step, chosen in enumerate(order[: count // batch * batch].split(batch)):
            optimiser.zero_grad()
            value = loss(chosen)
            value.backward()
            optimiser.step()
            schedule.step()
            if step % 20 == 0:
                shown = float(value.detach())
                if not math.isfinite(shown):
                    raise RunFailed(f"training diverged: the loss became {shown}; lower the learning rate")
                done = epoch * (count // batch) + step
                progress(done / steps, f"training, epoch {epoch + 1}/{epochs}, loss {shown:.4g}")


T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
_KEPT: dict[Hashable, Any] = {}
_ROOM = 4


def once(key: Hashable, make: Callable[[], T]) -> T:
    """The result of `make`, remembered under `key` for the last few keys of this process.

    Victims of one round come in several calls; `make` depends on `key` alone, so nothing but time changes.
    """
    if key not in _KEPT:
        while len(_KEPT) >= _ROOM:
            del _KEPT[next(iter(_KEPT))]
        with checkpoints_in(None):  # whether it is asked depends on what ran before
            _KEPT[key] = make()
    return _KEPT[key]


def key(attack: object, observation: Observation, size: int, public: Auxiliary, seed: int) -> Hashable:
    """For :func:`once`: all that what an attack trains for clients with batches of `size` images depends on."""
    made_for = files.described(observation.scenario, observation.weights, size, observation.round)
    return (repr(attack), repr(made_for), identity(public), seed)


def public_images(observation: Observation, attack: str, least: int = 32) -> Auxiliary:
    """The auxiliary images to train on.

    NotApplicable if none, or too few, were granted; DataError if they are of another shape than the federation's.
    """
    granted = observation.auxiliary
    if granted is None or len(granted) < least:
        count = 0 if granted is None else len(granted)
        raise NotApplicable(
            f"attack {attack!r} trains on auxiliary images, and {count} were granted; grant at least {least} (data."
            "auxiliary, data.auxiliary_size)"
        )
    check_shapes(observation.scenario, granted)
    return granted


def identity(auxiliary: Auxiliary) -> str:
    """A fingerprint of public images."""
    return files.fingerprint({"images": auxiliary.images})


def initialised(make: Callable[[], M], seed: int, purpose: str) -> M:
    """A module whose weights come from the stream (seed, purpose) alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(numpy_rng(seed, purpose).integers(2**31)))
        return make()
