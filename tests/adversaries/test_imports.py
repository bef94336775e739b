"""What may import what: the walls between the rooms and inside them, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from adversaries import ATTACKS

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("fedattack", "adversaries", "strategies", "simulations")
"""From the ground up: a room imports those before it."""

INVERSION = {"solvers": 0, "gradients": 0, "evidence": 1, "matching": 2, "learning": 2}
"""Storeys of the library of gradient inversion, which knows no attack."""

INTERNALS = "simulations.engine.flower_internals"
"""The only module that touches what Flower and Ray hide."""

HIDDEN_FROM_ADVERSARIES = ("fedattack.audit", "fedattack.groundtruth", "fedattack.data", "fedattack.storage")
RECONSTRUCTION = "adversaries.reconstruction"


def _sources() -> dict[str, Path]:
    found = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


SOURCES = _sources()


def _targets(tree: ast.Module) -> Iterator[str]:
    """Every name that a module imports, wherever in it: a module of ours, or a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in SOURCES else node.module


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
IMPORTS = {name: set(_targets(tree)) for name, tree in TREES.items()}
OURS = {name: (found & SOURCES.keys()) - {name} for name, found in IMPORTS.items()}


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def edges(package: str) -> Iterator[tuple[str, str]]:
    for name, found in OURS.items():
        if below(name, package):
            yield from ((name, other) for other in sorted(found))


def test_no_circles() -> None:
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for other in sorted(OURS[name]):
                visit(other, (*path, name))
            finished.add(name)

    for name in OURS:
        visit(name, ())


def test_rooms_import_downwards() -> None:
    # The front door hands out what lies above it, lazily; `python -m fedattack` is the command.
    doors = ("fedattack", "fedattack.__main__")
    upwards = [
        (name, other)
        for name, found in OURS.items()
        for other in found
        if ROOMS.index(other.partition(".")[0]) > ROOMS.index(name.partition(".")[0]) and name not in doors
    ]
    assert not upwards


def test_adversaries_do_not_reach_the_truth() -> None:
    forbidden = [
        edge for edge in edges("adversaries") if any(below(edge[1], room) for room in HIDDEN_FROM_ADVERSARIES)
    ]
    assert not forbidden


def test_the_library_knows_no_attack_and_has_storeys() -> None:
    library = "adversaries.inversion"

    def storey(name: str) -> int:
        parts = name.split(".")
        return INVERSION[parts[2]] if len(parts) > 2 else 0

    attacks = [("adversaries." + room) for room in ("reconstruction", "membership", "unlearning")]
    assert not [e for e in edges(library) if any(below(e[1], room) for room in attacks)]
    assert not [e for e in edges(library) if below(e[1], library) and storey(e[1]) > storey(e[0])]


def test_solvers_import_torch_only() -> None:
    solvers = "adversaries.inversion.solvers"
    allowed = sys.stdlib_module_names | {"torch"}
    for name, found in IMPORTS.items():
        if below(name, solvers):
            foreign = {o for o in found if o.partition(".")[0] not in allowed and not below(o, solvers)}
            assert not foreign, name


@cache
def attack_modules() -> dict[str, str]:
    """Module of each registered reconstruction attack -> its folder."""
    modules = {ATTACKS.get(name).__module__ for name in ATTACKS.names()}
    return {m: ".".join(m.split(".")[:3]) for m in modules if below(m, RECONSTRUCTION)}


def test_no_attack_imports_another() -> None:
    for name, other in edges(RECONSTRUCTION):
        if below(other, RECONSTRUCTION) and other.count(".") > 2:
            assert name.split(".")[2] == other.split(".")[2], f"{name} imports {other} of another folder"
        if other in attack_modules():
            # Its own package hands it out; nobody else needs it.
            assert name == other.rpartition(".")[0], f"{name} imports the attack {other}"


def test_the_room_of_reconstruction() -> None:
    folder = ROOT / "adversaries" / "reconstruction"
    assert {path.name for path in folder.glob("*.py")} == {"__init__.py", "base.py"}
    for directory in (ROOT / "adversaries").rglob("*"):
        if directory.is_dir() and directory.name != "__pycache__":
            entries = [path for path in directory.iterdir() if path.name != "__pycache__"]
            assert len(entries) <= 15, directory

    @cache
    def storeys(name: str) -> int:
        return 1 + max((storeys(other) for other in OURS[name] if below(other, RECONSTRUCTION)), default=0)

    highest = max((name for name in OURS if below(name, RECONSTRUCTION)), key=storeys)
    assert storeys(highest) <= 5, highest


def test_only_the_internals_touch_what_flower_and_ray_hide() -> None:
    for name, tree in TREES.items():
        if name == INTERNALS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("flwr", "ray"):
                hidden = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not [part for part in hidden if part.startswith("_")], f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    parts = alias.name.split(".")
                    assert parts[0] not in ("flwr", "ray") or not [p for p in parts if p.startswith("_")], (
                        name
                    )
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                assert node.attr != "__dict__" or owner == "self", f"{name}: {ast.unparse(node)}"
                assert owner.partition(".")[0] not in ("flwr", "ray") or not node.attr.startswith("_"), name
