"""Files that are whole or absent, private ones that their owner alone can read, and tensors read from files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedattack.errors import DataError, RunFailed
from fedattack.reading import (
    FREE,
    MIB,
    RATIO,
    Unreadable,
    open_file,
    open_zip,
    require_plain_pickle,
    require_regular,
    said,
    zip_member,
)

_LARGEST_HEADER = 64 * MIB
_MOST_ENTRIES = 5_000_000
_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the allowed file size",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
}


def write_bytes(path: Path, *parts: bytes | memoryview, private: bool = False) -> None:
    """Write a file whole or not at all (RunFailed): to a temporary neighbour first, then renamed.

    `private`: its owner alone can read it, whatever the umask says, where the file system knows owners.
    """
    with whole_file(path, sum(memoryview(part).nbytes for part in parts), private) as stream:
        for part in parts:
            stream.write(part)


@contextlib.contextmanager
def whole_file(path: Path, size: int, private: bool = False) -> Iterator[IO[bytes]]:
    """Stream into a file that is there when the block is over, or not at all (RunFailed); `size`: in bytes, about."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(
                missing_ok=True
            )  # one that a killed process of this number left, with its rights
            opener = _privately if private else None
            with open(temporary, "xb", opener=opener) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise cannot_write(path, error, size) from error


def _privately(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def private_folder(folder: Path) -> None:
    """Make a folder that its owner alone can enter (RunFailed), with all that lies in it if it was there and open.

    Where the file system knows no rights, they stay as they are.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(folder.stat().st_mode) == 0o700:
            return
    except OSError as error:
        raise cannot_write(folder, error, 0) from error
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            with contextlib.suppress(OSError):
                path.chmod(0o700 if path.is_dir() else 0o600)


def cannot_write(path: Path, error: OSError, size: int) -> RunFailed:
    """The error for a file that could not be written, in one sentence with what to do."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return RunFailed(
        f"cannot write {path} ({size:,} bytes): {reason}. What was finished before is kept: make room, or make the "
        "folder writable, and start the same command again"
    )


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    private: bool = False,
) -> None:
    """Write tensors as safetensors, `metadata` in the header, whole or not at all (RunFailed)."""
    write_bytes(path, save(portable(tensors), metadata), private=private)


def load_tensors(
    path: Path | str, names: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, or those of the `names` that it has, and the texts of its header.

    Raises Unreadable, whatever is wrong with the file; what it declares is compared with its size first.
    """
    size = require_regular(path)
    try:
        with open_file(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            most = f"at most {_LARGEST_HEADER:,} are accepted"
            raise Unreadable(path, f"no safetensors: its header claims {length:,} of {size:,} bytes; {most}")
        with safe_open(path, framework="pt") as file:
            held = [name for name in file.keys() if names is None or name in names]  # noqa: SIM118 (no mapping)
            found = {name: file.get_tensor(name) for name in held}
            for tensor in found.values():
                tensor.reshape(-1)[:1].isfinite()  # raises for the types that nothing can be done with
            return found, file.metadata() or {}
    except DataError:
        raise
    except Exception as error:  # a damaged header raises nearly anything
        raise Unreadable(path, f"no safetensors ({said(error)})") from None


def load_torch(path: Path | str) -> Any:
    """What a file of `torch.save` holds: tensors in dicts, lists and tuples; nothing else is unpickled.

    Raises Unreadable, whatever is wrong with it, also where its tensors claim more than it can hold.
    """
    size = require_regular(path)
    try:
        with open_file(path) as stream:
            packed = stream.read(4) == b"PK\x03\x04"
        if packed:
            with open_zip(Path(path), 2**50) as archive:
                for entry in archive.infolist():
                    if entry.filename.endswith("data.pkl"):
                        require_plain_pickle(zip_member(archive, entry, _LARGEST_HEADER))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except DataError as error:
        reason = error.reason if isinstance(error, Unreadable) else str(error)
        raise Unreadable(path, f"it is no readable state dict ({reason})") from None
    except Exception:  # a damaged file raises nearly anything
        # torch's own text proposes to unpickle the file whole, which nobody should.
        raise Unreadable(path, "it is no readable state dict, or holds more than tensors") from None
    try:
        claimed = _claimed(found)
    except DataError as error:
        raise Unreadable(path, str(error)) from None
    if claimed > max(FREE, RATIO * size):
        raise Unreadable(path, f"its tensors claim {claimed:,} bytes, of {size:,}")
    return found


def _claimed(document: Any) -> int:
    """Bytes of the tensors in dicts, lists and tuples, each counted where it is met."""
    total, left = 0, [document]
    for _ in range(_MOST_ENTRIES):
        if not left:
            return total
        one = left.pop()
        if isinstance(one, Tensor):
            if one.layout is not torch.strided or one.device.type != "cpu" or one.is_quantized:
                raise DataError(
                    "it holds a sparse, quantised or empty tensor; ordinary ones of the CPU are accepted"
                )
            total += one.numel() * one.element_size()
        elif isinstance(one, Mapping):
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)
    raise DataError(f"it holds more than {_MOST_ENTRIES:,} values")


def portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and sharing no memory (safetensors refuses shared tensors)."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(portable(tensors).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
