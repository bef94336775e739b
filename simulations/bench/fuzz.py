"""Damaged files of every kind before the readers that take them: refused in one sentence, in time, in little memory.

Each case is a seeded mutation of a sound file. It runs in a forked child that is watched from outside: a reader that
hangs, takes memory or ends the interpreter is a figure, too.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedattack.errors import BadRequest, PayloadError
from simulations.bench.fuzz_files import Kind, file_kinds

CASES = 100_000
MEMORY = 512 * 2**20
"""Bytes by which a reader may make the process grow."""
SECONDS = 20.0
_SPACE = 6 * 2**30
_BATCH = 2_000
_LENGTHS = (
    0,
    1,
    2**7,
    2**8 - 1,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**64 - 1,
)


def run(quick: bool = False, long: bool = False) -> dict[str, Any]:
    """``cases``, ``read`` and ``refused``; ``faults``, ``hangs`` and ``over_memory``, which are to be 0.

    Also ``largest_mib`` and ``slowest_s`` of a case, ``kinds`` of files, and the first ten of what went wrong.
    `long`: ten times as many.
    """
    return fuzz_files(300 if quick else CASES * (10 if long else 1))


@dataclass
class _Tally:
    """What came of the cases."""

    read: int = 0
    refused: int = 0
    over_memory: int = 0
    largest: int = 0
    slowest: float = 0.0


def fuzz_files(cases: int, seed: int = 0, first: int = 0) -> dict[str, Any]:
    """The figures of :func:`run` for so many cases, each reproducible by its number and the seed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kinds = file_kinds(Path(folder))
        for kind in kinds.values():  # what is not damaged is read, or the figures mean nothing
            kind.read(kind.write(kind.mended(kind.sound), Path(folder) / "sound"))
        total, wrong = _Tally(), list[dict[str, Any]]()
        at, end = first, first + cases
        while at < end:
            at = _batch(kinds, Path(folder), seed, at, min(end, at + _BATCH), total, wrong)
    counts = Counter(one["what"] for one in wrong)
    return {
        "cases": cases,
        "kinds": len(kinds),
        "read": total.read,
        "refused": total.refused,
        "faults": counts["fault"] + counts["end"],
        "hangs": counts["hang"],
        "over_memory": counts["memory"],
        "largest_mib": total.largest / 2**20,
        "slowest_s": total.slowest,
        "seconds": time.monotonic() - began,
        "wrong": wrong[:10],
    }


def _batch(
    kinds: dict[str, Kind],
    folder: Path,
    seed: int,
    at: int,
    end: int,
    total: _Tally,
    wrong: list[dict[str, Any]],
) -> int:
    """Run cases in a child until all are done, or one ends it; the number of the first that is left."""
    shared = mmap.mmap(-1, 16)  # the case that is at work, and when it began
    results = folder / "results.jsonl"
    results.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            _child(kinds, folder, seed, at, end, shared, results)
            code = 0
        finally:
            os._exit(code)
    what = ""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        case, started = struct.unpack("qd", shared[:16])
        if started and time.monotonic() - started > 2 * SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            what, status = "hang", 0
            break
        time.sleep(0.02)
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else ():
        found = json.loads(line)
        if "what" in found:
            wrong.append(found)
            continue
        total.read += found["read"]
        total.refused += found["refused"]
        total.largest = max(total.largest, found["largest"])
        total.slowest = max(total.slowest, found["slowest"])
    if not what and status == 0:
        return end
    case = int(struct.unpack("qd", shared[:16])[0])
    name = _kind_of(kinds, seed, case)
    reason = "it did not end" if what else f"the interpreter ended with status {status}"
    wrong.append({"what": what or "end", "case": case, "kind": name, "error": reason})
    return case + 1


class _Late(BaseException):
    """Raised in a reader by the clock; no handler of errors takes it."""


def _child(
    kinds: dict[str, Kind], folder: Path, seed: int, at: int, end: int, shared: mmap.mmap, results: Path
) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    faulthandler.disable()
    warnings.simplefilter("ignore")
    limit = _status("VmSize") + _SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def late(*_: object) -> None:
        raise _Late

    signal.signal(signal.SIGALRM, late)
    place = folder / f"at-{os.getpid()}"
    place.mkdir()
    with results.open("a", encoding="utf-8") as stream:
        for case in range(at, end):
            shared[:16] = struct.pack("qd", case, time.monotonic())
            tally, told = _one(kinds, place, seed, case)
            lines = [vars(tally), *([told] if told else [])]
            stream.write("".join(json.dumps(line) + "\n" for line in lines))
            stream.flush()


def _kind_of(kinds: dict[str, Kind], seed: int, case: int) -> str:
    return list(kinds)[case % len(kinds)]


def _one(kinds: dict[str, Kind], place: Path, seed: int, case: int) -> tuple[_Tally, dict[str, Any] | None]:
    """One case: what came of it, and what was wrong, if anything."""
    rng = np.random.default_rng([seed, case])
    name = _kind_of(kinds, seed, case)
    kind = kinds[name]
    path = kind.write(kind.mended(mutated(kind.sound, rng)), place)
    tally, wrong = _Tally(), None
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    before, began = _status("VmRSS"), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        kind.read(path)
        tally.read = 1
    except (BadRequest, PayloadError) as error:
        tally.refused = 1
        text = str(error)
        if len(text) > 4_000 or not text.replace("\n", "").isprintable():  # settings are listed on lines
            wrong = ("fault", f"says {text[:200]!a}")
    except _Late:
        wrong = ("hang", f"took {SECONDS:g} seconds")
    except BaseException as error:  # whatever else a reader lets through is the fault that is looked for
        wrong = ("fault", f"{type(error).__name__}: {str(error)[:200]!a} at {_where(error)}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    tally.largest, tally.slowest = _status("VmHWM") - before, time.monotonic() - began
    if tally.largest > MEMORY and wrong is None:
        tally.over_memory, wrong = 1, ("memory", f"grew by {tally.largest / 2**20:.0f} MiB")
    if wrong is None:
        return tally, None
    return tally, {"what": wrong[0], "case": case, "kind": name, "error": wrong[1]}


def _where(error: BaseException) -> str:
    """The innermost place in this project that an error passed."""
    found, trace = "?", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/fedattack/" in file or "/adversaries/" in file or "/simulations/" in file:
            found = f"{file.rsplit('/', 2)[-2]}/{file.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _status(name: str) -> int:
    """Bytes of an entry of this process's memory."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as stream:
        for line in stream:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


# ------------------------------------------------------------------ mutations


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four mutations of some bytes: flips, lengths, cuts, swaps, repetitions, insertions."""
    for _ in range(int(rng.integers(1, 5))):
        data = _MUTATIONS[int(rng.integers(len(_MUTATIONS)))](data, rng)
    return data


def _place(size: int, rng: np.random.Generator) -> int:
    """A position; every other one among the first and last bytes, where formats keep their headers."""
    if size == 0:
        return 0
    if rng.random() < 0.4:
        return int(rng.integers(min(size, 128)))
    if rng.random() < 0.2:
        return size - 1 - int(rng.integers(min(size, 128)))
    return int(rng.integers(size))


def _flip(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        if changed:
            changed[_place(len(changed), rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _byte(data: bytes, rng: np.random.Generator) -> bytes:
    at = _place(len(data), rng)
    return data[:at] + bytes([int(rng.integers(256))]) + data[at + 1 :]


def _length(data: bytes, rng: np.random.Generator) -> bytes:
    at, width = _place(len(data), rng), int(rng.choice([1, 2, 4, 8]))
    value = int(_LENGTHS[int(rng.integers(len(_LENGTHS)))]) % 256**width
    order = "little" if rng.random() < 0.5 else "big"
    return data[:at] + value.to_bytes(width, order) + data[at + width :]


def _digits(data: bytes, rng: np.random.Generator) -> bytes:
    """A number in text becomes another one."""
    places = [i for i, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    if not places:
        return _byte(data, rng)
    at = places[int(rng.integers(len(places)))]
    number = [b"-1", b"0", b"1e999", b"9" * 19, b"9" * 400, b"NaN", b"00"][int(rng.integers(7))]
    return data[:at] + number + data[at + 1 :]


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: _place(len(data), rng)]


def _delete(data: bytes, rng: np.random.Generator) -> bytes:
    at, count = _place(len(data), rng), int(rng.integers(1, 65))
    return data[:at] + data[at + count :]


def _insert(data: bytes, rng: np.random.Generator) -> bytes:
    at = _place(len(data), rng)
    return data[:at] + rng.bytes(int(rng.integers(1, 33))) + data[at:]


def _swap(data: bytes, rng: np.random.Generator) -> bytes:
    one, other = sorted((_place(len(data), rng), _place(len(data), rng)))
    size = min(int(rng.integers(1, 129)), other - one)
    if not size:
        return data
    return (
        data[:one]
        + data[other : other + size]
        + data[one + size : other]
        + data[one : one + size]
        + data[other + size :]
    )


def _repeat(data: bytes, rng: np.random.Generator) -> bytes:
    at, size = _place(len(data), rng), int(rng.integers(1, 65))
    return data[:at] + data[at : at + size] * int(rng.integers(2, 200)) + data[at:]


def _brackets(data: bytes, rng: np.random.Generator) -> bytes:
    """Lists in lists, as text and as a pickle has them."""
    at, piece = _place(len(data), rng), [b"[", b'{"a":', b"(", b"](", b"\x85q\x01h\x01"][int(rng.integers(5))]
    return data[:at] + piece * int(rng.choice([5, 300, 5_000])) + data[at:]


_MUTATIONS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    _flip,
    _flip,
    _byte,
    _length,
    _length,
    _digits,
    _cut,
    _delete,
    _insert,
    _swap,
    _repeat,
    _brackets,
)


def main() -> None:
    """Print one case, or a range of them, as ``python -m simulations.bench.fuzz FIRST [COUNT]``."""
    first, count = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    print(json.dumps(fuzz_files(count, first=first), indent=1))


if __name__ == "__main__":
    main()
