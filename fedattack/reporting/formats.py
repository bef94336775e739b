"""Figures as a person reads them, the same in the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedattack.observation import EVERYONE

NONE = "–"


def decimal(value: Any, digits: int = 1) -> str:
    """``12.3``; "∞" for infinity, a dash where there is no figure."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no "-0.0"


def signed(value: float, digits: int = 1) -> str:
    """``+1.8``, ``-0.2``, and ``0.0`` for what rounds to nothing."""
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def span(described: Mapping[str, Any], digits: int = 1, scale: float = 1.0) -> str:
    """``12.1…14.9`` of a described metric, a dash where unknown: for narrow columns."""
    return "…".join(_ends(described, digits, scale)) or NONE


def compact(value: Any) -> str:
    """Three significant digits, scientific where the number is very large or small."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    if math.isinf(value):
        return decimal(value)
    return f"{value:.3g}"


def percent(value: Any, digits: int = 1) -> str:
    """A share as ``12.3 %``, with more digits where it would read as zero."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    shown = value * 100
    while shown and round(abs(shown), digits) < 10.0**-digits and digits < 6:
        digits += 1
    return f"{shown:.{digits}f} %"


def p_value(value: float) -> str:
    """``p = 0.031``, ``p < 0.0001``."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def rate(value: float) -> str:
    """A kept share: "0.1 %", "100 %", "0.0192 %"."""
    return f"{value * 100:.3g} %"


def count(value: Any) -> str:
    """``7,834``, with one decimal only where a mean of counts needs it."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if float(value).is_integer() or value >= 100 else f"{value:,.1f}"


def seat(client: int) -> str:
    """Whose update it is: ``client 3``, or ``all clients`` under secure aggregation."""
    return "all clients" if client == EVERYONE else f"client {client}"


def interval(described: Mapping[str, Any], digits: int = 1, scale: float = 1.0) -> str:
    """``[12.1, 14.9]`` of a described metric, a dash where unknown."""
    ends = ", ".join(_ends(described, digits, scale))
    return f"[{ends}]" if ends else NONE


def _ends(described: Mapping[str, Any], digits: int, scale: float) -> list[str]:
    """Lower and upper end, or nothing where one is unknown."""
    ends = [described.get("low"), described.get("high")]
    return [] if None in ends else [decimal(end * scale, digits) for end in ends if end is not None]


def seconds(value: Any) -> str:
    """``0.4 s``, ``75 s``, ``12 min 5 s``, ``3 h 2 min``."""
    if value is None:
        return NONE
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(value: Any) -> str:
    """Bytes as ``62.7 kB``, ``31.3 MB`` (powers of 1000)."""
    if value is None:
        return NONE
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= step:
            return f"{value / step:.1f} {unit}"
    return f"{value:.0f} B"
