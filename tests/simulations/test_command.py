"""The command: what it says without work, how much, in which encoding, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from fedattack.config import Config
from fedattack.errors import ConfigError, DataError
from fedattack.registry import check_names_of_file, outside_names, trust
from fedattack.storage import RunFolder, load_observations
from simulations import progress
from simulations.cli import options, references, sources, written
from simulations.run import main

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--engine", "inline", "--dataset", "digits", "--model", "mlp", "--compressor", "none", "--clients", "2",
    "--limit", "200", "--set", "federation.evaluate=false",
]  # fmt: skip


def run(*arguments: str, env: dict[str, str] | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | (env or {})
    return subprocess.run(
        [sys.executable, "-m", "fedattack", *arguments],
        capture_output=True, text=True, env=environment, timeout=300, **how,
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command here: (exit code, standard output, standard error)."""

    def ask(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedattack", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return ask


def test_the_written_catalogue_is_that_of_the_sources() -> None:
    stored = json.loads(sources.FILE.read_text())["sources"]
    assert stored == sources.sources_hash(), "sources have changed: run `python -m simulations.cli.catalogue`"


@pytest.mark.slow
def test_the_written_catalogue_says_what_the_registries_say() -> None:
    from simulations.cli.catalogue import document

    stored = json.loads(sources.FILE.read_text())
    assert json.loads(json.dumps(document())) == stored


def test_lists_take_less_than_a_second_and_150_mb_and_no_torch() -> None:
    told = (
        "import re, resource, sys\n"
        "from simulations.cli import written\n"
        "written.current = written._stored  # as after `python -m simulations.cli.catalogue`\n"
        "from simulations.run import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        # The kernel's peak of the process begins with the one that it was forked from.
        "peak = re.search('VmHWM:\\\\s*(\\\\d+)', open('/proc/self/status').read())[1]\n"
        "print(used.ru_utime + used.ru_stime, peak, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    for arguments in (["list"], ["show", "hcgla"]):
        answer = subprocess.run(
            [sys.executable, "-c", told, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
        )
        seconds, kilobytes, torch = answer.stderr.split()[-3:]
        assert float(seconds) < 1.0, arguments
        assert int(kilobytes) < 150_000, arguments
        assert torch == "False", arguments
        assert len(answer.stdout) > 500


def test_show_has_paper_command_presets_and_bibtex() -> None:
    shown = dict(written._stored()["shown"]["dlg"])
    assert "Deep Leakage from Gradients" in shown["paper"]
    assert shown["command"] == "fedattack --attack dlg"
    assert "mnist-cnn-small" in shown["presets"]
    assert shown["BibTeX"] == (
        "@misc{zhu2019deep,\n  author = {Zhu and Liu and Han},\n  title = {{Deep Leakage from Gradients}},\n"
        "  howpublished = {NeurIPS},\n  year = {2019}\n}"
    )
    text = 'Wang et al., "A Title: of Words", arXiv 2009.06228, 2020; words: Li, Öz, "Two", ICML 2021, section 3.'
    first, second = references.bibtex(text).split("\n\n")
    assert "author = {Wang and others}" in first
    assert "eprint = {2009.06228}" in first
    assert "{oz2021" not in second
    assert "author = {Li and Öz}" in second
    assert "howpublished = {ICML}" in second
    assert references.bibtex("The step is Levenberg's.") == ""


def commands() -> Iterator[tuple[str, list[str]]]:
    """Attack and the command that `fedattack show` prints for it."""
    for name, _ in written._stored()["kinds"]["Attacks"]:
        yield name, shlex.split(dict(written._stored()["shown"][name])["command"])[1:]


def test_every_attack_has_a_command_whose_settings_are_accepted() -> None:
    for name, arguments in commands():
        found = parsed(arguments)
        assert name in found.attack.names


def parsed(arguments: list[str]) -> Config:
    """The configuration that a command line of options makes."""
    settings: dict[str, Any] = {}
    left = list(arguments)
    while left:
        option, value = left.pop(0), left.pop(0) if left and not left[0].startswith("--") else True
        name = str(value) if option == "--set" else f"{option.removeprefix('--')}={value}"
        settings[name.partition("=")[0]] = name.partition("=")[2]
    return Config.from_mapping(settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["analytic", "loss-threshold", "unlearn-max-loss", "spear"])
def test_commands_of_show_run(name: str, tmp_path: Path) -> None:
    arguments = dict(commands())[name]
    answer = run(*arguments, "--engine", "inline", "--run-dir", "run", "-q", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert name in json.loads((tmp_path / "run" / "summary.json").read_text())["attacks"]


def test_version_and_two_values_and_help(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert re.fullmatch(r"fedattack \d+\.\d+\.\d+( \(checkout\))?\n", asked("--version")[1])
    code, _, told = asked("--seed", "1", "--seed", "2")
    assert (code, told) == (2, "error: option --seed is given twice (1, 2); accepted: one value\n")
    code, _, told = asked("--set", "a=1", "--set", "seed=1", "--set", "seed=2")
    assert code == 2
    assert "two values, '1' and '2'" in told
    assert len(asked("--help")[1].splitlines()) <= 50
    shown = asked("attack", "--help")[1]
    assert "--truth" in shown
    assert "--dataset" not in shown
    assert "--compressor" not in shown


def test_names_are_completed_without_torch() -> None:
    assert options.completed("Attacks")("dlg,hc") == ["dlg,hcgla"]
    assert options.completed("Data sets")("fac") == ["faces"]
    assert options.completed("Models")("lenet-z") == ["lenet-zhu"]
    assert "hcgla" in options.completed_anything("hc")
    assert options.completed_kinds("att") == ["attacks"]


@pytest.mark.slow
def test_the_shell_asks_for_names() -> None:
    asking = {
        "COMP_WORDS": "fedattack --attack dlg,hc",
        "COMP_CWORD": "2",
        "_FEDATTACK_COMPLETE": "complete_bash",
    }
    assert run(env=asking).stdout.split() == ["dlg,hcgla"]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_no_encoding_breaks_the_output(encoding: str, tmp_path: Path) -> None:
    there = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    folder = tmp_path / "[bold]été[/] – 数"
    answer = subprocess.run(
        [sys.executable, "-m", "fedattack", *TINY, "--attack", "analytic", "--run-dir", str(folder)],
        capture_output=True, env=os.environ | there | {"PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    shown = answer.stdout.decode(encoding)
    assert "[bold]" in shown
    assert "Traceback" not in answer.stderr.decode(encoding)


def test_what_an_encoding_lacks_is_written_in_ascii() -> None:
    from simulations import run as command

    command.codecs.register_error("fedattack", command._in_ascii)
    shown = "─│┃╭ – … ≤ 12 é \udcff 数".encode("ascii", "fedattack").decode()
    assert shown == "-||+ - ... <= 12 e ? ?"


@pytest.mark.slow
def test_a_closed_pipe_is_no_fault() -> None:
    shown = subprocess.run(
        f"{sys.executable} -m fedattack settings | head -n 1",
        shell=True, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert shown.stderr == ""


def test_nothing_typed_is_markup() -> None:
    for path in (ROOT / "simulations").rglob("*.py"):
        if "bench" not in path.parts:
            found = re.findall(r"\.print\(\s*f?\"[^\"]*\[/?\w", path.read_text(encoding="utf-8"))
            assert not found, path
    where = Console(file=io.StringIO(), width=40)
    progress.tell(where, "run folder", "[bold]x[/] " + "y" * 50, "[/nothing]")
    assert where.file.getvalue() == f"run folder [bold]x[/] {'y' * 50} [/nothing]\n"  # type: ignore[attr-defined]


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    where = Console(file=io.StringIO(), width=80)
    with progress.stages(where) as shown:
        for step in range(1, 101):
            now[0] = step * 1.0
            shown("federation", step / 100, f"round {step}")
    lines = where.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [
        "federation: 1% in 0:00; round 1",
        "federation: 31% in 0:30, about 1:07 left; round 31",
        "federation: 61% in 1:00, about 0:38 left; round 61",
        "federation: 91% in 1:30, about 0:09 left; round 91",
        "federation: 100% in 1:39; round 100",
    ]


def test_ctrl_c_names_the_run_folder(asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simulations import pipeline

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_train", interrupted)
    monkeypatch.chdir(tmp_path)
    code, _, told = asked(*TINY, "--attack", "analytic", "--run-dir", "[run]")
    assert code == 130
    assert told == "interrupted; [run] can be resumed with the same command\n"


def test_levels_that_fail() -> None:
    def summary(*levels: str) -> dict[str, Any]:
        return {"attacks": {str(number): {"level": level} for number, level in enumerate(levels)}}

    for level, levels, found in (
        ("leak", ("none", "leak"), True), ("leak", ("partial", "undecided", "failed"), False),
        ("partial", ("partial",), True), ("partial", ("leak",), True), ("partial", ("none", "undecided"), False),
        (None, ("leak",), False),
    ):  # fmt: skip
        if found:
            with pytest.raises(typer.Exit) as ended:
                options.fail_on(level, summary(*levels))
            assert ended.value.exit_code == 3
        else:
            options.fail_on(level, summary(*levels))


def test_a_dry_run_says_what_it_would_cost(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asking = [*TINY, "--attack", "analytic,ig", "--set", "ig.iterations=2"]
    code, out, _ = asked(*asking, "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    assert set(found["attacks"]) == {"analytic", "ig"}
    assert found["cost"]["parameters"] == 64 * 64 + 64 + 64 * 10 + 10
    assert found["cost"]["bytes sent out a client"] == 4 * found["cost"]["parameters"]
    assert 0 < found["cost"]["bytes received a client"] - 4 * found["cost"]["parameters"] < 100
    assert found["cost"]["attacks"]["ig"]["iterations"] == 2
    assert found["settings"]["model"]["width"] == 64


@pytest.mark.slow
def test_json_and_fail_on(asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asking = [*TINY, "--attack", "analytic,ig", "--set", "ig.iterations=2"]
    code, out, err = asked(*asking, "--json", "--fail-on", "leak", "--run-dir", "run")
    assert code == 3  # one image through a linear layer comes back whole
    assert json.loads(out) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "run folder run" in err
    code, out, err = asked(*asking, "-q", "--run-dir", "run")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2


# ---------------------------------------------------------------------- what files may name


def test_names_of_code_in_a_text() -> None:
    assert outside_names("hcgla, a.b:C ,cuda:0,localhost:6379") == ["a.b:C"]
    assert outside_names('["\\u0061.b:C"]')[-1] == "a.b:C"
    assert outside_names("{x = 'a-b.c:D'}") == ["a-b.c:D", "a-b.c:D"]
    assert outside_names({"a:B": [1, "c:D"]}) == ["a:B", "c:D"]
    assert outside_names("/tmp/a:b/c") == []


def test_a_file_names_what_is_registered_unless_it_was_typed(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[attack]\nnames = ["nowhere.at_all:Attack"]\n')
    with pytest.raises(ConfigError, match=r"--trust nowhere\.at_all:Attack"):
        Config.from_toml(tmp_path / "c.toml")
    check_names_of_file({"attack": {"names": ["hcgla"]}}, "file")
    trust("nowhere.at_all:Attack")
    assert Config.from_toml(tmp_path / "c.toml").attack.names == ("nowhere.at_all:Attack",)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with observations."""
    from simulations.pipeline import simulate

    folder = tmp_path_factory.mktemp("observed") / "run"
    more = ["--attack", "analytic", "--set", "output.save_observations=true", "--run-dir", str(folder)]
    simulate(parsed([*TINY, *more]))
    return folder


def test_an_observation_folder_calls_no_code(
    observed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(observed, "run")
    (tmp_path / "evil_net.py").write_text("from pathlib import Path\nPath('called').touch()\nNet = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for place, value in (
        ("model", "evil_net:Net"),
        ("training", "evil_net:Net"),
        ("compression", "evil_net:Net"),
    ):
        for path in (tmp_path / "run" / "observations").rglob("*.json"):
            document = json.loads(path.read_text())
            kept = json.dumps(document)
            document["scenario"][place]["task" if place == "training" else "name"] = value
            path.write_text(json.dumps(document))
            with pytest.raises(ConfigError, match="evil_net:Net"):
                load_observations(tmp_path / "run" / "observations")
            code, _, told = asked("attack", "run", "--attack", "analytic", "--engine", "inline")
            assert code == 2
            assert "--trust evil_net:Net" in told
            path.write_text(kept)
    assert not (tmp_path / "called").exists()
    assert "evil_net" not in sys.modules


def test_answers_without_the_truth_have_a_page(
    observed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = asked(
        "attack", str(observed), "--attack", "analytic", "--engine", "inline", "--run-dir", "answers"
    )
    assert code == 0
    assert "nothing is scored without --truth" in out
    page = (tmp_path / "answers" / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') == 2
    assert "scored by nobody" in page
    assert "certificate" in page
    assert "http" not in page.replace("http-equiv", "")
    from simulations.pipeline import attack_folder

    with pytest.raises(DataError, match="--truth 'none'"):
        attack_folder(observed, Config.from_mapping({"attack": "ig"}), truth=Path("none"))


def test_every_setting_can_be_given(tmp_path: Path) -> None:
    from adversaries import ATTACKS
    from fedattack.registry import build_plugin

    for text in ("3,1,0.3", "[3, 1, 0.3]", "3, 1, 0.3"):
        built = build_plugin(ATTACKS.get("hcgla"), "hcgla", {"schedule": text}, {})
        assert built.schedule == (3.0, 1.0, 0.3)  # type: ignore[attr-defined]
    found = Config.from_mapping({"federation.strategy_options": "{a = 1}", "attack.targets": "[1, 2]"})
    assert found.federation.strategy_options == {"a": 1}
    assert found.attack.targets == (1, 2)
    folder = RunFolder.create(tmp_path / "run", found)
    assert Config.from_toml(folder.path / "config.toml") == found


# ---------------------------------------------------------------------- what the documents tell people to type


def blocks() -> list[list[str]]:
    """The arguments of every `fedattack` command in README's shell blocks and in the documents' ones."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(
            r"^```(?:sh|bash|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
        ):
            for line in block.replace("\\\n", " ").splitlines():
                for one in re.split(r"&&|\|\||;(?=\s)", line.split(" #")[0]):
                    words = shlex.split(one.removeprefix("$ "))
                    if words and words[0] == "fedattack":
                        found.append([word.strip("[]") for word in words[1:]])
    return found


def test_commands_of_the_documents_are_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Accepted(Exception):
        """Every option is known and every setting valid."""

    def accepted(*_: Any, **__: Any) -> None:
        raise Accepted

    from fedattack import metrics

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "ready_metrics", accepted)
    found = [one for one in blocks() if "DIR" not in " ".join(one)]
    assert found
    for arguments in found:
        if not arguments[0].startswith("-"):
            continue  # sub-commands: their options are looked at below
        for index, word in enumerate(arguments):  # a file of the example is there
            if word == "--config":
                (tmp_path / "one.toml").write_text("attack = {names = ['hcgla']}")
                arguments[index + 1] = "one.toml"
        monkeypatch.setattr(sys, "argv", ["fedattack", *arguments])
        with pytest.raises(Accepted):
            main()
    for arguments in found:
        if arguments[0].startswith("-"):
            continue
        import click

        from simulations.run import _command

        command: Any = _command()
        rest = list(arguments)
        while isinstance(command, click.Group):
            name = rest.pop(0)
            assert name in command.commands, arguments
            command = command.commands[name]
        context = click.Context(command)
        parser = command.make_parser(context)
        parser.parse_args(rest)
