"""What a run makes of a folder in which a file was damaged: refused by name, or the same bits."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import DataError, FedattackError
from fedattack.files import content_hash
from fedattack.observation import Observation
from fedattack.storage import load_observations
from simulations.engine.federation import RoundRecord, run_federation
from simulations.pipeline import simulate

KINDS = (
    "bit",
    "cut",
    "emptied",
    "deleted",
    "longer",
    "another round's",
    "another file's",
    "another run's",
    "other settings'",
)
_JOURNAL = {
    "dataset": "digits",
    "model": "tiny-cnn",
    "clients": 4,
    "rounds": 4,
    "compressor": "dgc",
    "compression": 0.05,
    "strategy": "fedadam",
    "batch-size": 4,
    "engine": "inline",
    "limit": 200,
    "data.auxiliary_size": 0,
}
_WHOLE = {
    "dataset": "digits",
    "model": "tiny-cnn",
    "clients": 3,
    "rounds": 2,
    "batch-size": 2,
    "limit": 300,
    "engine": "inline",
    "attack": ("ig", "loss-threshold"),
    "ig.iterations": 2,
    "ig.restarts": 1,
    "victims": 2,
    "candidates": 4,
    "metrics": "psnr",
    "save-observations": True,
}


class _Stopped(Exception):
    """Stands for a process that is killed between two rounds."""


def run(quick: bool = False, count: int = 500) -> dict[str, Any]:
    """`count` damages of every kind: three fifths of a journal, and a fifth each of answers and of observations.

    ``silent``: how many led to other bits without a word; ``first``: which the first of them were.
    """
    count = 20 if quick else count
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    for name, tries, damage in (
        ("journal", 3 * count // 5, journals),
        ("answers", count // 5, answers),
        ("observations", count - 3 * count // 5 - count // 5, observations),
    ):
        found, silent = damage(tries)
        figures |= {f"{name}_{what}": number for what, number in sorted(found.items())}
        figures |= {f"{name}_silent": len(silent), f"{name}_first": silent[:3]}
    return figures | {"seconds": time.perf_counter() - started}


def journals(count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Damages of the journal of a run that was killed after its third round; it is gone on with."""

    def begun(folder: Path, more: Mapping[str, Any]) -> None:
        def stop(record: RoundRecord) -> None:
            if record.round == 3:
                raise _Stopped

        with suppress(_Stopped):
            _federation(folder, more, on_round=stop)

    def outcome(folder: Path) -> str:
        return _federation(folder, {})

    return _damaged(
        count, seed, begun, outcome, lambda folder: [folder / "run.json", *_files(folder / "journal")]
    )


def answers(count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Damages of what a whole run has left of its attacks' answers; the report is made again."""

    def begun(folder: Path, more: Mapping[str, Any]) -> None:
        _simulated(folder, more)

    def outcome(folder: Path) -> str:
        before = len((folder / "log.txt").read_text(encoding="utf-8").splitlines())
        found = _simulated(folder, {})
        told = (folder / "log.txt").read_text(encoding="utf-8").splitlines()[before:]
        # Of several attacks one may fail, which the report says; the others go on.
        if failed := [line for line in told if " failed: " in line]:
            raise DataError(failed[0])
        return found

    return _damaged(count, seed, begun, outcome, lambda folder: _files(folder / "parts"))


def observations(count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Damages of saved observations, which are read."""

    def begun(folder: Path, more: Mapping[str, Any]) -> None:
        _simulated(folder, more)

    def outcome(folder: Path) -> str:
        return _digest(load_observations(folder / "observations"))

    def files(folder: Path) -> list[Path]:
        names = ("candidates.safetensors", "global.safetensors")  # of membership attacks, read by them alone
        return [path for path in _files(folder / "observations") if path.name not in names]

    return _damaged(count, seed, begun, outcome, files)


def _federation(folder: Path, more: Mapping[str, Any], **how: Any) -> str:
    config = Config.from_mapping({**_JOURNAL, **more})
    seen: list[Observation] = []
    result = run_federation(
        config,
        build_world(config),
        run_dir=folder,
        on_observation=seen.append,
        observe=lambda round, client: round != 2 and client < 2,
        **how,
    )
    told = [(r.round, r.loss, r.accuracy, r.clients, r.wire_bytes) for r in result.rounds]
    return f"{content_hash(result.weights)} {told} {_digest(seen)}"


def _simulated(folder: Path, more: Mapping[str, Any]) -> str:
    result = simulate(Config.from_mapping({**_WHOLE, **more, "run-dir": str(folder)}))
    told = {name: audit.summary["metrics"] for name, audit in result.audits.items()}
    images = {
        f"{name} {key}": one.images
        for name, found in result.reconstructions.items()
        for key, one in found.items()
    }
    return f"{told} {content_hash(images)}"


def _digest(seen: list[Observation]) -> str:
    found = hashlib.sha256()
    for one in seen:
        tensors = {**one.weights, "values": one.update.values, **one.buffers}
        if one.update.indices is not None:
            tensors["indices"] = one.update.indices
        if one.auxiliary is not None:
            tensors["public"] = one.auxiliary.images
        found.update(f"{one.round} {one.client} {one.num_examples} {content_hash(tensors)}".encode())
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _damaged(
    count: int,
    seed: int,
    begun: Callable[[Path, Mapping[str, Any]], None],
    outcome: Callable[[Path], str],
    files: Callable[[Path], list[Path]],
) -> tuple[Counter[str], list[str]]:
    """How often a damaged folder was refused by name or led to the same; what led to something else in silence."""
    rng = np.random.default_rng(seed)
    found, silent = Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as place:
        whole, other, settings, copy = (Path(place) / name for name in ("whole", "other", "settings", "copy"))
        begun(whole, {})
        begun(other, {})
        begun(settings, {"seed": 1})
        shutil.copytree(whole, copy)
        expected = outcome(copy)
        for number in range(count):
            shutil.rmtree(copy)
            shutil.copytree(whole, copy)
            kind = KINDS[number % len(KINDS)]
            path = files(copy)[rng.integers(len(files(copy)))]
            if not _damage(path, kind, copy, {"another run's": other, "other settings'": settings}, rng):
                found["unchanged"] += 1
                continue
            torch.manual_seed(0)
            try:
                same = outcome(copy) == expected
            except FedattackError as error:
                found["refused" if str(copy) in str(error) or path.name in str(error) else "unnamed"] += 1
                continue
            found["same" if same else "silent"] += 1
            if not same:
                silent.append(f"{kind}: {path.relative_to(copy)}")
    return found, silent


def _damage(
    path: Path, kind: str, folder: Path, others: Mapping[str, Path], rng: np.random.Generator
) -> bool:
    """Damage a file; whether it is another one now."""
    before = path.read_bytes()
    data = bytearray(before)
    if kind == "bit" and data:
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        data = data[: rng.integers(len(data))]
    elif kind == "emptied":
        data = bytearray()
    elif kind == "longer":
        data += bytes(int(rng.integers(1, 100)))
    elif kind == "deleted":
        path.unlink()
        return True
    elif kind in others:
        source = others[kind] / path.relative_to(folder)
        data = bytearray(source.read_bytes() if source.is_file() else b"")
    else:
        alike = [one for one in _files(path.parent) if one != path and one.suffix == path.suffix]
        if kind == "another round's":
            alike = [one for one in alike if one.name[:6] == path.name[:6]] or alike
        data = bytearray(alike[rng.integers(len(alike))].read_bytes() if alike else b"")
    path.write_bytes(bytes(data))
    return bytes(data) != before
