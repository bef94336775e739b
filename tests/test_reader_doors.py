"""Every reader takes its files from fedattack/reading.py or fedattack/files.py, read from the source."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("fedattack", "adversaries", "strategies", "simulations")

READS = {
    "read_text", "read_bytes", "fromfile", "memmap", "genfromtxt", "loadtxt", "load_svmlight_file", "read_csv",
    "read_parquet", "read_table", "read_json", "read_metadata", "safe_open", "load_file", "ZipFile", "TarFile",
    "GzipFile", "BZ2File", "LZMAFile", "Unpickler", "urlopen", "imread",
}  # fmt: skip
"""Names of calls that read a file, whoever offers them."""
OPENS = {"open", "load", "loads"}
"""Names that do if these offer them."""
WORDS = (*READS, "open(", ".load(", ".loads(")
OWNERS = {
    "builtins", "np", "numpy", "Image", "tarfile", "zipfile", "gzip", "lzma", "bz2", "json", "tomllib", "pickle",
    "marshal", "torch", "os", "io", "yaml",
}  # fmt: skip

DOORS = {"fedattack/reading.py", "fedattack/files.py", "fedattack/data/tar.py"}
OURS = {"read_text", "read_json", "read_table", "read_bytes"}
"""Functions of the doors, and what is built on them, that go by such a name; as methods they are pathlib's."""

ALLOWED = {
    # Own parser of the header; the callers see to what lies behind the name.
    "fedattack/npy.py": {"path.open", "archive.open", "zipfile.ZipFile", "np.memmap"},
    # Opened by reading.open_zip first.
    "fedattack/data/files.py": {"zipfile.ZipFile"},
    # Of bytes that the door handed out, or of what somebody typed.
    "fedattack/data/embedded.py": {"np.loadtxt", "load_svmlight_file"},
    "fedattack/registry.py": {"tomllib.loads"},
    "simulations/engine/journal.py": {"json.loads"},
    # The project's own files, which lie beside the code.
    "fedattack/annotation/page/__init__.py": {"(files(__name__) / name).read_text"},
    "fedattack/reporting/pages.py": {"place.read_text"},
    "fedattack/version.py": {"project.read_text", "tomllib.loads"},
    "simulations/cli/sources.py": {"path.read_bytes"},
    "simulations/cli/written.py": {"FILE.read_text", "json.loads"},
    # What the kernel says of this machine.
    "fedattack/reporting/provenance.py": {"_PROCESSORS.read_text"},
    "fedattack/storage/lock.py": {"Path(path).read_text", "path.open"},  # the latter to write
    "simulations/experiments/cost.py": {"Path(limit).read_text", "Path(used).read_text"},
    # Written and read in the same breath.
    "fedattack/metrics/degradations.py": {"Image.open"},
    "fedattack/audit/reconstruction.py": {"json.loads"},
    "fedattack/reporting/sweep/table.py": {"json.loads"},
    # Opened to write or to lock.
    "fedattack/annotation/rating_file.py": {"self.path.open", "os.open"},
    "fedattack/storage/run_folder.py": {"(self.path / 'log.txt').open"},
    "simulations/cli/gan.py": {"zipfile.ZipFile", "archive.open"},
}


@cache
def _found() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name in DOORS or name.startswith("simulations/bench/"):
                continue
            text = path.read_text(encoding="utf-8")
            if not any(word in text for word in WORDS):
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and _reads(node.func):
                    found[name].add(ast.unparse(node.func))
    return found


def _reads(called: ast.expr) -> bool:
    if isinstance(called, ast.Name):
        return called.id in READS - OURS or called.id == "open"
    if not isinstance(called, ast.Attribute):
        return False
    owner = ast.unparse(called.value)
    if called.attr in OPENS:
        # A file object's method `open` is pathlib's or an archive's.
        return owner in OWNERS or (called.attr == "open" and owner not in ("Released", "_Kept", "webbrowser"))
    return called.attr in READS and owner not in ("reading", "sealed")


def test_every_reader_goes_through_a_door() -> None:
    strange = {name: calls - ALLOWED.get(name, set()) for name, calls in _found().items()}
    assert not {name: calls for name, calls in strange.items() if calls}


def test_what_is_allowed_is_still_there() -> None:
    found = _found()
    assert not {name: calls - found[name] for name, calls in ALLOWED.items() if calls - found[name]}
