"""MkDocs hook: writes what the registries know in the place of the marks ``<!-- catalogue: ... -->`` of a page."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from roles import ROLE  # noqa: E402

from adversaries import ATTACKS  # noqa: E402
from fedattack.presets import PRESETS  # noqa: E402
from simulations.cli.catalogue import KINDS, AttackRow, attacks, settings_tables  # noqa: E402

PAGES = {
    "reconstruction": "attacks-images.md",
    "membership": "attacks-membership.md",
    "unlearning": "attacks-unlearning.md",
}
"""Family of an attack -> the page it is described on."""

CONFIGURED = {
    "Attacks": "Attack",
    "Defences": "Defence",
    "Unlearning mechanisms": "Mechanism",
    "Gates of deletion requests": "Gate",
    "Metrics": "Metric",
}
"""Kind of plug-ins that have settings -> what their tables of settings are called."""

PICTURES = ("notebooks/hcgla.png", "notebooks/membership.png", "notebooks/synthetic.png")

_MARK = re.compile(r"^<!-- catalogue: (\w+) ?(.*?) -->$", re.M)
_DIRECTIVE = re.compile(r"^\.\. (?:code-block|code|math)::.*\n", re.M)
_FOOTNOTE = re.compile(r"^\.\. \[\d+\] ", re.M)
_VERBATIM = re.compile(r"(`+[^`]+`+|^ {4,}.*$)", re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the pictures that README shows too."""
    for place in PICTURES:
        name = f"assets/{Path(place).name}"
        files.append(File.generated(config, name, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Replace the marks."""

    def written(mark: re.Match[str]) -> str:
        if mark[1] not in WRITERS:
            known = ", ".join(WRITERS)
            raise PluginError(f"{page.file.src_uri}: no mark '{mark[1]}' in the catalogue; known are {known}")
        return WRITERS[mark[1]](mark[2])

    return _MARK.sub(written, markdown)


def prose(text: str) -> str:
    """A docstring's reStructuredText as Markdown."""
    text = _FOOTNOTE.sub("", _DIRECTIVE.sub("", ROLE.sub(r"`\1`", text))).replace("``", "`")
    parts = _VERBATIM.split(re.sub(r"::$", ":", text, flags=re.M))
    parts[::2] = [part.replace("<", "&lt;").replace("[", "\\[") for part in parts[::2]]
    return "".join(parts)


def cell(text: str) -> str:
    """One line, for a table."""
    return prose(" ".join(text.split())).replace("|", "\\|")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def entry(title: str, name: str, facts: str = "") -> str:
    """What the docstring of a plug-in of that kind says, and its settings."""
    thing = KINDS[title].get(name)
    text = [f"### {name} {{ #{name} }}\n", facts]
    meanings: dict[str, str] = {}
    tables = settings_tables(name, strict=False) if title in CONFIGURED else {}
    rows = tables.get(f"{CONFIGURED.get(title)} {name}", [])
    sections = griffe.Docstring(inspect.getdoc(thing) or "").parse("numpy", warnings=False)
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.parameters and rows:
            for one in section.value:
                choices = str(one.annotation or "")
                kind = f"{choices.replace(', ', ' | ')}: " if choices[:1] in {'"', "'"} else ""
                meanings |= dict.fromkeys(map(str.strip, one.name.split(",")), kind + one.description)
        elif section.kind is griffe.DocstringSectionKind.text:
            text.append(prose(section.value))
        elif section.kind is griffe.DocstringSectionKind.admonition:
            text.append(f"**{section.title}.** {prose(section.value.contents)}")
        elif section.kind is griffe.DocstringSectionKind.parameters:
            text.append("\n".join(f"- `{one.name}`: {cell(one.description)}" for one in section.value))
    if rows:
        shown = []
        for setting, _, default, meaning in rows:
            told = meanings.get(setting.rpartition(".")[2], meaning)
            shown.append((f"`{setting}`", f"`{default}`" if default else "", cell(told)))
        text.append(table(("setting", "default", "meaning"), shown))
    return "\n\n".join(part for part in text if part) + "\n\n"


def _place(one: AttackRow) -> str:
    return f"{PAGES[ATTACKS.get(one.name).family]}#{one.name}"


def attack_table(_: str) -> str:
    """Every attack, one row each, with a link to what is said of it."""
    rows = (
        (
            f"[`{one.name}`]({_place(one)})",
            one.seat,
            cell(one.needs),
            cell(one.summary.rstrip(".")),
            one.source,
        )
        for one in attacks()
    )
    return table(("attack", "who", "needs", "what it does", "source"), rows)


def family(name: str) -> str:
    """The attacks of a family, by seat."""
    chosen = [one for one in attacks() if ATTACKS.get(one.name).family == name]
    text = []
    for seat in dict.fromkeys(one.seat for one in chosen):
        text.append(f"## {seat.capitalize()}\n\n")
        for one in chosen:
            if one.seat == seat:
                facts = f"*{one.seat.capitalize()}; needs: {one.needs}; source: {one.source}.*"
                text.append(entry("Attacks", one.name, facts))
    return "".join(text)


def kind(title: str) -> str:
    """All plug-ins of a kind, with their docstrings."""
    return "".join(entry(title, name) for name in KINDS[title])


def names(title: str) -> str:
    """All plug-ins of a kind, one line each."""
    registry = KINDS[title]
    return table(("name", "what it is"), ((f"`{one}`", cell(registry.summary(one))) for one in registry))


def presets(_: str) -> str:
    """Every preset, and what it stands for."""
    rows = []
    for name in PRESETS:
        stands = ", ".join(
            f"`{place}={value}`" for place, _, value, _ in settings_tables(name)[f"Preset {name}"][1:]
        )
        rows.append((f"`{name}`", cell(PRESETS[name].summary), stands))
    return table(("preset", "what it is", "settings"), rows)


def run_settings(_: str) -> str:
    """Every setting of a run."""
    rows = settings_tables()["Settings of a run"]
    shown = (
        (f"`{place}`", f"`{option}`" if option else "", f"`{default}`" if default else "", cell(meaning))
        for place, option, default, meaning in rows
    )
    return table(("setting", "option", "default", "meaning"), shown)


def document(name: str) -> str:
    """A document of the repository's root, without its title."""
    return (ROOT / name).read_text(encoding="utf-8").partition("\n")[2]


WRITERS: dict[str, Callable[[str], str]] = {
    "attacks": attack_table,
    "family": family,
    "kind": kind,
    "names": names,
    "presets": presets,
    "settings": run_settings,
    "document": document,
}
"""Mark -> what is written in its place, given what stands behind it."""
