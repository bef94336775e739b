"""Files that say what they are: of which run and settings, which round or answer, and the checksum of the rest.

A file that was damaged, cut, put in another one's place, or comes from another run is refused by its name instead of
being read as if nothing were. Any JSON and safetensors reader reads them; the seal is one more entry.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedattack import reading
from fedattack.errors import DataError, shown
from fedattack.files import content_hash, load_tensors, write_bytes, write_tensors
from fedattack.reading import Unreadable, parsed_json

SEAL = "seal"
_RUN = "run.json"


@dataclass(frozen=True)
class Identity:
    """A run's own number, drawn when its folder was made, and the hash of the settings that decide its results."""

    run: str
    config: str

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any]) -> Identity:
        """That of a run folder, written there as ``run.json`` if it has none.

        Raises DataError where the file is damaged, or names other settings.
        """
        path = folder / _RUN
        own = hashlib.sha256(_canonical(settings)).hexdigest()[:32]
        if not path.exists():
            made = cls(secrets.token_hex(8), own)
            write_json(path, {"run": made.run, "config": made.config}, "run")
        found = read_json(path, "run")
        if found.get("config") != own:
            raise DataError(f"{path} belongs to another run: its settings were others")
        return cls(str(found.get("run")), own)


def seal(what: str, content: str, identity: Identity | None) -> dict[str, str]:
    """The entry that says what a file is; `content`: the hash of everything else in it."""
    of = {} if identity is None else {"run": identity.run, "config": identity.config}
    return {"what": what, **of, "hash": content}


def check_seal(path: Path, found: object, what: str, content: str, identity: Identity | None) -> None:
    """DataError, in one sentence with the file's path, where a seal is not of this content, place or run."""
    if not isinstance(found, Mapping):
        raise DataError(f"{path} has no seal: it is damaged, or was written by an earlier version")
    if found.get("hash") != content:
        raise DataError(f"{path} is damaged: its checksum does not match what it, and a file beside it, hold")
    if found.get("what") != what:
        raise DataError(
            f"{path} is in the place of another file: it is {shown(found.get('what'))}, not {what!r}"
        )
    if identity is not None and (found.get("run"), found.get("config")) != (identity.run, identity.config):
        raise DataError(f"{path} belongs to another run")


def write_json(
    path: Path,
    document: Mapping[str, Any],
    what: str,
    identity: Identity | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    private: bool = False,
) -> None:
    """Write a document of JSON's own types with its seal, whole or not at all (RunFailed).

    The seal is also that of the `tensors` in a file beside it; `private` as in :func:`~fedattack.files.write_bytes`.
    """
    sealed = {**document, SEAL: seal(what, _hash(document, tensors), identity)}
    write_bytes(path, json.dumps(sealed, indent=1).encode() + b"\n", private=private)


def read_json(
    path: Path,
    what: str,
    identity: Identity | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The document again; DataError where it is missing, damaged, of something else or of another run.

    Or where the `tensors` are not those that it was written for.
    """
    try:
        found = reading.read_json(path)
    except Unreadable as error:
        raise DataError(f"{path} is damaged: it is not readable JSON ({error.reason})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: it holds no JSON object")
    told = found.pop(SEAL, None)
    check_seal(path, told, what, _hash(found, tensors), identity)
    return found


def write_sealed(
    path: Path,
    tensors: Mapping[str, Tensor],
    what: str,
    identity: Identity | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors with their seal in the header, whole or not at all (RunFailed)."""
    told = dict(metadata or {})
    content = _of_tensors(tensors, told)
    write_tensors(path, tensors, told | {SEAL: json.dumps(seal(what, content, identity))})


def read_sealed(
    path: Path, what: str, identity: Identity | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata again, in memory of their own; DataError as :func:`read_json`."""
    try:
        held, told = load_tensors(path)
        found = parsed_json(told.pop(SEAL, "null"))
    except Unreadable as error:
        raise DataError(
            f"{path} is damaged: it is not a readable safetensors file ({error.reason})"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is damaged: its seal is no JSON ({error})") from None
    # Cloned: kernels may round differently where memory is not aligned as they like it.
    tensors = {name: tensor.clone() for name, tensor in held.items()}
    check_seal(path, found, what, _of_tensors(tensors, told), identity)
    return tensors, told


def _of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(content_hash(tensors).encode() + _canonical(metadata)).hexdigest()[:32]


def _hash(document: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> str:
    beside = "" if tensors is None else content_hash(tensors)
    return hashlib.sha256(_canonical(document) + beside.encode()).hexdigest()[:32]


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
