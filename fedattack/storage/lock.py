"""A folder in use by one process at a time, on a local disk or on a shared one.

A lock is a file that only one process can make, with its name in it: the file is written apart and then linked, which
NFS does at once or not at all (its ``flock`` may be local to a machine, or missing). A process that died leaves its
lock; another on the same machine can tell, and goes on from it: the file that takes a dead lock's place is named
after that lock, so that only one can make that too.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedattack.errors import ConfigError
from fedattack.files import cannot_write
from fedattack.reading import Unreadable, read_json

_LARGEST = 2**16
NAME = ".lock"
_MACHINE, _BOOT, _SPACE = "/etc/machine-id", "/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"


@dataclass
class _Held:
    """A lock of this process: its files from the oldest on, who asked for it here, and which process that was.

    `made`: whether the folder was not there before; it goes again where nothing was put into it.
    """

    chain: list[Path]
    tokens: set[str]
    process: int
    made: bool


_held: dict[Path, _Held] = {}
_guard = threading.RLock()


@contextmanager
def in_use(folder: Path, setting: str) -> Iterator[None]:
    """Keep other processes out of a folder for the block; see :func:`take`."""
    token = take(folder, setting)
    try:
        yield
    finally:
        release(token)


def take(folder: Path, setting: str) -> str:
    """Make a folder, and keep other processes out of it until :func:`release` is given what this returns.

    Within a process it can be taken several times, and is free when each has been given back.

    Parameters
    ----------
    setting
        What chose the folder, for the refusal: "setting 'output.run_dir'", "--out".

    Raises
    ------
    ConfigError
        If another process uses the folder (which, on which machine, since when), or it cannot be made.
    RunFailed
        If no lock can be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{setting} = {str(folder)!r}: {error.strerror}; give a folder") from None
    folder = folder.resolve()
    token = uuid.uuid4().hex
    with _guard:
        held = _held.get(folder)
        if held is None or held.process != os.getpid() or not held.chain[-1].exists():
            held = _held[folder] = _Held(_take(folder, setting), set(), os.getpid(), made)
        held.tokens.add(token)
    return token


def release(token: str) -> None:
    """Give back what :func:`take` took; nothing happens the second time, or in another process."""
    with _guard:
        for folder, held in list(_held.items()):
            if token in held.tokens and held.process == os.getpid():
                held.tokens.remove(token)
                if not held.tokens:
                    del _held[folder]
                    for (
                        path
                    ) in held.chain:  # the oldest first: whoever comes meanwhile still meets the newest
                        with suppress(OSError):
                            path.unlink()
                    if held.made:
                        with suppress(OSError):  # not empty
                            folder.rmdir()


def _take(folder: Path, setting: str) -> list[Path]:
    """The chain of lock files whose last one is ours."""
    told = _here() | {"name": uuid.uuid4().hex, "since": datetime.datetime.now(datetime.UTC).isoformat()}
    while True:
        chain: list[tuple[Path, dict[str, Any]]] = []
        path = folder / NAME
        while not _make(path, told):
            holder = _read(path)
            if holder is None:  # given back just now
                break
            if not _is_dead(holder):
                raise ConfigError(_refusal(folder, path, holder, setting))
            chain.append((path, holder))
            path = folder / f"{NAME}-{holder['name'][:32]}"
        else:
            # Whoever gives a lock back takes its oldest file away first: then this one hangs on nothing.
            if all((_read(one) or {}).get("name") == holder["name"] for one, holder in chain):
                return [*(one for one, _ in chain), path]
            with suppress(OSError):
                path.unlink()


def _make(path: Path, told: dict[str, Any]) -> bool:
    """Whether the file was made by us, with its content, and was not there before."""
    apart = path.with_name(f"{NAME}.{told['name']}.new")
    try:
        apart.write_text(json.dumps(told), encoding="utf-8")
        try:
            os.link(apart, path)
        except FileExistsError:
            # NFS may have made it and lost the answer.
            return (_read(path) or {}).get("name") == told["name"]
        except OSError:  # a file system without links
            return _make_anew(path, told)
        return True
    except OSError as error:
        raise cannot_write(path, error, 0) from error
    finally:
        with suppress(OSError):
            apart.unlink()


def _make_anew(path: Path, told: dict[str, Any]) -> bool:
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(told))
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds a lock; None where the file is gone, nobody by name where it cannot be read."""
    try:
        found = read_json(path, _LARGEST)
    except Unreadable as error:
        return None if error.absent else {}
    usable = (
        isinstance(found, dict) and str(found.get("name", "")).isalnum() and type(found.get("pid")) is int
    )
    return found if usable else {}


def _here() -> dict[str, Any]:
    """This process, so that another on the same machine can tell whether it still lives."""
    return {
        "host": socket.gethostname(),
        "machine": _text(_MACHINE),
        "boot": _text(_BOOT),
        "space": _link(_SPACE),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder is a process of this machine that is no more; False where that cannot be told."""
    here = _here()
    if not holder or holder.get("host") != here["host"] or holder.get("machine") != here["machine"]:
        return False
    if holder.get("boot") != here["boot"]:
        return bool(here["machine"] and here["boot"])  # the machine was started anew since
    if holder.get("space") != here["space"]:
        return False
    try:
        process = psutil.Process(holder["pid"])
        # Numbers come again; a process that began at another time is another.
        return abs(process.create_time() - float(holder.get("started", 0))) > 2 or (
            process.status() == psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, TypeError, ValueError):
        return False


def _refusal(folder: Path, path: Path, holder: dict[str, Any], setting: str) -> str:
    where = f"{setting} = {str(folder)!r}: is in use"
    if not holder:
        return f"{where} (who holds {path} cannot be read); give another folder, or remove that file"
    since = str(holder.get("since", ""))[:19].replace("T", " ")
    who = f"process {holder['pid']} on {holder.get('host')}, since {since} UTC"
    return f"{where} by {who}; give another folder, wait for it, or, where that process is no more, remove {path}"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    with suppress(OSError):
        return os.readlink(path)
    return ""
