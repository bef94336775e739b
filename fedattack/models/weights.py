"""State dicts on disk: safetensors, or torch's own files of plain tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedattack.errors import DataError
from fedattack.files import load_tensors, load_torch
from fedattack.reading import Unreadable, open_file

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Under what checkpoints keep a state dict beside other things."""

_PREFIXES = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}
"""What wrappers put before every name."""


def read_state(path: str, setting: str, known: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Tensors by name of a file, and what was done to the names, in words.

    A dict of tensors, or one under "state_dict", "model", ...; prefixes that wrappers put before every name are taken
    off where the names of the model, `known`, have them not. Nothing is unpickled but tensors and plain containers.
    DataError, which names `setting`, where the file is missing or holds something else.
    """
    refusal = f"setting {setting!r} = {path!r}:"
    try:
        with open_file(path) as stream:
            start = stream.read(4)
    except Unreadable as error:
        raise DataError(f"{refusal} {error.reason}") from None
    is_torch = start[:2] == b"PK" or start[:1] == b"\x80"
    found = _torch_file(path, refusal) if is_torch else _safetensors(path, refusal)
    said = []
    for prefix, wrapper in _PREFIXES.items():
        if (
            found
            and all(n.startswith(prefix) for n in found)
            and not any(n.startswith(prefix) for n in known)
        ):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
            said.append(f"{path}: {prefix!r} is taken off the names ({wrapper})")
    return found, "; ".join(said)


def _safetensors(path: str, refusal: str) -> dict[str, Tensor]:
    try:
        return load_tensors(path)[0]
    except Unreadable as error:
        raise DataError(
            f"{refusal} not a readable safetensors file, nor one that torch.save wrote ({error.reason})"
        ) from None


def _torch_file(path: str, refusal: str) -> dict[str, Tensor]:
    accepted = (
        "accepted: what torch.save(model.state_dict(), ...) writes, alone or under 'state_dict' or 'model'"
    )
    try:
        held = load_torch(path)
    except Unreadable as error:
        raise DataError(f"{refusal} {error.reason}; {accepted}") from None
    for name in _WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
            break
    if not isinstance(held, Mapping) or not held or not all(isinstance(name, str) for name in held):
        raise DataError(f"{refusal} holds a {type(held).__name__}, no tensors by name; {accepted}")
    odd = [name for name, value in held.items() if not isinstance(value, Tensor)]
    if odd:
        raise DataError(
            f"{refusal} {odd[0]!r} in it is a {type(held[odd[0]]).__name__}, no tensor; {accepted}"
        )
    return {name: value.detach() for name, value in held.items()}
