"""README and the documents name what there is, lead where they say, and load nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from torch import nn

from adversaries import ATTACKS
from fedattack.config import Config
from fedattack.defenses import DEFENSES
from fedattack.metrics import psnr
from fedattack.unlearning import MECHANISMS
from fedattack.unlearning.gates import GATES
from simulations.cli.catalogue import KINDS, attacks_markdown
from simulations.pipeline import simulate

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
}
ELSEWHERE = ("http:", "https:", "//")


@pytest.fixture(scope="module")
def catalogue():
    """The hook that writes what the registries know."""
    pytest.importorskip(
        "mkdocs", reason="the documents' packages are not installed: pip install 'fedattack[docs]'"
    )
    sys.path.insert(0, str(DOCS))
    import catalogue

    return catalogue


def links(text: str) -> list[str]:
    """Targets of a Markdown text's links and pictures, code left out."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S))


def test_links_lead_somewhere(catalogue) -> None:
    lost = []
    for place, text in TEXTS.items():
        for link in links(text):
            split = urlsplit(link)
            if split.scheme:
                assert split.scheme == "https", f"{place}: {link}"
                assert split.netloc, f"{place}: {link}"
            elif not link.startswith(("#", "assets/")):
                target = (ROOT / place).parent / split.path
                if not target.exists():
                    lost.append(f"{place}: {link}")
    assert links(TEXTS["README.md"])
    assert not lost


def test_every_path_is_there() -> None:
    named = re.compile(r"`((?:fedattack|adversaries|strategies|simulations|notebooks|docs|tests)/[\w/.]+)`")
    paths = {(place, path) for place, text in TEXTS.items() for path in named.findall(text)}
    assert paths
    missing = [(place, path) for place, path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_every_walk_through_is_in_the_table() -> None:
    named = set(re.findall(r"`(\d\d_\w+\.ipynb)`", TEXTS["docs/walk-throughs.md"]))
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} <= named


def test_the_table_of_attacks_is_the_registrys(catalogue) -> None:
    table = catalogue.attack_table("")
    unlinked = re.sub(r"\[(`[\w-]+`)\]\([\w.#-]+\)", r"\1", table)
    plain = attacks_markdown().replace("``", "`").splitlines()
    assert unlinked.replace("| --- |", "|---|").splitlines()[2:] == plain[2:]
    assert f"{len(ATTACKS.names())} of them" in TEXTS["README.md"]


def test_every_kind_is_described_and_every_mark_is_known(catalogue) -> None:
    marks = [(m[1], m[2]) for text in TEXTS.values() for m in catalogue._MARK.finditer(text)]
    assert {name for name, _ in marks} == set(catalogue.WRITERS)
    shown = {what for name, what in marks if name in {"kind", "names"}}
    assert shown == set(KINDS) - {"Attacks"}
    assert {what for name, what in marks if name == "family"} == {ATTACKS.get(n).family for n in ATTACKS}
    told = catalogue.kind("Unlearning mechanisms")
    assert all(f"{{ #{name} }}" in told for name in MECHANISMS)


def test_an_attacks_entry_has_its_settings_and_its_source(catalogue) -> None:
    text = catalogue.family("reconstruction")
    entry = text.partition("{ #hcgla }")[2].partition("### ")[0]
    assert "Curious server; needs: one update, public images help; source: Yang et al. 2023." in entry
    assert (
        "| `hcgla.restarts` | `1` | Starts tried for each victim; the one with the lowest matching loss is"
        in entry
    )
    assert "IEEE TIFS 18, 2023." in entry
    assert '| "default" \\| "published": Settings of matching: ours, or' in entry


def test_mechanisms_gates_and_defences_are_named() -> None:
    names = set(re.findall(r"`([\w-]+)`", TEXTS["docs/defences.md"]))
    assert set(DEFENSES.names()) <= names
    told = " ".join(TEXTS[f"docs/{page}.md"] for page in ("runs", "forgetting"))
    assert all(f"`{name}`" in told for name in (*MECHANISMS, *GATES))


def test_the_attack_of_your_own_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", TEXTS["docs/extending.md"], re.S)
    assert code is not None
    (tmp_path / "powered.py").write_text(code[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {
        "dataset": "digits",
        "model": "mlp",
        "width": 16,
        "rounds": 2,
        "compressor": "none",
        "clients": 3,
    }
    named = {"attack": "powered:PoweredCosine", "powered:PoweredCosine.power": 0.7, "candidates": 20}
    run = {"engine": "inline", "run-dir": str(tmp_path / "run")}
    result = simulate(Config.from_mapping({**settings, **named, **run}))
    assert 0 <= result.audits["powered:PoweredCosine"].summary["metrics"]["auc"]["mean"] <= 1


def test_the_six_lines_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.S)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 32, 32, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.Sigmoid(), nn.Linear(16, 10))
    labels = torch.tensor([3])
    loss = nn.functional.cross_entropy(model(image), labels)
    gradients = torch.autograd.grad(loss, tuple(model.parameters()))
    names = {"model": model, "gradients": gradients, "images": image, "labels": labels}
    exec(code, names)
    assert float(psnr(names["found"].images, image)) > 60
    assert "certificate" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.html").is_file()


class Page(HTMLParser):
    """What a page has the browser load, and the ids that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note sources, style sheets, icons and hints."""
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(str(given["id"]))
        if source := given.get("src") or given.get("srcset") or given.get("data"):
            self.loads.append(source)
        if tag == "link" and given.get("rel") not in {"canonical", "prev", "next"}:
            self.loads.append(given.get("href") or "")


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path, catalogue) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    pages = {path.name: Page(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.html")}
    assert {path.with_suffix(".html").name for path in DOCS.glob("*.md")} <= set(pages)
    for name, page in pages.items():
        assert page.loads
        assert not [url for url in page.loads if url.startswith(ELSEWHERE)], name
    for style in tmp_path.rglob("*.css"):
        loaded = re.findall(r"""(?:url\(|@import )\s*["']?([^"')\s]+)""", style.read_text(encoding="utf-8"))
        assert not [url for url in loaded if url.startswith(ELSEWHERE)], style.name
    described = set().union(
        *(pages[f"attacks-{one}.html"].ids for one in ("images", "membership", "unlearning"))
    )
    assert set(ATTACKS.names()) <= described
    for registry in (registry for title, registry in KINDS.items() if title not in {"Attacks", "Strategies"}):
        assert any(set(registry) <= page.ids for page in pages.values()), registry.kind
