"""Pages from the templates in ``templates``, all with one style, without a script and without a network."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from fedattack.reporting import formats

SUFFIX = ".md"
"""After each template's own ending: Flower packs .html and .css into no app, and ``flwr run`` writes a report too."""

_FILTERS = ("decimal", "compact", "percent", "count", "interval", "seconds", "size")


def render(name: str, **values: Any) -> str:
    """The page of a template, "report" or another in ``templates``; a name that a template lacks is an error."""
    return _environment().get_template(f"{name}.html").render(**values)


def template_source(name: str) -> tuple[str, str | None, Callable[[], bool]] | None:
    """Text of a template file ("report.html", "style.css"), for Jinja; None where there is no such file."""
    place = files("fedattack.reporting") / "templates" / f"{name}{SUFFIX}"
    if not place.is_file():
        return None
    return place.read_text(encoding="utf-8"), None, lambda: True


def _environment() -> Environment:
    """Escaping on, unknown names refused, figures formatted as everywhere."""
    environment = Environment(
        loader=FunctionLoader(template_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in _FILTERS:
        environment.filters[name] = getattr(formats, name)
    return environment
