"""When, how long, with what and on what a figure was measured."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from fedattack.config import Config
from fedattack.reporting import formats
from fedattack.storage.plain import flat
from fedattack.version import fedattack_version

_LIBRARIES = ("torch", "flwr", "ray", "numpy", "scipy", "scikit-learn")
_PROCESSORS = Path("/proc/cpuinfo")


def provenance(begun: datetime.datetime, sessions: int = 1) -> dict[str, Any]:
    """What a summary says of the run itself, in JSON's own types.

    "begun" and "ended" (now) as ISO 8601 in UTC, "seconds" between them, "sessions" (more than 1: the run was taken
    up again, and the time of earlier sessions is not counted), "versions" (package -> version) and "machine"
    ("system", "processor", "cores", "usable_cores", "memory" in bytes, "gpus": names).

    Parameters
    ----------
    begun
        When this session began, with its time zone.
    """
    ended = datetime.datetime.now(datetime.UTC)
    return {
        "begun": begun.astimezone(datetime.UTC).isoformat(timespec="seconds"),
        "ended": ended.isoformat(timespec="seconds"),
        "seconds": (ended - begun).total_seconds(),
        "sessions": sessions,
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Package -> version, of fedattack, of what computes beneath it, and of Python."""
    found = {"fedattack": fedattack_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"Python": platform.python_version()}


def machine() -> dict[str, Any]:
    """What this process computes on; see :func:`provenance`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "memory": psutil.virtual_memory().total,
        "gpus": gpus,
    }


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = _PROCESSORS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named[0] if named else platform.processor()) or "not told by the system"


def told(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A :func:`provenance` as terms and texts."""
    machine, sessions = run["machine"], run["sessions"]
    cores = f"{machine['usable_cores']} of {machine['cores']} cores"
    resumed = f"; taken up {sessions - 1} times, earlier sessions not counted" if sessions > 1 else ""
    return [
        ("Begun", _moment(run["begun"])),
        ("Ended", _moment(run["ended"])),
        ("Duration", f"{formats.seconds(run['seconds'])}{resumed}"),
        ("Processor", f"{machine['processor']}, {cores}, {formats.size(machine['memory'])} of memory"),
        ("Graphics processor", _counted(machine["gpus"]) or "none"),
        ("System", machine["system"]),
        ("Versions", ", ".join(f"{name} {number}" for name, number in run["versions"].items())),
    ]


def _moment(text: str) -> str:
    return datetime.datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S UTC")


def _counted(names: Sequence[str]) -> str:
    """``8 x NVIDIA H200``."""
    return ", ".join(f"{names.count(one)} x {one}" for one in dict.fromkeys(names))


def changed_settings(config: Config) -> list[tuple[str, str]]:
    """Settings that differ from their defaults, of those that can change a result, and their values."""
    usual = flat(Config().result_settings())
    here = flat(config.result_settings())
    return [(name, shown(value)) for name, value in here.items() if value != usual.get(name)]


def shown(value: Any) -> str:
    """A setting's value as a person reads it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or formats.NONE
    return formats.NONE if value is None or value == "" else str(value)
