"""Files of what was learned: weights with the facts that they were trained under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedattack.compression import kept_share
from fedattack.errors import DataError, NotApplicable
from fedattack.files import load_tensors, write_tensors
from fedattack.observation import Scenario
from fedattack.reading import Unreadable, parsed_json, said
from fedattack.registry import check_names_of_file

FORMAT = 1


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def described(
    scenario: Scenario, weights: Mapping[str, Tensor], batch_size: int, round: int
) -> dict[str, Any]:
    """What a learned file was made for: the public facts that its signals depend on."""
    model = scenario.model.model_dump(mode="json", exclude={"weights"})
    training = scenario.training.model_dump(mode="json", exclude={"batch_size", "server_learning_rate"})
    if scenario.training.protocol == "fedsgd":
        # One gradient does not depend on how it would be applied.
        training = {"protocol": "fedsgd"}
    compression = scenario.compression.model_dump(mode="json", exclude={"warmup_rounds"})
    compression["share"] = kept_share(scenario.compression, round)
    return {
        "model": model,
        "training": training,
        "compression": compression,
        "batch_size": batch_size,
        "weights": fingerprint(weights),
    }


def save_learned(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, whole or not at all, with JSON metadata (which must say its "kind").

    The folder is made where it is missing. RunFailed if the file cannot be written.
    """
    write_tensors(
        Path(path), tensors, {"fedattack": json.dumps({"format": FORMAT, **metadata}, sort_keys=True)}
    )


def load_learned(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata that :func:`save_learned` wrote.

    DataError if the file is missing, no safetensors, holds something else than `kind`, or NaN or infinite values.
    """
    try:
        tensors, header = load_tensors(path)
        metadata = parsed_json(header.get("fedattack", "null"))
    except Unreadable as error:
        if error.absent:
            raise DataError(f"no such file: {str(path)!r}") from None
        raise DataError(f"{str(path)!r} is not a readable safetensors file ({error.reason})") from None
    except ValueError as error:
        raise DataError(f"{str(path)!r} describes itself by what is no JSON ({said(error)})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or metadata.get("kind") != kind:
        found = metadata.get("kind", "nothing known") if isinstance(metadata, dict) else "nothing known"
        raise DataError(f"{str(path)!r} should hold a {kind} of format {FORMAT}; it holds {found!r}")
    check_names_of_file(metadata, f"file {str(path)!r}")
    del metadata["format"]
    if not all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
        raise DataError(f"{str(path)!r} holds NaN or infinite values")
    return tensors, metadata


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """Put tensors into a module that was built on the "meta" device, in evaluation mode, its parameters frozen.

    So a file can make nothing larger than itself. DataError if they do not fit.
    """
    own = module.state_dict()
    fits = own.keys() == tensors.keys() and all(
        own[name].shape == tensors[name].shape and own[name].dtype == tensors[name].dtype for name in own
    )
    if not fits:
        raise DataError(f"{str(path)!r}: its tensors do not fit the architecture that it names")
    module.load_state_dict(dict(tensors), assign=True)
    return module.eval().requires_grad_(False)


def refuse_other(
    made_for: Mapping[str, Any],
    wanted: Mapping[str, Any],
    kind: str,
    path: str = "",
    round_free: bool = False,
) -> None:
    """NotApplicable, naming the first few differences, for a learned file that was made for something else.

    `made_for` and `wanted` are from :func:`described`; `round_free` leaves out the share that the round implies.
    """
    old, new = _flat(made_for), _flat(wanted)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if round_free:
        keys = [key for key in keys if key != "compression.share"]
    if not keys:
        return
    names = [
        f"other broadcast weights (fingerprint {str(old.get(key))[:12]}, now {str(new.get(key))[:12]})"
        if key == "weights"
        else f"{key} = {old.get(key)!r}, now {new.get(key)!r}"
        for key in keys[:4]
    ]
    name = f"{kind} {path!r}" if path else f"this {kind}"
    raise NotApplicable(
        f"{name} was trained for something else: {'; '.join(names)}. Train one for this scenario."
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
