"""Every walk-through runs from top to bottom and can be read as a page."""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parents[1]
EVERY = pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb")))


@EVERY
def test_what_it_imports_is_there(name: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    tree = ast.parse("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module or "")
        missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
        assert not missing, f"{node.module} has no {', '.join(missing)}"


@pytest.mark.slow
@EVERY
def test_notebook_runs_and_reads_as_a_page(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(
            outputs=[], execution_count=None
        )
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert page.count("data:image/png;base64,") >= 2, "the pictures are in the page"
    assert "Traceback" not in page
