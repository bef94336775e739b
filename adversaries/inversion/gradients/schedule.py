"""Which of a victim's images are in the batch of each local step."""

from __future__ import annotations

from dataclasses import dataclass

from fedattack.errors import NotApplicable
from fedattack.observation import Scenario


@dataclass(frozen=True)
class Schedule:
    """Local steps over B distinct images.

    Attributes
    ----------
    orders : tuple of tuple of int
        For each local step the positions, in [0, B), of the images in its batch.
    """

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
    """What a server can assume about a client's local steps.

    Images have no names, so that in the first pass over the client's data the first batch may be called images 0 to
    b - 1, the second b to 2b - 1 and so on, without loss of generality. A client that goes through its data more than
    once shuffles anew each time; that order is not sent, and is assumed to be the first one again.

    Parameters
    ----------
    scenario : Scenario
    num_examples : int
        Distinct samples that the client says it used. Fewer than steps times batch size mean that it has no more.

    Returns
    -------
    Schedule

    Raises
    ------
    NotApplicable
        If `num_examples` cannot come from these steps.
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
