"""What an attack is: a small object with its hyper-parameters as dataclass fields, a `check` and a `run`.

A new attack is one file with a dataclass below one of the three family bases, one line in
:data:`adversaries.ATTACKS`, and one test.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fedattack.observation import (
    Scenario,
)
from fedattack.registry import build_plugin, plugin_options

Progress = Callable[[float, str], None]
"""Called with (share done in [0, 1], short text); free to ignore."""


def no_progress(share: float, text: str) -> None:
    """A :data:`Progress` that shows nothing."""


def share_of(progress: Progress, low: float, high: float, prefix: str = "") -> Progress:
    """A part's progress, as that of the whole from `low` to `high`."""
    return lambda share, text: progress(low + (high - low) * share, prefix + text)


@dataclass
class Attack(ABC):
    """Base of every attack.

    Attributes
    ----------
    family : str
        "reconstruction", "membership" or "unlearning".
    seat : str
        Who runs it: "server" or "client".
    needs : str
        One line for a person: what it must see or be granted.
    """

    family: ClassVar[Literal["reconstruction", "membership", "unlearning"]]
    seat: ClassVar[Literal["server", "client"]] = "server"
    needs: ClassVar[str] = ""

    def check(self, scenario: Scenario) -> None:
        """Refuse a scenario this attack cannot apply to, before anything starts.

        Raises
        ------
        NotApplicable
            In one sentence: what stands in the way and what would help.
        """
        del scenario


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
