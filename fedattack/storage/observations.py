"""Observations on disk: safetensors beside JSON, without the truth, so that they can be handed to somebody else.

Layout of a folder of observations::

    auxiliary-<hash>.safetensors      the public images, once
    candidates.safetensors            what a membership attack is asked about, where one sat in the run
    round-0001/weights-<hash>.safetensors   the model sent out, once per round (or per model, if clients got several)
    round-0001/global.safetensors           the global model after the round, where a membership attack sat in the run
    round-0001/client-00003.safetensors     the update as it came over the wire
    round-0001/client-00003.json            what was declared, with the seal of both; written last

Truths have the same names below a folder of their own. Nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from fedattack import sealed
from fedattack.config import CompressionConfig, DefenseConfig, GanConfig, ModelConfig, Section, TrainingConfig
from fedattack.errors import DataError, told
from fedattack.files import content_hash, load_tensors, private_folder, write_tensors
from fedattack.groundtruth import GroundTruth
from fedattack.observation import (
    EVERYONE,
    Auxiliary,
    Observation,
    Scenario,
    Update,
    client_name,
    observation_name,
)
from fedattack.reading import LARGEST_TEXT, Unreadable, read_bytes
from fedattack.registry import check_names_of_file
from fedattack.sealed import Identity
from fedattack.storage.plain import plain

Natural = Annotated[int, Field(ge=0, strict=True)]
Client = Annotated[int, Field(ge=EVERYONE, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]


class _Scenario(Section):
    model: ModelConfig
    training: TrainingConfig
    compression: CompressionConfig
    defense: DefenseConfig = DefenseConfig()
    gan: GanConfig = GanConfig()


class _Document(Section):
    format: Literal[2]
    seal: dict[str, str]
    round: Positive
    client: Client
    num_examples: Positive
    wire_bytes: Natural
    kind: Literal["gradient", "delta"]
    names: tuple[str, ...] = Field(min_length=1)
    shapes: tuple[tuple[Natural, ...], ...]
    weights: str = Field(pattern=r"^weights-[0-9a-f]{16}\.safetensors$")
    auxiliary: str | None = Field(None, pattern=r"^auxiliary-[0-9a-f]{16}\.safetensors$")
    auxiliary_source: str = ""
    scenario: _Scenario


class _TruthDocument(Section):
    format: Literal[2]
    seal: dict[str, str]
    round: Positive
    client: Client
    sample_ids: tuple[int, ...]


def save_observation(folder: Path | str, observation: Observation, identity: Identity | None = None) -> Path:
    """Store one observation, weights and auxiliary data only where they are not there yet; its JSON file's path.

    `identity`: the run it is of; one folder holds observations of one run.
    """
    folder = Path(folder)
    place = _place(folder, observation.round, observation.client)
    weights = _save_once(place.parent, "weights", observation.weights)
    auxiliary, public = None, observation.auxiliary
    if public is not None:
        tensors = {"images": public.images, "labels": public.labels, "groups": public.groups}
        auxiliary = _save_once(folder, "auxiliary", {n: t for n, t in tensors.items() if t is not None})
    update = observation.update
    sent = {"values": update.values}
    if update.indices is not None:
        sent["indices"] = update.indices
    sent |= {f"buffer.{name}": tensor for name, tensor in observation.buffers.items()}
    write_tensors(place.with_suffix(".safetensors"), sent)
    document = {
        "format": 2,
        "round": observation.round,
        "client": observation.client,
        "num_examples": observation.num_examples,
        "wire_bytes": observation.wire_bytes,
        "kind": update.kind,
        "names": update.names,
        "shapes": update.shapes,
        "weights": weights,
        "auxiliary": auxiliary,
        "auxiliary_source": public.source if public else "",
        "scenario": observation.scenario.record(),
    }
    what = observation_name(observation.round, observation.client)
    sealed.write_json(place.with_suffix(".json"), plain(document), what, identity, sent)
    return place.with_suffix(".json")


def observed_rounds(folder: Path | str) -> list[int]:
    """The rounds of which a folder holds finished observations, ascending; DataError where there are none."""
    found = {path.parent.name.removeprefix("round-") for path in Path(folder).glob("round-*/*.json")}
    if odd := sorted(name for name in found if not name.isdigit()):
        raise DataError(f"{folder}: 'round-{odd[0]}' is no round; expected round-0001, ...")
    if not found:
        raise DataError(f"no observation in {folder}: expected round-*/*.json")
    return sorted(map(int, found))


def load_observations(folder: Path | str, round: int | None = None) -> list[Observation]:
    """All observations of a folder, or of one round, by round and client, fully checked.

    Observations of one round share their weights, and all share the auxiliary data, in memory as on disk.

    Raises
    ------
    DataError
        Names the file and what is wrong with it; or there is no observation.
    """
    folder = Path(folder)
    shared: dict[Path, dict[str, Tensor]] = {}
    where = "round-*" if round is None else f"round-{round:04d}"
    found = [_load_observation(folder, path, shared) for path in sorted(folder.glob(f"{where}/*.json"))]
    _check_one_run(folder)
    if not found:
        raise DataError(f"no observation in {folder}: expected {where}/*.json")
    return sorted(found, key=lambda observation: (observation.round, observation.client))


def save_truth(folder: Path | str, truth: GroundTruth) -> Path:
    """Store the private batch behind one observation, in a folder of its own that its owner alone can enter."""
    place = _place(Path(folder), truth.round, truth.client)
    private_folder(Path(folder))
    private_folder(place.parent)
    tensors = {"images": truth.images, "labels": truth.labels}
    if truth.shown is not None:
        tensors["shown"] = truth.shown
    write_tensors(place.with_suffix(".safetensors"), tensors, private=True)
    document = {"format": 2, "round": truth.round, "client": truth.client, "sample_ids": truth.sample_ids}
    what = f"truth of {observation_name(truth.round, truth.client)}"
    sealed.write_json(place.with_suffix(".json"), plain(document), what, None, tensors, private=True)
    return place.with_suffix(".json")


def load_truths(folder: Path | str) -> list[GroundTruth]:
    """All truths of a folder, by round and client; DataError where one is malformed, or there is none."""
    truths = []
    for path in sorted(Path(folder).glob("round-*/*.json")):
        document = _parse(path, _TruthDocument)
        tensors = read_tensors(path.with_suffix(".safetensors"))
        what = f"truth of {observation_name(document.round, document.client)}"
        sealed.read_json(path, what, None, tensors)
        if _place(Path(folder), document.round, document.client).with_suffix(".json") != path:
            raise DataError(f"{path}: says it is round {document.round}, client {document.client}")
        images, labels = check_images(path, "images", tensors.get("images"), None), tensors.get("labels")
        if labels is None or labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise DataError(f"{path}: labels must be int64 of shape ({len(images)},)")
        if len(document.sample_ids) != len(images):
            raise DataError(f"{path}: {len(document.sample_ids)} sample ids for {len(images)} images")
        shown = tensors.get("shown")
        if shown is not None:
            check_images(path, "shown", shown, tuple(images.shape[1:]))
        who = document.round, document.client
        truths.append(GroundTruth(*who, images, labels, document.sample_ids, shown))
    if not truths:
        raise DataError(f"no truth in {folder}: expected round-*/*.json")
    return sorted(truths, key=lambda truth: (truth.round, truth.client))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; DataError where it is missing or malformed."""
    try:
        return load_tensors(path)[0]
    except Unreadable as error:
        raise DataError(f"{path} is not a readable safetensors file: {error.reason}") from None


def _load_observation(folder: Path, path: Path, shared: dict[Path, dict[str, Tensor]]) -> Observation:
    document = _parse(path, _Document)
    check_names_of_file(document.scenario.model_dump(mode="json"), f"observation {str(path)!r}")
    if _place(folder, document.round, document.client).with_suffix(".json") != path:
        raise DataError(f"{path}: says it is round {document.round}, client {document.client}")
    model = document.scenario.model
    if None in (model.classes, model.channels, model.image_size, model.activation):
        raise DataError(
            f"{path}: the scenario's model must state classes, channels, image_size and activation"
        )
    agreed = document.scenario
    scenario = Scenario(model, agreed.training, agreed.compression, agreed.defense, agreed.gan)
    weights = _read_once(path.parent / document.weights, shared)
    for name, tensor in weights.items():
        check_finite(path.parent / document.weights, name, tensor)
    tensors = read_tensors(path.with_suffix(".safetensors"))
    sealed.read_json(path, observation_name(document.round, document.client), None, tensors)
    update = _checked_update(path, document, tensors, weights)
    buffers = {
        name.removeprefix("buffer."): check_finite(path, name, tensor)
        for name, tensor in tensors.items()
        if name.startswith("buffer.")
    }
    auxiliary = None
    if document.auxiliary is not None:
        source = folder / document.auxiliary
        public = _read_once(source, shared)
        images = check_images(source, "images", public.get("images"), scenario.image_shape)
        for name in ("labels", "groups"):
            numbers = public.get(name)
            if numbers is not None and (numbers.dtype != torch.int64 or numbers.shape != (len(images),)):
                raise DataError(f"{source}: {name} must be int64 of shape ({len(images)},)")
        auxiliary = Auxiliary(images, public.get("labels"), document.auxiliary_source, public.get("groups"))
    return Observation(
        round=document.round,
        client=document.client,
        scenario=scenario,
        weights=weights,
        update=update,
        num_examples=document.num_examples,
        wire_bytes=document.wire_bytes,
        auxiliary=auxiliary,
        buffers=buffers,
    )


def _checked_update(
    path: Path, document: _Document, tensors: dict[str, Tensor], weights: dict[str, Tensor]
) -> Update:
    names, shapes = document.names, document.shapes
    if len(names) != len(shapes) or len(set(names)) != len(names):
        raise DataError(f"{path}: {len(names)} parameter names (repeated?) for {len(shapes)} shapes")
    for name, shape in zip(names, shapes, strict=True):
        if name not in weights or tuple(weights[name].shape) != shape:
            held = tuple(weights[name].shape) if name in weights else "nothing"
            raise DataError(f"{path}: parameter {name!r} has shape {shape}, but the weights hold {held}")
    values, indices = tensors.get("values"), tensors.get("indices")
    if values is None or values.dtype != torch.float32 or values.ndim != 1:
        raise DataError(f"{path}: 'values' must be float32 in one dimension")
    check_finite(path, "values", values)
    update = Update(names, shapes, indices, values, document.kind)
    if indices is None:
        if values.numel() != update.numel:
            raise DataError(f"{path}: {values.numel()} values for a dense update of {update.numel}")
    elif indices.dtype != torch.int64 or indices.shape != values.shape:
        raise DataError(f"{path}: 'indices' must be int64, one for each of {values.numel()} values")
    elif indices.numel() and (
        int(indices[0]) < 0 or int(indices[-1]) >= update.numel or bool((indices.diff() <= 0).any())
    ):
        raise DataError(f"{path}: 'indices' must rise strictly within [0, {update.numel})")
    return update


def check_images(path: Path, name: str, images: Tensor | None, shape: tuple[int, ...] | None) -> Tensor:
    """The images, float32 in [0, 1], of `shape` where that is given; DataError where they are not."""
    if images is None or images.dtype != torch.float32 or images.ndim != 4:
        raise DataError(f"{path}: {name!r} must be float32 of shape (N, C, H, W)")
    if shape is not None and tuple(images.shape[1:]) != shape:
        raise DataError(f"{path}: {name} of {tuple(images.shape[1:])}, but the model takes {shape}")
    check_finite(path, name, images)
    if images.numel() and not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise DataError(f"{path}: pixels lie outside [0, 1]")
    return images


def check_finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor; DataError where it holds NaN or infinite values."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise DataError(f"{path}: {name!r} holds NaN or infinite values")
    return tensor


def _check_one_run(folder: Path) -> None:
    """DataError where a folder's observations are of several runs, or one lacks its document."""
    for path in sorted(folder.glob("round-*/client-*.safetensors")):
        if not path.with_suffix(".json").is_file():
            raise DataError(
                f"{path} has no {path.stem}.json beside it: it was lost, or the run was killed while it wrote; start "
                "the run again, or delete what is left of it"
            )
    seen: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("round-*/*.json")):
        entry = _parse(path, _Document).seal
        seen.setdefault((entry.get("run", ""), entry.get("config", "")), path)
    if len(seen) > 1:
        first, other, *_ = seen.values()
        raise DataError(
            f"{other} belongs to another run than {first}; a folder holds observations of one run"
        )


def _parse(path: Path, kind: type[Any]) -> Any:
    try:
        return kind.model_validate_json(read_bytes(path, LARGEST_TEXT))
    except ValidationError as error:
        first = error.errors()[0]
        place = told(".".join(str(part) for part in first["loc"]), 200)
        raise DataError(f"{path}: {place + ': ' if place else ''}{first['msg']}") from None
    except Unreadable as error:
        raise DataError(f"{path} cannot be read: {error.reason}") from None


def _place(folder: Path, round_: int, client: int) -> Path:
    return folder / f"round-{round_:04d}" / client_name(client)


def _read_once(path: Path, shared: dict[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    if path not in shared:
        shared[path] = read_tensors(path)
        if content_hash(shared[path])[:16] != path.stem.rpartition("-")[2]:
            raise DataError(f"{path} is damaged: its content is not what its name says")
    return shared[path]


def _save_once(folder: Path, what: str, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors under the hash of their content, unless they are there; the file's name."""
    file = f"{what}-{content_hash(tensors)[:16]}.safetensors"
    if not (folder / file).exists():
        write_tensors(folder / file, tensors)
    return file


_KEY = re.compile(r"^[A-Za-z0-9_.:-]+$")


def safe_name(name: str) -> str:
    """`name` as part of a path; DataError where it could leave its folder."""
    if not _KEY.match(name) or name.startswith("."):
        raise DataError(f"{name!r} cannot name a file: letters, digits, '_', '-', '.' and ':' only")
    return name.replace(":", "_")
