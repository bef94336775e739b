"""Files of trained nets: safetensors, with what scoring needs as JSON in the header. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from fedattack.errors import DataError
from fedattack.files import content_hash, load_tensors, write_tensors
from fedattack.reading import Unreadable, parsed_json

FORMAT = 1

Channels = Annotated[int, Field(ge=1, le=4)]
Side = Annotated[int, Field(ge=8, le=1024)]
Width = Annotated[int, Field(ge=1, le=1024)]
Name = Annotated[str, Field(max_length=200)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

T = TypeVar("T", bound="Described")


class Described(BaseModel):
    """What every such file says of itself: for images of which size, and how they are brought to the net's scale.

    `figures`: of its training, for reading only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: Channels
    size: Side
    mean: tuple[Finite, ...]
    std: tuple[Positive, ...]
    seed: int
    figures: dict[str, Any] = Field(default_factory=dict)

    def check_shape(self, shape: tuple[int, ...], what: str) -> None:
        """DataError, which begins with `what`, unless the file is of images of that (C, H, W)."""
        if shape != (self.channels, self.size, self.size):
            wanted = f"{self.channels} x {self.size} x {self.size}"
            raise DataError(
                f"{what} was trained on images of {wanted}; these are of {' x '.join(map(str, shape))}"
            )

    def scaled(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the net takes them."""
        mean, std = (torch.tensor(x, device=images.device).view(1, -1, 1, 1) for x in (self.mean, self.std))
        return (images.float().clamp(0, 1) - mean) / std


def save_net(path: Path, kind: str, tensors: Mapping[str, Tensor], document: Described) -> None:
    """Write a state dict whole or not at all (RunFailed)."""
    header = {"format": FORMAT, "kind": kind, **document.model_dump(mode="json")}
    write_tensors(path, tensors, {"fedattack": json.dumps(header, sort_keys=True, allow_nan=False)})


def load_net(path: str | Path, kind: str, document: type[T]) -> tuple[dict[str, Tensor], T, str]:
    """Tensors, what the file says of itself, and the SHA-256 of its tensors.

    DataError, in one sentence, where the file is missing, no safetensors, of another kind or format, says of itself
    what cannot be, or holds NaN or infinite values.
    """
    name = f"{kind} {str(path)!r}"
    try:
        tensors, described_as = load_tensors(path)
        header = parsed_json(described_as.get("fedattack", "null"))
    except Unreadable as error:
        what = error.reason if error.absent else f"not a readable safetensors file ({error.reason})"
        raise DataError(f"{name}: {what}") from None
    except ValueError as error:
        raise DataError(f"{name}: not a readable safetensors file ({_line(error)})") from None
    found = (header.pop("kind", None), header.pop("format", None)) if isinstance(header, dict) else None
    if found != (kind, FORMAT):
        told = "says nothing of itself" if found is None else f"says kind {found[0]!r}, format {found[1]!r}"
        raise DataError(f"{name}: the file {told}; accepted: {kind!r}, format {FORMAT}")
    try:
        described = document.model_validate(header)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its description"
        raise DataError(f"{name}: {where} is malformed ({_line(first['msg'])})") from None
    if not len(described.mean) == len(described.std) == described.channels:
        counts = f"{len(described.mean)} means, {len(described.std)} deviations"
        raise DataError(f"{name}: {counts} of {described.channels} channels")
    if not all(bool(one.isfinite().all()) for one in tensors.values() if one.is_floating_point()):
        raise DataError(f"{name}: holds NaN or infinite values")
    return tensors, described, content_hash(tensors)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> nn.Module:
    """Put tensors into a module built on the "meta" device, in evaluation mode, its parameters frozen.

    So a file can make nothing larger than itself. DataError if they do not fit.
    """
    own = {one: (tensor.shape, tensor.dtype) for one, tensor in module.state_dict().items()}
    if own != {one: (tensor.shape, tensor.dtype) for one, tensor in tensors.items()}:
        raise DataError(f"{name}: its tensors do not fit the net that it names")
    module.load_state_dict(dict(tensors), assign=True)
    return module.eval().requires_grad_(False)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, (N, C, H, W); a deviation is at least 0.01."""
    mean = images.double().mean(dim=(0, 2, 3))
    std = images.double().std(dim=(0, 2, 3), unbiased=False).clamp_min(0.01)
    return tuple(mean.tolist()), tuple(std.tolist())


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
