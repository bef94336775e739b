"""Files of pretrained weights: where they come from, what they hold, and that nothing stands in for them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fedattack.errors import ConfigError, DataError
from fedattack.files import load_torch
from fedattack.reading import Unreadable, open_file

ENVIRONMENT = "FEDATTACK_WEIGHTS"
"""Environment variable: the folder of weight files, where no setting names one."""


@dataclass(frozen=True)
class Shelf:
    """Where a metric looks for its weight files, and whether it may fetch what is not there.

    Parameters
    ----------
    owner : str
        Setting below which `weights_dir` and `allow_download` are given: "metric.lpips".
    folder : str, optional
        None: the folder that the environment variable :data:`ENVIRONMENT` names.
    allow_download : bool
        A file that is missing is fetched once, and only if its hash is the one that its name announces.
    """

    owner: str
    folder: str | None
    allow_download: bool = False

    def find(self, file: str, url: Callable[[], str]) -> Path:
        """The file of that name; ConfigError where it is missing, DataError where it cannot be fetched from `url`."""
        found = self.folder or os.environ.get(ENVIRONMENT)
        if found is None and self.allow_download:
            found = os.path.join(torch.hub.get_dir(), "checkpoints")
        place = (
            f"setting '{self.owner}.weights_dir'" if self.folder else f"environment variable {ENVIRONMENT}"
        )
        fetch = f"; '{self.owner}.allow_download' = true fetches it"
        if found is None:
            raise ConfigError(
                f"weight file {file!r} is needed, and neither setting '{self.owner}.weights_dir' nor environment "
                f"variable {ENVIRONMENT} names a folder that holds it{fetch}"
            )
        path = Path(found).expanduser() / file
        if path.is_file():
            return path
        if not self.allow_download:
            missing = "" if path.parent.is_dir() else ", which is no folder"
            raise ConfigError(f"weight file {file!r} is not in {path.parent} ({place}){missing}{fetch}")
        return download(url(), path)


def download(url: str, path: Path) -> Path:
    """Fetch a file whose name ends in the first digits of its SHA-256, as the hub names them, whole or not at all.

    DataError where it cannot be reached, or holds something else.
    """
    digits = re.search(r"-([0-9a-f]{8,})\.", path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digits[1] if digits else None, progress=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"weight file {path.name!r} could not be fetched into {path.parent}: {error}"
        ) from None
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; read once as long as the file stays the same."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def as_named(path: Path) -> bool:
    """Whether the file's SHA-256 begins with the digits in its name, as that of every file of torch's hub does."""
    digits = re.search(r"-([0-9a-f]{8,})\.", path.name)
    return digits is not None and sha256(path).startswith(digits[1])


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a file that `torch.save` wrote, nothing else unpickled; DataError where it is not one."""
    try:
        state = load_torch(path)
    except Unreadable as error:
        raise DataError(f"weight file {path}: {error.reason}") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DataError(f"weight file {path} holds no state dict: tensors by name")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(f"weight file {path}: {name!r} holds NaN or infinite values")
    return state


def package_folder(package: str, distribution: str, owner: str) -> Path:
    """Folder of an optional package, not imported; ConfigError that says how to install it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{owner} needs the package {distribution!r}, which is not installed: "
            "`pip install 'fedattack[perceptual]'`"
        )
    return Path(spec.origin).parent
