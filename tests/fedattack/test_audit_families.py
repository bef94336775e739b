"""A family is data: none is named outside its own files, and a new one is told everywhere without an edit."""

from __future__ import annotations

import ast
import io
import json
import types
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from fedattack.audit import FAMILIES, AuditResult, Family
from fedattack.audit.family import Leakage, Metric, get_family
from fedattack.config import Config
from fedattack.errors import ConfigError
from fedattack.reporting.report import write_results
from fedattack.reporting.sweep.page import write_sweep
from fedattack.reporting.sweep.table import CellOutcome, sweep_table
from fedattack.reporting.terminal import print_summary
from fedattack.storage import RunFolder

ROOT = Path(__file__).resolve().parents[2]
OWN_FILES = {
    "fedattack/audit/family.py",  # the registry
    "fedattack/annotation/exchange.py",  # a picture of a pair
    "fedattack/annotation/plan.py",
    "fedattack/annotation/table.py",
    "fedattack/reporting/benchmark.py",
    "simulations/studies/semsim.py",
    "simulations/studies/semsim_benchmark.py",
    "simulations/studies/semsim_ranking.py",
    "fedattack/audit/image_scores.py",  # the name of a panel
    "fedattack/audit/reconstruction.py",
    "fedattack/audit/membership.py",
    "fedattack/audit/unlearning.py",
    "simulations/experiments/base.py",  # the registry
    "simulations/run.py",  # a sub-command of that name
    "simulations/experiments/forgotten.py",
    "simulations/flower_app.py",  # what an app, and an update, are asked
    "simulations/front_door.py",
    "simulations/cli/catalogue.py",  # what a command of an attack needs
}
BASES = {"ReconstructionAttack", "MembershipAttack", "UnlearningAttack"}


def _names_a_family(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in ("reconstruction", "membership", "unlearning"):
            return True
        called = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass")
        if called and BASES & {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])}:
            return True
    return False


def test_a_family_is_named_in_its_own_files_only() -> None:
    files = [
        path for room in ("fedattack", "strategies", "simulations") for path in (ROOT / room).rglob("*.py")
    ]
    assert len(files) > 80
    naming = {str(path.relative_to(ROOT)) for path in files if _names_a_family(path.read_text())}
    assert naming == OWN_FILES
    assert _names_a_family('x = result.family == "membership"')
    assert _names_a_family("isinstance(a, (int, base.MembershipAttack))")
    assert not _names_a_family("isinstance(a, int)")


WORDS = Family(
    name="words",
    question="Can a client's words be read?",
    title="Words read",
    metrics=(Metric("share", "words right", "%", 100.0), Metric("hidden")),
    floors={"commonest": "the commonest words"},
    headlines={"leak": "words read", "partial": "some words read", "none": "no word beyond the commonest"},
    leakage=Leakage(
        "words_gain", "words beyond the commonest, %", lambda s: s["gain"], 0.0, 5.0, "Words read", 100.0
    ),
)


def _result(mean: float = 0.8) -> AuditResult:
    share = {"mean": mean, "worst": mean - 0.1, "best": 0.9, "low": 0.75, "high": 0.85}
    summary = {
        "family": "words",
        "count": 2,
        "metrics": {"share": share},
        "floors": {"commonest": {"share": {"mean": 0.125}}},
        "best_floor": "commonest",
        "gain": {"mean": mean - 0.125, "low": 0.6, "high": 0.7},
        "seconds": 3.0,
        "level": "leak",
        "verdict": "words read: 80 %",
    }
    records = [{"attack": "w", "family": "words", "word": "secret", "place": 3, "right": 1.0}]
    return AuditResult(
        "w", "words", records, summary, "words read: 80 %", "leak", threat={"seat": "curious server"}
    )


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("words_family")
    module.WORDS = WORDS  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "words_family", module)
    monkeypatch.setattr(FAMILIES, "_targets", FAMILIES._targets | {"words": "words_family:WORDS"})


def test_a_new_family_is_told_everywhere(words: None, tmp_path: Path) -> None:
    console = Console(width=80, file=io.StringIO())
    print_summary(console, [_result()])
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "worst found: words read, by w, seat: curious server" in shown
    assert all(
        part in shown for part in ("Words read", "words right", "80.0", "75.0\u202685.0", "12.5", "3.0 s")
    )

    folder = RunFolder.create(tmp_path / "run", Config())
    page = write_results(folder, [_result()]).read_text()
    for part in ("Can a client&#39;s words be read?", "floor: commonest</th>", "<td>12.5</td>", "the commonest words",
                 "<td>80.0</td><td>[75.0, 85.0]</td><td>70.0</td><td>90.0</td>", "curious server"):  # fmt: skip
        assert part in page
    document = json.loads((folder.path / "summary.json").read_text())
    assert document["headline"]["attack"] == "w"
    assert document["attacks"]["w"]["threat"] == {"seat": "curious server"}
    frame = pd.read_parquet(folder.path / "records.parquet")
    assert (frame["word"].iloc[0], frame["place"].dtype) == ("secret", "float64")

    cells = [
        CellOutcome(f"c{i}", {"seed": str(i)}, "done", "", 1.0,
                    {"federation": {}, "attacks": {"w": _result(0.8 - 0.1 * i).summary}})
        for i in range(2)
    ]  # fmt: skip
    table = sweep_table(["seed"], cells)
    assert table.families == ["words"]
    assert table.frame["words_gain"].tolist() == pytest.approx([67.5, 57.5])
    assert table.frame["words_gain_high"].tolist() == pytest.approx([70.0, 70.0])
    shown = write_sweep(tmp_path / "sweep", table).read_text()
    assert "words read" in shown
    assert "67.5" in shown
    assert (tmp_path / "sweep" / "figures" / "words-leakage.png").is_file()


def test_a_family_that_nobody_registered_is_one_sentence(words: None) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown family 'wrods'; did you mean 'words'\? Known: .*membership, "
    ):
        get_family("wrods")
    assert get_family("words_family:WORDS") is WORDS
    with pytest.raises(
        ConfigError, match=r"'json:JSONDecoder' is a type: fedattack.audit.Family is accepted"
    ):
        get_family("json:JSONDecoder")


@pytest.mark.parametrize("name", FAMILIES.names())
def test_every_family_is_complete(name: str) -> None:
    family = get_family(name)
    assert family.name == name
    assert all(family.words(level) for level in ("leak", "partial", "none", "undecided", "failed"))
    assert family.titled
    assert family.glossary
    assert family.floors
