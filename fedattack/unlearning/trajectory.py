"""What a mechanism keeps for itself of a training without some samples: on disk, one version a set of samples."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedattack.errors import DataError, NotApplicable, RunFailed
from fedattack.files import load_tensors, write_tensors
from fedattack.observation import Scenario
from fedattack.unlearning.central import Central, Positions
from fedattack.unlearning.history import History, Weights

log = logging.getLogger("fedattack.unlearning")

_BYTES = 2**26
"""Of steps that are held in memory at once, but for one."""
_FAR = 0.1
"""Share of the way from which on two trainings that should be one are told apart."""


def state_file(folder: Path, kind: str, gone: Collection[int], number: int | None = None) -> Path:
    """Where state of this `kind` lies that holds once the positions `gone` are forgotten.

    Named after the positions, so that several deletions from the same training, one beside the other, each find what
    they came from.
    """
    digest = hashlib.blake2b(json.dumps(sorted(gone)).encode(), digest_size=6).hexdigest()
    return folder / f"{kind}-{digest}{'' if number is None else f'-{number:05d}'}.safetensors"


def kept_tensors(path: Path) -> dict[str, Tensor]:
    """A file of :func:`state_file`; RunFailed where it was not kept."""
    if not path.is_file():
        raise RunFailed(
            f"cannot forget: {path} was not kept; the mechanism's own state is written after training"
        )
    return {name: tensor.clone() for name, tensor in load_tensors(path)[0].items()}


def remaining(central: Central, gone: Collection[int]) -> Positions:
    """Positions that are left, ascending; DataError where none is."""
    left = central.retained(gone)
    if not len(left):
        raise DataError(f"all {len(central)} samples are to be forgotten: none is left to learn from")
    return left


@dataclass(frozen=True)
class Part:
    """Successive steps of one round of a training."""

    number: int  # from 1
    begins: bool  # with the first step of its round
    batches: list[Positions]  # some may be empty
    weights: Tensor  # (s + 1, P): before each step, and after the last
    gradients: Tensor  # (s, P): of the mean loss over the batch, without weight decay
    state: Weights  # parameters and buffers, of the step that is walked now


def walked(
    central: Central, weights: Weights, gone: Collection[int] = (), first_round: int = 1
) -> Iterator[Part]:
    """The training without the positions `gone` (:meth:`Central.walk`), in parts that memory can hold."""
    training = central.scenario.training
    decay = training.weight_decay if training.protocol == "fedavg" else 0.0
    most = max(1, _BYTES // (16 * len(central.flat(weights))))
    number, begins = 0, True
    befores, slopes, batches = list[Tensor](), list[Tensor](), list[Positions]()
    for step in central.walk(weights, gone, first_round):
        if befores and (step.index == 0 or len(befores) == most):
            number += 1
            steps = torch.stack([*befores, step.before])
            yield Part(number, begins, batches, steps, torch.stack(slopes), step.state)
            befores, slopes, batches = [], [], []
        if not befores:
            begins = step.index == 0
        befores.append(step.before)
        batches.append(step.batch)
        slopes.append(step.gradient - decay * step.before if len(step.batch) else step.gradient)


def ended(central: Central, last: Part, base: Weights) -> Weights:
    """The model after the last part of :func:`walked`, in the types of `base`."""
    buffers = {name: last.state[name].to(base[name].dtype) for name, _ in central.model.named_buffers()}
    return central.weights(last.weights[-1], {**base, **buffers})


def refuse_defended(name: str, scenario: Scenario) -> None:
    """Refuse (NotApplicable) a training whose steps are not the gradients of its batches."""
    if scenario.defense.names:
        raise NotApplicable(
            f"setting 'defense.names' = {', '.join(scenario.defense.names)!r}: mechanism {name!r} follows the steps "
            "of SGD, which a defence changes; use none"
        )


def recorded(
    central: Central,
    history: History,
    kind: str,
    gone: Collection[int],
    rows: Callable[[Part], dict[str, Tensor]],
) -> Weights:
    """Walk the training without the positions `gone`, keep `rows` of each part, and give where it ends.

    That is what the holder releases: the model whose steps are kept. Rounding grows from step to step, so that it may
    be another than the federation's, which is said. RunFailed where the disk is too small.
    """
    start, steps = history.checkpoint(0), central.rounds * central.scenario.training.local_steps
    for one in walked(central, start, gone):
        size = saved(history.folder, kind, gone, one.number, one.batches, **rows(one))
        free, wanted = shutil.disk_usage(history.folder).free, size * (steps / len(one.batches) - 1)
        if one.number == 1 and wanted > free:
            raise RunFailed(
                f"{kind} keeps {steps:,} steps, for which {history.folder} lacks {(wanted - free) / 1e9:,.1f} GB; "
                "use fewer rounds or local steps, a smaller model, or another mechanism"
            )
    end, trained = one.weights[-1], central.flat(history.weights)
    moved, apart = float((end - central.flat(start)).norm()), float((end - trained).norm())
    if apart > _FAR * moved:
        log.warning(
            "%s follows the holder's own steps of SGD, which end %.2g from the model of the federation (it moved by "
            "%.2g) and are released in its place: rounding grows at this learning rate, or federation.strategy is "
            "not 'fedavg'",
            kind,
            apart,
            moved,
        )
    return ended(central, one, history.weights)


def saved(
    folder: Path, kind: str, gone: Collection[int], number: int, batches: list[Positions], **rows: Tensor
) -> int:
    """Write tensors of a part's steps, and their batches; the file's size in bytes."""
    path = state_file(folder, kind, gone, number)
    flat = np.concatenate([*batches, np.zeros(0, np.int64)]).astype(np.int64)
    sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.int64)
    write_tensors(path, {**rows, "positions": torch.from_numpy(flat), "sizes": sizes})
    return path.stat().st_size


def parts(
    folder: Path, kind: str, gone: Collection[int]
) -> Iterator[tuple[int, list[Positions], dict[str, Tensor]]]:
    """What :func:`saved` wrote: number, batches and tensors, one part at a time."""
    pattern = state_file(folder, kind, gone).stem
    paths = sorted(folder.glob(f"{pattern}-*.safetensors"))
    if not paths:
        kept_tensors(state_file(folder, kind, gone, 1))
    for path in paths:
        tensors = kept_tensors(path)
        flat, sizes = tensors.pop("positions").numpy(), tensors.pop("sizes").tolist()
        yield int(path.stem.split("-")[-1]), np.split(flat, np.cumsum(sizes)[:-1]), tensors
