"""Trained generators on disk: safetensors, with what is needed to build the nets again in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedattack.config import GanConfig, ModelConfig
from fedattack.errors import BadRequest, DataError
from fedattack.files import load_tensors, write_tensors
from fedattack.generative.nets import Gan
from fedattack.models import build_model
from fedattack.reading import Unreadable

FORMAT = "fedattack generator 1"


class GanSettings(BaseModel):
    """What a saved generator says of itself: nothing of whom it was trained on, and no seed.

    `rounds`: of the federation that trained it; `privacy`: what its training guarantees, in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    gan: GanConfig = GanConfig()
    task: str = "wgan-gp"
    rounds: int | None = None
    privacy: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, S, S)."""
        channels, side, _ = self.model.resolved
        return channels, side, side

    @property
    def has_critic(self) -> bool:
        """Whether the critic was saved; where it stayed with the clients, the nets' critic is untrained."""
        return self.model.nets != "generator"


def save_gan(path: Path, weights: Mapping[str, Tensor], settings: GanSettings) -> None:
    """Write a state dict of the nets of ``settings.model``, whole or not at all (RunFailed)."""
    model = settings.model.model_copy(
        update={"weights": None}
    )  # where they came from is this machine's affair
    header = {
        "format": FORMAT,
        "image_shape": json.dumps(settings.image_shape),
        "settings": settings.model_copy(update={"model": model}).model_dump_json(),
    }
    write_tensors(path, weights, header)


def load_gan(path: str | Path) -> tuple[Gan, GanSettings]:
    """The nets, in evaluation mode on the CPU, and what the file says of them.

    Nothing in the file is executed. DataError, in one sentence, where it is missing, of another format or task, does
    not fit the nets it names, or holds NaN or infinite values.
    """
    path = Path(path)
    try:
        weights, header = load_tensors(path)
    except Unreadable as error:
        what = error.reason if error.absent else f"not a readable safetensors file ({error.reason})"
        raise DataError(f"generator {str(path)!r}: {what}") from None
    if header.get("format") != FORMAT:
        found = header.get("format", "none")
        raise DataError(f"generator {str(path)!r}: format {found!r}; accepted: {FORMAT!r}")
    try:
        settings = GanSettings.model_validate_json(header.get("settings", ""))
        shape = settings.image_shape
    except (ValidationError, AssertionError) as error:
        why = str(error).replace("\n", " ")
        raise DataError(f"generator {str(path)!r}: its settings are malformed ({why})") from None
    if settings.task != "wgan-gp" or not settings.model.name.startswith("wgan-gp"):
        what = f"task {settings.task!r}, model {settings.model.name!r}"
        raise DataError(f"generator {str(path)!r}: {what}; accepted: task 'wgan-gp' and its models")
    if header.get("image_shape") != json.dumps(shape):
        raise DataError(f"generator {str(path)!r}: says images of {header.get('image_shape')} and of {shape}")
    model = settings.model.model_copy(update={"weights": None, "bottleneck": None})
    try:
        with torch.device("meta"):  # a file may claim any width: nothing is allocated before the shapes agree
            wanted = {name: (t.shape, t.dtype) for name, t in build_model(model).state_dict().items()}
    except BadRequest as error:
        raise DataError(f"generator {str(path)!r}: {error}") from None
    if wanted != {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}:
        raise DataError(f"generator {str(path)!r}: its tensors do not fit {model.name!r} of {shape} images")
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise DataError(f"generator {str(path)!r}: holds NaN or infinite values")
    gan = build_model(model)
    assert isinstance(gan, Gan)
    gan.load_state_dict(weights)
    return gan.eval().requires_grad_(False), settings
