"""Numbers that can never work, refused when an attack is built."""

from __future__ import annotations

import math

from fedattack.errors import ConfigError


def at_least(attack: str, settings: object, **least: int) -> None:
    """Refuse settings below their least value; None is left alone.

    Parameters
    ----------
    attack : str
        The attack's name, for the message.
    settings : object
        Has the named ones as attributes.
    **least : int
        Setting -> its least value.

    Raises
    ------
    ConfigError
    """
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= low:
            raise ConfigError(f"setting '{attack}.{name}' = {value}: must be at least {low}")


def positive(attack: str, settings: object, *names: str) -> None:
    """Refuse settings that are not positive finite numbers; None is left alone.

    Raises
    ------
    ConfigError
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"setting '{attack}.{name}' = {value}: must be positive")
