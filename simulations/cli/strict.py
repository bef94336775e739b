"""Typer's groups and commands, which refuse what click lets pass: an option that is given two values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fedattack.errors import ConfigError


class _Strict:
    """Refuses a second value of an option that takes one; shows --help among the options of a run."""

    def make_parser(self, ctx: Any) -> Any:
        parser = super().make_parser(ctx)  # type: ignore[misc]
        parse = parser.parse_args

        def parse_once(args: list[str]) -> Any:
            given = list(args)
            values, rest, order = parse(args)
            taken: set[str] = set()
            for one in order:
                if one.param_type_name != "option" or one.multiple or one.count:
                    continue
                if one.name in taken and not (one.is_flag and not one.secondary_opts):
                    name = next((opt for opt in one.opts if opt.startswith("--")), one.opts[0])
                    told = ", ".join(_values_of(given, one.opts)) or "both ways"
                    raise ConfigError(f"option {name} is given twice ({told}); accepted: one value")
                taken.add(one.name)
            return values, rest, order

        parser.parse_args = parse_once
        return parser


def _values_of(arguments: list[str], names: list[str]) -> list[str]:
    """The values that an option was given on a command line."""
    found = []
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            found.append(value if equals else " ".join(arguments[index + 1 : index + 2]))
    return found


class StrictCommand(_Strict, TyperCommand):
    """A command."""


class Stopped(Exception):
    """Ctrl-C; `folder` is that of the run that it ended, if one had begun. Typer would answer the key itself."""

    def __init__(self, folder: object) -> None:
        super().__init__("interrupted")
        self.folder = folder


class StrictGroup(_Strict, TyperGroup):
    """A command with sub-commands."""

    def invoke(self, ctx: Any) -> Any:
        """Carry it out; Stopped where Ctrl-C ends it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as ended:
            raise Stopped(getattr(ended, "folder", None)) from ended

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help, which needs no panel of its own."""
        option = super().get_help_option(ctx)
        if option is not None and self.callback is not None and ctx.parent is None:
            option.rich_help_panel = "The run"  # type: ignore[attr-defined]
        return option


class Cli(typer.Typer):
    """A :class:`typer.Typer` whose commands are strict."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=StrictGroup, pretty_exceptions_enable=False, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        """As typer's, with a strict class."""
        return super().command(name, cls=StrictCommand, **options)
