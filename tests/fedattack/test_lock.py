"""A folder is in use by one process: refused by name, taken over from the dead, by one of many at once."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedattack.config import Config
from fedattack.errors import ConfigError, RunFailed
from fedattack.storage import RunFolder, lock

HERE = "setting 'output.run_dir'"


@contextmanager
def beside(act: Callable[[], None]) -> Iterator[int]:
    """Another process that acts, says so, and then waits to be killed; its number."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            os.write(writing, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"1"
        yield child
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def outcomes(count: int, act: Callable[[], int]) -> list[int]:
    """What so many processes at once come to, as exit codes; each waits for the last one to be there."""
    reading, writing = os.pipe()
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            try:
                os._exit(act())
            except BaseException:
                os._exit(9)
        children.append(child)
    os.close(writing)  # the gate opens for all
    os.close(reading)
    return sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def test_a_second_process_is_told_who_and_since_when(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with beside(lambda: globals().update(kept=RunFolder.create(folder, Config()))) as child:
        found = rf"is in use by process {child} on {socket.gethostname()}, since 20\d\d-.* UTC; give another folder"
        with pytest.raises(ConfigError, match=found):
            RunFolder.create(folder, Config())
        assert RunFolder.create(tmp_path / "other", Config())
    again = RunFolder.create(folder, Config())  # it was killed: what it left is taken up
    assert again.resumed
    assert again.sessions == 2


def test_a_lock_is_given_back(tmp_path: Path) -> None:
    first, second = RunFolder.create(tmp_path, Config()), RunFolder.create(tmp_path, Config())
    first.close()
    first.close()
    assert outcomes(1, lambda: _try(tmp_path)) == [2]  # the second still holds it
    second.close()
    assert outcomes(1, lambda: _try(tmp_path)) == [0]
    third = RunFolder.create(tmp_path, Config())
    assert outcomes(1, lambda: _try(tmp_path)) == [2]
    del third  # nobody refers to it any more
    assert not list(tmp_path.glob(f"{lock.NAME}*"))


def _try(folder: Path) -> int:
    """0: taken; 2: refused."""
    try:
        lock.take(folder, HERE)
    except ConfigError:
        return 2
    return 0


def _try_and_stay(folder: Path, count: int) -> int:
    """As :func:`_try`, and alive until all have tried."""
    code = _try(folder)
    (folder / f"tried-{os.getpid()}").touch()
    while len(list(folder.glob("tried-*"))) < count:
        os.sched_yield()
    return code


@pytest.mark.parametrize("dead", [0, 2])
def test_one_of_many_gets_it(tmp_path: Path, dead: int) -> None:
    """However many died there before, each upon the other's lock."""
    for _ in range(dead):
        with beside(lambda: globals().update(token=lock.take(tmp_path, HERE))):
            pass
    assert len(list(tmp_path.glob(f"{lock.NAME}*"))) == dead
    assert outcomes(4, lambda: _try_and_stay(tmp_path, 4)) == [0, 2, 2, 2]
    token = lock.take(tmp_path, HERE)  # those died too
    lock.release(token)
    assert not list(tmp_path.glob(f"{lock.NAME}*"))


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"host": "elsewhere"}, True),
        ({"space": "pid:[1]"}, True),
        ({"machine": "f" * 32}, True),
        ({"boot": "before"}, False),  # this machine, before it was started anew
        ({"started": 12.0}, False),  # its number was given to another process
    ],
)
def test_who_is_dead(tmp_path: Path, change: dict[str, object], refused: bool) -> None:
    told = lock._here() | {"machine": "a" * 32, "name": "b" * 32, "since": "2026-01-02T03:04:05+00:00"}
    kept, lock._MACHINE = lock._MACHINE, str(tmp_path / "machine-id")
    try:
        (tmp_path / "machine-id").write_text("a" * 32)
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / lock.NAME).write_text(json.dumps(told | change))
        assert outcomes(1, lambda: _try(folder)) == [2 if refused else 0]
    finally:
        lock._MACHINE = kept


def test_a_lock_that_cannot_be_read_is_respected(tmp_path: Path) -> None:
    for text in ("", "{", '{"pid": 1}', '{"name": "../../x", "pid": 1}', "[]"):
        (tmp_path / lock.NAME).write_text(text)
        with pytest.raises(ConfigError, match=r"is in use \(who holds .*\.lock cannot be read\)"):
            lock.take(tmp_path, HERE)


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    assert outcomes(3, lambda: _try_and_stay(tmp_path, 3)) == [0, 2, 2]


def test_a_folder_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    token = lock.take(tmp_path / "a" / "b", HERE)
    lock.release(token)
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"{HERE} = .*: .*; give a folder"):
        lock.take(tmp_path / "file" / "run", HERE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and no run folder"):
        RunFolder.create(tmp_path / "full", Config())
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_the_log_is_lines_that_no_terminal_acts_on(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Config())
    forged = (
        "no space\n2026-01-01T00:00:00+00:00  round 1: all well \x1b[2J\x07\x9b\u202e\u2028\r" + "x" * 10**6
    )
    folder.log(forged)
    text = (folder.path / "log.txt").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 2
    assert len(text) < 5000
    assert "  no space 2026-01-01T00:00:00+00:00 round 1: all well [2J xxx" in text
    assert text.rstrip().endswith("x...")
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunFailed, match="no space left on the device"):
        lock.take(tmp_path, HERE)
