"""A membership question on disk: candidates and global models beside the observations; the truth apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedattack.errors import DataError
from fedattack.files import private_folder, write_tensors
from fedattack.groundtruth import MembershipTruth
from fedattack.observation import Candidates
from fedattack.sealed import read_sealed, write_sealed
from fedattack.storage.observations import check_finite, check_images, read_tensors
from fedattack.storage.plain import number, read_json, write_json

CANDIDATES = "candidates.safetensors"
TRUTH = "membership.safetensors"


def save_candidates(folder: Path, candidates: Candidates) -> None:
    """Store the samples asked about, once, in a folder of observations."""
    if not (folder / CANDIDATES).exists():
        held = {n: t for n, t in vars(candidates).items() if t is not None}
        write_sealed(folder / CANDIDATES, held, "candidates")


def load_candidates(folder: Path) -> Candidates:
    """The samples asked about; DataError where there are none, or the file is malformed."""
    path = folder / CANDIDATES
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: these observations were saved without a membership attack in the run, and hold "
            "no candidates to ask about"
        )
    held, _ = read_sealed(path, "candidates")
    images = check_images(path, "images", held.get("images"), None)
    if "labels" not in held or not len(images):
        raise DataError(f"{path} holds no labelled images")
    for name in held.keys() & {"labels", "groups"}:
        if held[name].dtype != torch.int64 or held[name].shape != (len(images),):
            raise DataError(f"{path}: {name} must be int64 of shape ({len(images)},)")
    return Candidates(images, held["labels"], held.get("groups"))


def save_global_model(folder: Path, round: int, weights: Mapping[str, Tensor]) -> None:
    """Store the global model after a round."""
    write_sealed(
        folder / f"round-{round:04d}" / "global.safetensors", weights, f"global model of round {round}"
    )


def load_global_model(folder: Path, round: int) -> dict[str, Tensor] | None:
    """The global model after a round; None: it was not saved."""
    path = folder / f"round-{round:04d}" / "global.safetensors"
    if not path.is_file():
        return None
    held, _ = read_sealed(path, f"global model of round {round}")
    return {name: check_finite(path, name, tensor) for name, tensor in held.items()}


def save_membership_truth(folder: Path, truth: MembershipTruth) -> None:
    """Store who is behind the candidates, in a folder of its own that its owner alone can enter."""
    private_folder(folder)
    tensors: dict[str, NDArray[Any]] = {"ids": truth.ids, "owner": truth.owner, "labels": truth.labels}
    if truth.groups is not None:
        tensors["groups"] = truth.groups
    for target, arrays in truth.asked.items():
        tensors |= {f"asked.{target}.{name}": array for name, array in arrays.items()}
    held = {name: torch.from_numpy(array) for name, array in tensors.items()}
    write_tensors(folder / TRUTH, held, private=True)
    figures = ("accuracy", "chance_accuracy", "test_samples")
    document = {"format": 1} | {name: getattr(truth, name) for name in figures}
    write_json((folder / TRUTH).with_suffix(".json"), document, private=True)


def load_membership_truth(folder: Path) -> MembershipTruth:
    """Who is behind the candidates; DataError where the folder does not say, or a file is malformed."""
    path = folder / TRUTH
    if not path.is_file():
        raise DataError(f"{path} does not exist: no truth to score membership attacks against")
    held = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
    document = read_json(path.with_suffix(".json"))
    asked: dict[int, dict[str, NDArray[Any]]] = {}
    try:
        for name, array in held.items():
            if name.startswith("asked."):
                _, target, what = name.split(".")
                asked.setdefault(int(target), {})[what] = array
        accuracy, test_samples = document["accuracy"], int(document["test_samples"])
        accuracy, chance = None if accuracy is None else float(accuracy), number(document["chance_accuracy"])
        of_all = held["ids"], held["owner"], held["labels"], held.get("groups")
        truth = MembershipTruth(*of_all, asked, accuracy, chance, test_samples)
        for arrays in asked.values():
            if len({len(array) for array in arrays.values()}) != 1 or arrays["places"].max() >= len(
                truth.ids
            ):
                raise ValueError("places outside the list")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} and its .json do not hold the truth of a membership question: {error!r}"
        ) from None
    return truth
