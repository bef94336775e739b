"""What all commands have in common: settings as options, how much is said and where, tables."""

from __future__ import annotations

import inspect
import logging
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedattack.config import SHORT_NAMES, Config, field_type
from fedattack.errors import ConfigError

# Shown by --help; every other setting is reached by its option or by --set, and listed by `fedattack settings`.
PROMINENT = {
    "The federation and its adversary": {
        "dataset": "faces, digits, cifar10, lfw, image-folder, ...",
        "data-dir": "folder or archive that holds it",
        "model": "lenet-zhu, resnet18, ...",
        "clients": "how many take part",
        "rounds": "rounds of training",
        "compressor": "topk, topk-qsgd, randomk, sign, qsgd, dgc, none",
        "compression": "kept share of an update",
        "defense": "clip-noise, soteria, ...; several with commas",
        "attack": "hcgla, ig, tensor, fedmia, ...; several with commas",
        "victims": "clients whose updates are reconstructed",
    },
    "The run": {
        "preset": "mnist-logistic-small, ...",
        "engine": "ray or inline",
        "seed": "same seed, same bits",
        "run-dir": "folder for the report",
    },
}

NAMED = {
    "attack": "Attacks",
    "defense": "Defences",
    "mechanism": "Unlearning mechanisms",
    "gates": "Gates of deletion requests",
    "metrics": "Metrics",
    "dataset": "Data sets",
    "partition": "Partitioners",
    "model": "Models",
    "compressor": "Compressors",
    "strategy": "Strategies",
    "preset": "Presets",
}
"""Option -> the kind, as lists call it, whose names it takes."""

console = Console()
PLAIN: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": None, "padding": (0, 2, 0, 0)}

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of settings", rich_help_panel="The run", metavar="FILE"),
]
SetOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="any setting: hcgla.iterations=300", rich_help_panel="The run", metavar="NAME=VALUE"
    ),
]
Trusted = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        help="a plug-in that files may name",
        metavar="MODULE:CLASS",
        hidden=True,
        rich_help_panel="The run",
    ),
]
Loudness = Annotated[
    bool | None,
    typer.Option(
        "--quiet/--verbose", "-q/-v", help="the result alone; the log too", rich_help_panel="The run",
        show_default=False,
    ),
]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="the summary as only output", rich_help_panel="The run")]
FailOn = Annotated[
    str | None,
    typer.Option("--fail-on", help="leak or partial: exit 3", rich_help_panel="The run", metavar="LEVEL"),
]


def writable_file(path: Path | None) -> Path | None:
    """Refuse, before any work, a file to write that cannot be: a folder, or one below a file or a closed folder."""
    if path is not None and path.is_dir():
        raise ConfigError(f"--out {str(path)!r} is a folder; accepted: a file to write")
    return None if path is None else _below_folder(path)


def writable_folder(path: Path | None) -> Path | None:
    """Refuse, before any work, a folder to write into that is a file, or cannot be made."""
    if path is not None and path.exists() and not path.is_dir():
        raise ConfigError(f"--out {str(path)!r} is no folder; accepted: a folder, new or not")
    return None if path is None else _below_folder(path)


def _below_folder(path: Path) -> Path:
    above = next(one for one in path.absolute().parents if os.path.lexists(one))
    if not above.is_dir():
        raise ConfigError(f"--out {str(path)!r}: {str(above)!r} is no folder; accepted: a place in a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {str(path)!r}: nothing can be written in {str(above)!r}; accepted: another folder"
        )
    return path


OutFile = Annotated[
    Path, typer.Option("--out", help="file to write", show_default=False, callback=writable_file)
]
OutFolder = Annotated[
    Path, typer.Option("--out", help="folder to write into", show_default=False, callback=writable_folder)
]

FOUND = 3
"""Exit code where --fail-on found what it was told to look for."""


@dataclass(frozen=True)
class Speech:
    """How much a command says, and where.

    `told` takes progress, tables and pages. With --json it is standard error, and the summary is all of standard
    output.
    """

    told: Console
    as_json: bool = False
    quiet: bool = False

    def result(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """What a run found: its summary where --json asks, a line and the folder under --quiet."""
        if self.as_json:
            self.document(summary)
        elif self.quiet:
            if top := summary.get("headline"):
                plainly(console, str(top["text"]))
            plainly(console, str(folder))

    def document(self, found: Mapping[str, Any]) -> None:
        """Write JSON to standard output."""
        import json

        sys.stdout.write(json.dumps(found, indent=1, allow_nan=False, default=str) + "\n")


def speech(loudness: bool | None = None, as_json: bool = False) -> Speech:
    """How a command speaks; `loudness` True is --quiet, False --verbose."""
    if loudness is False:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger = logging.getLogger(
            "fedattack_log"
        )  # fedattack.storage.run_folder.LOGGER, which would import torch
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    if loudness:
        return Speech(Console(quiet=True), as_json, True)
    return Speech(Console(stderr=True) if as_json else console, as_json)


def check_level(level: str | None, attacks: Collection[str] = ("any",)) -> None:
    """Refuse what --fail-on does not know, and where nothing would be looked for."""
    if level not in (None, "leak", "partial"):
        raise ConfigError(f"--fail-on {level!r}: accepted: leak, or partial (either of both)")
    if level is not None and not attacks:
        raise ConfigError(
            f"--fail-on {level}: no attack is named, so that nothing would be found; name one, for example "
            "--attack hcgla"
        )


def fail_on(level: str | None, summary: Mapping[str, Any]) -> None:
    """Exit with code 3 where an attack found what --fail-on names; what is undecided is not found."""
    wanted = {"leak": ("leak",), "partial": ("leak", "partial")}.get(level or "", ())
    if any(one.get("level") in wanted for one in summary.get("attacks", {}).values()):
        raise typer.Exit(FOUND)


def typed() -> str:
    """The command line, as it can be typed again."""
    return shlex.join(["fedattack", *sys.argv[1:]])


def plainly(where: Console, text: str) -> None:
    """Print a line in which nothing is markup and which is not broken."""
    where.print(text, markup=False, highlight=False, soft_wrap=True)


def show_table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table without lines; its first column is not cut."""
    table = Table(title=Text(title), **PLAIN)
    for number, column in enumerate(columns):
        style, widest = None if number else "cyan", 16 if column == "default" else None
        table.add_column(column, style=style, no_wrap=not number, overflow="fold", max_width=widest)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table, "")


def completed(kind: str) -> Callable[[str], list[str]]:
    """Shell completion by the names of a kind, of which several may stand with commas."""

    def complete(incomplete: str) -> list[str]:
        from simulations.cli.written import names_as_written

        before, comma, begun = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names_as_written(kind) if name.startswith(begun)]

    return complete


def completed_anything(incomplete: str) -> list[str]:
    """Shell completion by everything that can be named."""
    from simulations.cli.written import kinds_as_written

    found = {name for rows in kinds_as_written().values() for name, _ in rows}
    return sorted(name for name in found if name.startswith(incomplete))


def completed_kinds(incomplete: str) -> list[str]:
    """Shell completion by the kinds of what can be named."""
    from simulations.cli.written import kinds_as_written

    found = [kind.lower().replace(" ", "-") for kind in kinds_as_written()]
    return [kind for kind in found if kind.startswith(incomplete)]


def trust_typed(texts: Iterable[Any]) -> None:
    """Let files name the plug-ins ``module:Class`` that the command line names."""
    from fedattack.registry import outside_names, trust

    for text in texts:
        trust(*outside_names(text))


def with_settings(
    function: Callable[..., None],
    left_open: Mapping[str, Any] | None = None,
    sections: Collection[str] = tuple(Config.model_fields),
    hidden: Collection[str] = (),
) -> Callable[..., None]:
    """Give `function` --config, --set, --trust and an option per short setting name; it receives their `config`.

    `left_open`, nested settings: what the command means where nothing is said; `sections`: those that have options;
    `hidden`: options that its help does not show.
    """
    panels = {name: (panel, text) for panel, group in PROMINENT.items() for name, text in group.items()}
    hints, keyword = get_type_hints(function, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    parameters = [
        p.replace(kind=keyword, annotation=hints[p.name])
        for p in inspect.signature(function).parameters.values()
        if p.name != "config"
    ]
    for name, hint in (("file", ConfigFile), ("assignments", SetOptions), ("trusted", Trusted)):
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=hint))
    options: list[inspect.Parameter] = []
    # Prominent ones first and in their order, so that the help reads as a page.
    own = {p.name for p in parameters}  # where a name means something else, --set reaches the setting
    for name in [*panels, *(n for n in SHORT_NAMES if n not in panels)]:
        if name.replace("-", "_") in own or SHORT_NAMES[name].partition(".")[0] not in sections:
            continue
        annotation, description = field_type(SHORT_NAMES[name])
        panel, text = panels.get(name, ("More", description))
        flag = annotation is bool
        declaration = f"--{name}/--no-{name}" if flag else f"--{name}"
        option = typer.Option(
            declaration, help=text, rich_help_panel=panel, hidden=name not in panels or name in hidden,
            show_default=False, metavar=None if flag else "VALUE",
            autocompletion=completed(NAMED[name]) if name in NAMED else None,
        )  # fmt: skip
        kind = bool | None if flag else str | None
        place = name.replace("-", "_")
        options.append(inspect.Parameter(place, keyword, default=None, annotation=Annotated[kind, option]))

    def wrapper(
        file: Path | None = None,
        assignments: list[str] | None = None,
        trusted: list[str] | None = None,
        **arguments: Any,
    ) -> None:
        settings = {
            name: value
            for name in SHORT_NAMES
            if name.replace("-", "_") not in own
            and (value := arguments.pop(name.replace("-", "_"), None)) is not None
        }
        if getattr(arguments.get("context"), "invoked_subcommand", None) is not None:
            if (
                settings
                or file
                or assignments
                or trusted
                or any(v for k, v in arguments.items() if k != "context")
            ):
                raise ConfigError("put options after the sub-command, not before it")
            return
        set_to = assigned(assignments)
        keys = [name.rpartition(".")[0] for name in set_to]
        trust_typed([*(trusted or []), *settings.values(), *set_to.values(), *keys])
        function(**arguments, config=read_config(file, assignments, settings, left_open))

    wrapper.__name__ = function.__name__
    wrapper.__doc__ = function.__doc__
    wrapper.__signature__ = inspect.Signature([*parameters, *options])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*parameters, *options]}
    return wrapper


def read_config(
    config: Path | None,
    assignments: list[str] | None,
    settings: dict[str, Any],
    left_open: Mapping[str, Any] | None = None,
) -> Config:
    """Join a TOML file, ``--set`` assignments and options; options win over assignments, both over the file."""
    overrides: dict[str, Any] = assigned(assignments)
    for name, value in settings.items():
        if SHORT_NAMES[name] in {SHORT_NAMES.get(one, one.replace("-", "_")) for one in overrides}:
            raise ConfigError(
                f"setting {SHORT_NAMES[name]!r} is given twice, by --{name} and by --set; accepted: one of them"
            )
        overrides[name] = value
    if config:
        return Config.from_toml(config, overrides, left_open)
    return Config.from_mapping(overrides, left_open=left_open)


def assigned(assignments: list[str] | None) -> dict[str, str]:
    """Name -> value of ``--set`` options; ConfigError where one is malformed, or a setting is given two values."""
    found: dict[str, str] = {}
    meant: dict[str, str] = {}
    for assignment in assignments or []:
        name, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals or not name:
            raise ConfigError(f"--set {assignment!r}: expected NAME=VALUE, for example hcgla.iterations=300")
        setting = SHORT_NAMES.get(name, name.replace("-", "_"))
        if meant.setdefault(setting, value) != value:
            raise ConfigError(
                f"setting {setting!r} is given two values, {meant[setting]!r} and {value!r}; accepted: one"
            )
        found[name] = value
    return found
