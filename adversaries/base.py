"""What an attack is: a small object with its hyper-parameters as dataclass fields, its needs as data, and a `run`.

A new attack is one file with a dataclass below a seat (:mod:`adversaries.seats`) and a family's base, one
line in :data:`adversaries.ATTACKS`, and one test.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from adversaries.needs import Facts, Needs
from fedattack.observation import Scenario
from fedattack.registry import check_values

Progress = Callable[[float, str], None]
"""Called with (share done in [0, 1], short text); free to ignore."""


def no_progress(share: float, text: str) -> None:
    """A :data:`Progress` that shows nothing."""


def share_of(progress: Progress, low: float, high: float, prefix: str = "") -> Progress:
    """A part's progress, as that of the whole from `low` to `high`."""
    return lambda share, text: progress(low + (high - low) * share, prefix + text)


@dataclass(frozen=True)
class Effort:
    """The most that an attack spends on one victim, in passes through the model that is attacked.

    Attributes
    ----------
    gradients : int
        Gradients of the victim's batch.
    slopes : int
        Gradients, each with the derivative of a distance from it by the images: two differentiations.
    products : int
        Products with the gradient's Jacobian by the images.
    whole : bool
        Whether each is of all images of the update, where the client took them in several steps.
    """

    gradients: int = 0
    slopes: int = 0
    products: int = 0
    whole: bool = False

    @property
    def second_order(self) -> bool:
        """Whether gradients are differentiated, so that the graph of one is held."""
        return self.slopes > 0 or self.products > 0


@dataclass
class Attack(ABC):
    """Base of every attack.

    Attributes
    ----------
    family, seat : str
        What is asked, set by the family's base; who runs it, set by the seats of :mod:`adversaries.seats`.
    inverts : bool
        Whether it rebuilds images.
    needs : Needs
        What it must see or be granted, with its default settings; see :meth:`needs_now`.
    """

    family: ClassVar[str]
    seat: ClassVar[str] = "curious server"
    inverts: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        """Raise ConfigError for values that its annotations do not allow."""
        check_values(self, getattr(self, "name", type(self).__name__.lower()))

    def needs_now(self, scenario: Scenario) -> Needs:
        """What it needs with its own settings in one scenario (a width that grows with the batch, ...)."""
        return self.needs

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Try, where its needs are met, what only trying tells: read the files it names, trace the model.

        Raise NotApplicable in one sentence: what stands in the way and what would help; ConfigError or
        DataError if a setting names what is not there.
        """
        del scenario, facts

    def effort(self, scenario: Scenario, images: int) -> Effort | None:
        """What it spends at most on an update of so many `images`; None: not known before it runs."""
        del scenario, images
        return None

    def needs_history(self, scenario: Scenario) -> bool:
        """Whether a client's later updates are read with its earlier ones.

        Then the attack is given all updates that the server saw of its victims up to the last attacked round.
        """
        return False
