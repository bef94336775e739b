"""Reporting: terminal, figures, templates, the page, and the run folder that they are written into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedattack.storage import RunFolder

__all__ = ["RunFolder"]


def __getattr__(name: str) -> Any:
    if (
        name == "RunFolder"
    ):  # on demand: `fedattack.reporting.formats` is read where torch need not be imported
        from fedattack.storage import RunFolder

        return RunFolder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
