"""What an attack is: a small object with its hyper-parameters as dataclass fields.

A new attack is one file with a dataclass below a seat (:mod:`adversaries.seats`) and a family's base, one line in
:data:`adversaries.ATTACKS`, and one test.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedattack.observation import Scenario
from fedattack.registry import build_plugin, plugin_options

Progress = Callable[[float, str], None]
"""Called with (share done in [0, 1], short text); free to ignore."""


def no_progress(share: float, text: str) -> None:
    """A :data:`Progress` that shows nothing."""


@dataclass
class Attack(ABC):
    """Base of every attack.

    Attributes
    ----------
    family : str
        What is asked; set by the family's base.
    seat : str
        Who runs it; set by the seats of :mod:`adversaries.seats`.
    needs : str
        One line for a person: what it must see or be granted.
    """

    family: ClassVar[str]
    seat: ClassVar[str] = "curious server"
    needs: ClassVar[str] = ""

    def check(self, scenario: Scenario) -> None:
        """Refuse a scenario this attack cannot apply to, before anything starts.

        Raises
        ------
        NotApplicable
            In one sentence: what stands in the way and what would help.
        """
        del scenario

    def needs_history(self, scenario: Scenario) -> bool:
        """Whether a client's later updates are read with its earlier ones.

        Then the attack is given all updates that the server saw of its victims up to the last attacked round.
        """
        del scenario
        return False


def build_attack(
    cls: type[Attack], name: str, options: Mapping[str, Any], shared: Mapping[str, Any]
) -> Attack:
    """Build an attack from its own options and from those shared by all selected attacks.

    Raises
    ------
    ConfigError
        If one of its own options is unknown or malformed. Shared options that it lacks are passed over; the caller
        sees to it that each is known to at least one attack.
    """
    return build_plugin(cls, name, options, shared)


def attack_options(cls: type[Attack]) -> dict[str, Any]:
    """Parameter -> default of an attack, for `fedattack list` and the docs."""
    return plugin_options(cls)
