"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save
from torch import Tensor

from fedattack.errors import RunFailed

_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the allowed file size",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
}


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file whole or not at all (RunFailed): to a temporary neighbour first, then renamed."""
    with whole_file(path, sum(memoryview(part).nbytes for part in parts)) as stream:
        for part in parts:
            stream.write(part)


@contextlib.contextmanager
def whole_file(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Stream into a file that is there when the block is over, or not at all (RunFailed); `size`: in bytes, about."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
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


def cannot_write(path: Path, error: OSError, size: int) -> RunFailed:
    """The error for a file that could not be written, in one sentence with what to do."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return RunFailed(
        f"cannot write {path} ({size:,} bytes): {reason}. What was finished before is kept: make room, or make the "
        "folder writable, and start the same command again"
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, `metadata` in the header, whole or not at all (RunFailed)."""
    write_bytes(path, save(portable(tensors), metadata))


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
