"""A client's local steps: which of its images are in the batch of each, and how much each counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedattack.config import TrainingConfig
from fedattack.errors import NotApplicable
from fedattack.observation import Scenario

MOST_ORDERS = 24
"""Orders of the local batches that are tried for one guess of the images; each costs a simulation of the client."""


@dataclass(frozen=True)
class Schedule:
    """Local steps over B distinct images: for each step the positions, in [0, B), of its batch."""

    orders: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        seen = {position for order in self.orders for position in order}
        if not self.orders or not all(self.orders) or seen != set(range(len(seen))):
            raise ValueError(f"every one of the images 0 .. B - 1 must be in some step: {self.orders}")

    @property
    def images(self) -> int:
        """Distinct images (B)."""
        return 1 + max(position for order in self.orders for position in order)

    @property
    def steps(self) -> int:
        """Local steps (E)."""
        return len(self.orders)


def schedule_for(scenario: Scenario, num_examples: int) -> Schedule:
    """What a server can assume about the local steps of a client that declares `num_examples` distinct samples.

    Images have no names, so that in the first pass over the client's data the first batch may be called
    images 0 to b - 1, the second b to 2b - 1 and so on, without loss of generality. A client that goes
    through its data more than once shuffles anew each time; that order is not sent, and is assumed to be the
    first one again.

    NotApplicable if `num_examples` cannot come from these steps.
    """
    training = scenario.training
    size, steps = training.batch_size, training.local_steps
    if num_examples < 1:
        raise NotApplicable(f"the client declares {num_examples} samples: there is nothing to reconstruct")
    if size == 0 or num_examples <= size:
        return Schedule((tuple(range(num_examples)),) * steps)
    if num_examples > steps * size:
        raise NotApplicable(
            f"the client declares {num_examples} samples, but training.local_steps = {steps} batches of "
            f"training.batch_size = {size} hold {steps * size}"
        )
    epoch = [tuple(range(start, min(start + size, num_examples))) for start in range(0, num_examples, size)]
    return Schedule(tuple(epoch[step % len(epoch)] for step in range(steps)))


def epochs_for(scenario: Scenario, num_examples: int) -> tuple[Schedule, int]:
    """:func:`schedule_for` with images of its own for each pass over the client's data, and the number of passes.

    Which image of one pass is which of another is not known, as clients shuffle anew. The images of pass e, from 0,
    are e B to e B + B - 1; of a last one that is broken off, those in its batches. Where each batch is all of the
    client's data there is nothing to shuffle: one pass.
    """
    first, size = schedule_for(scenario, num_examples), scenario.training.batch_size
    if size == 0 or num_examples <= size:
        return first, 1
    steps = -(-num_examples // size)
    orders = (
        tuple(position + step // steps * num_examples for position in order)
        for step, order in enumerate(first.orders)
    )
    return Schedule(tuple(orders)), -(-first.steps // steps)


def schedules_for(scenario: Scenario, num_examples: int) -> list[Schedule]:
    """Every schedule under which `num_examples` known images may have been seen, that of :func:`schedule_for` first.

    One where all images are in every step; else each assignment of images to steps. NotApplicable if images
    are seen again in another batch (several epochs of several batches), or the orders are too many.
    """
    first, training = schedule_for(scenario, num_examples), scenario.training
    size, steps = training.batch_size, training.local_steps
    if size == 0 or num_examples <= size:
        return [first]
    if num_examples != steps * size:
        raise NotApplicable(
            f"training.local_steps = {steps} with training.batch_size = {size}: {num_examples} samples are drawn "
            "anew in another epoch, and in which batches they meet is not known; use batch_size 0 or fewer "
            "local_steps"
        )
    count = math.factorial(num_examples) // math.factorial(size) ** steps
    if count > MOST_ORDERS:
        raise NotApplicable(
            f"training.local_steps = {steps} with training.batch_size = {size}: {count:,} orders of the samples are "
            f"possible, and at most {MOST_ORDERS} are tried; use fewer local_steps or batch_size 0"
        )
    return [Schedule(tuple(order)) for order in _assignments(tuple(range(num_examples)), size)]


def _assignments(samples: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Ordered partitions of `samples` into batches of `size`."""
    if not samples:
        yield []
        return
    for batch in itertools.combinations(samples, size):
        rest = tuple(sample for sample in samples if sample not in batch)
        for later in _assignments(rest, size):
            yield [batch, *later]


def step_weights(training: TrainingConfig) -> list[float]:
    """How often each step's gradient enters the weights: ``c_t = 1 + m + ... + m^(T-t)`` for momentum m."""
    return [
        sum(training.momentum**age for age in range(training.local_steps - step))
        for step in range(training.local_steps)
    ]
