"""The denoiser of HCGLA: a DnCNN that cleans intermediate reconstructions between stretches of matching.

It is trained on pairs of (intermediate reconstruction, truth) of auxiliary images that went through the scenario's
client and compressor, never on victims. Unlike the released code it works on floats throughout: that one rounds
reconstructions to bytes, where pixels outside [0, 1] wrap around and become the "noise" to be learned.

Yang, Ge, Xiang, Li, "Using Highly Compressed Gradients in Federated Learning for Data Reconstruction
Attacks", IEEE TIFS 2023. Zhang et al., "Beyond a Gaussian Denoiser", IEEE TIP 2017.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.base import Progress, no_progress, share_of
from adversaries.inversion.evidence import client
from adversaries.inversion.evidence.client import ImitatedClient
from adversaries.inversion.evidence.one_gradient import as_gradient
from adversaries.inversion.learning import files
from adversaries.inversion.learning import train as train_module
from adversaries.inversion.matching.match import Matching, match
from fedattack.errors import ConfigError, DataError, unknown_name
from fedattack.metrics.pixels import psnr
from fedattack.models.decoders.denoisers import DENOISERS, build_denoiser
from fedattack.observation import Auxiliary, Scenario
from fedattack.rng import numpy_rng, torch_rng

KIND = "denoiser"
PAIRS = "denoiser-pairs"
BATCH = 16
STEPS = 600
"""Training steps that the default number of epochs comes to."""

TENSORS = ("noisy", "clean", "groups", "stage", "mean")
"""Of a file of pairs."""

DenoiserStart = Literal["mean", "grey", "random"]


@dataclass(frozen=True)
class Denoiser:
    """A trained denoiser: call it with images. `module` predicts the noise; `metadata`: training, seed, figures."""

    module: nn.Module
    metadata: dict[str, Any]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) minus their predicted noise, on the images' device; neither clamped nor rounded.

        DataError if it was trained for another number of channels.
        """
        if images.shape[1] != self.metadata["channels"]:
            raise DataError(
                f"the denoiser was trained for {self.metadata['channels']} channels; the images have "
                f"{images.shape[1]}"
            )
        module = self.module.to(images.device)
        return torch.cat([part - module(part) for part in images.split(256)])


@dataclass(frozen=True)
class Pairs:
    """Intermediate reconstructions and what they should have been.

    Attributes
    ----------
    noisy, clean : Tensor
        float32 (N, C, H, W); `noisy` is not clamped.
    groups, stage : Tensor
        int64 (N,): whose image it is, and after how many stretches of matching.
    mean : Tensor
        float32 (C, H, W): mean of all auxiliary images.
    """

    noisy: Tensor
    clean: Tensor
    groups: Tensor
    stage: Tensor
    mean: Tensor
    metadata: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        files.save_learned(path, {name: getattr(self, name) for name in TENSORS}, self.metadata)

    def __getitem__(self, rows: Tensor) -> Pairs:
        chosen: dict[str, Any] = {name: getattr(self, name)[rows] for name in TENSORS[:-1]}
        return dataclasses.replace(self, **chosen)


def load_pairs(path: str | Path) -> Pairs:
    """Read what :func:`collect_pairs` wrote; DataError if the file is missing or malformed."""
    tensors, metadata = files.load_learned(path, PAIRS)
    if set(tensors) != set(TENSORS):
        raise DataError(f"{str(path)!r}: holds {sorted(tensors)} instead of {sorted(TENSORS)}")
    noisy, clean, groups, stage, mean = (tensors[name] for name in TENSORS)
    count = len(noisy)
    fits = noisy.ndim == 4 and clean.shape == noisy.shape and mean.shape == noisy.shape[1:] and count > 0
    if not fits or groups.shape != (count,) or stage.shape != (count,):
        raise DataError(f"{str(path)!r}: its tensors do not belong together")
    return Pairs(noisy.float(), clean.float(), groups.long(), stage.long(), mean.float(), metadata)


def collect_pairs(
    scenario: Scenario,
    weights: Mapping[str, Tensor],
    auxiliary: Auxiliary,
    count: int,
    iterations: int,
    out: str | Path | None,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    batch_size: int | None = None,
    stretches: int = 1,
    start: DenoiserStart = "mean",
    denoiser: Denoiser | None = None,
    settings: Matching | None = None,
    together: int = 16,
) -> Pairs:
    """Reconstruct auxiliary images part of the way, to learn what is wrong with them then.

    Labels are drawn at random and taken for known: what the attack infers of them is right in the settings in
    which a denoiser is of use.

    Parameters
    ----------
    count : int
        Images to reconstruct, a seeded draw; DataError if there are fewer.
    iterations : int
        Of matching before each snapshot.
    out : str, Path or None
        File to write; None: keep them in memory.
    batch_size : int, optional
        Images per client; None: the scenario's.
    stretches : int
        Snapshots per image: the optimiser starts afresh from each, as it does in the attack.
    start : {"mean", "grey", "random"}
        "mean" leaves the image itself out of the auxiliary mean.
    denoiser : Denoiser, optional
        Applied between stretches, so that a second denoiser sees what the loop will show it.
    settings : Matching, optional
        How to match; its `iterations` are replaced.
    together : int
        Clients in one batched optimisation.
    """
    train_module.check_shapes(scenario, auxiliary)
    size = client.batch_size_of(scenario, batch_size)
    clients = count // size
    if not clients or count > len(auxiliary):
        raise DataError(
            f"setting 'count' = {count}: must be at least one batch of {size} and at most the {len(auxiliary)} "
            "auxiliary images"
        )
    rng = numpy_rng(seed, "denoiser.pairs")
    chosen = torch.from_numpy(rng.permutation(len(auxiliary))[: clients * size]).reshape(clients, size)
    groups = auxiliary.groups if auxiliary.groups is not None else torch.arange(len(auxiliary))
    total = auxiliary.images.sum(0)
    imitated = ImitatedClient(scenario, weights, seed)
    matching = dataclasses.replace(settings or Matching(), iterations=iterations, transform_every=0)
    noisy: list[Tensor] = []
    for first in range(0, clients, together):
        part = chosen[first : first + together]
        clean = auxiliary.images[part]
        if start == "mean":
            begin = (total - clean) / max(1, len(auxiliary) - 1)
        elif start == "grey":
            begin = torch.full_like(clean, 0.5)
        else:
            begin = torch.randn(clean.shape, generator=torch_rng(seed, "denoiser.start", first))
        labels = torch.stack([client.draw_labels(size, imitated.head.classes, rng) for _ in part])
        told = share_of(progress, first / clients, min(1.0, (first + together) / clients))
        seen = [imitated.observe(*one, first + v) for v, one in enumerate(zip(clean, labels, strict=True))]
        seen = [dataclasses.replace(one, update=as_gradient(one)) for one in seen]
        shots: list[Tensor] = []
        for stretch in range(stretches):
            if stretch and denoiser is not None:
                begin = denoiser(begin.flatten(0, 1)).reshape(begin.shape)
            now = share_of(told, stretch / stretches, (stretch + 1) / stretches)
            found = match(seen, labels, begin[None], matching, torch.device(device), now)
            begin = torch.stack([one.images for one in found])
            shots.append(begin)
        noisy.append(torch.stack(shots))
    stages = torch.cat(noisy, 1).flatten(1, 2)
    order = chosen.flatten()
    metadata = {
        "kind": PAIRS,
        "made_for": files.described(scenario, weights, size, 1),
        "iterations": iterations,
        "start": start,
        "stretches": stretches,
        "denoised_between": denoiser is not None,
        "matching": dataclasses.asdict(matching),
        "auxiliary": {"source": auxiliary.source, "images": len(auxiliary)},
        "grouped_by": "people" if auxiliary.groups is not None else "images",
        "seed": seed,
    }
    pairs = Pairs(
        noisy=stages.flatten(0, 1).contiguous(),
        clean=auxiliary.images[order].repeat(stretches, 1, 1, 1),
        groups=groups[order].repeat(stretches),
        stage=torch.arange(1, stretches + 1).repeat_interleave(len(order)),
        mean=total / len(auxiliary),
        metadata=metadata,
    )
    if out is not None:
        pairs.save(out)
    return pairs


def train_denoiser(
    pairs: Pairs | str | Path,
    out: str | Path | None,
    seed: int,
    architecture: str = "dncnn",
    depth: int = 6,
    width: int = 32,
    epochs: int | None = None,
    learning_rate: float = 1e-3,
    held_out: float = 0.2,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> tuple[Denoiser, dict[str, Any]]:
    """Train a denoiser on pairs.

    Returns it and, JSON-able, "psnr" in dB on held-out pairs before and after ("noisy", "denoised"), counts,
    seconds.

    Parameters
    ----------
    out : str, Path or None
        File to write (safetensors); None: keep it in memory.
    architecture : str
        A name of :data:`fedattack.models.decoders.denoisers.DENOISERS`.
    depth, width : int
        Layers and channels; published: 17 and 64.
    epochs : int, optional
        None: as many as 600 steps of 16 pairs.
    held_out : float
        Share of people kept for the figures.
    """
    began = time.monotonic()
    if architecture not in DENOISERS:
        raise unknown_name("denoiser", architecture, DENOISERS.names())
    held = load_pairs(pairs) if isinstance(pairs, str | Path) else pairs
    seen, unseen = _split(held, held_out, seed)
    train, test = held[seen], held[unseen]
    channels = held.noisy.shape[1]
    module = train_module.initialised(
        lambda: build_denoiser(architecture, channels, depth, width), seed, "denoiser.initialise"
    )
    module = module.to(device).train()
    noisy, clean = train.noisy.to(device), train.clean.to(device)

    def loss(chosen: Tensor) -> Tensor:
        # Half the squared error per image, as published.
        error = F.mse_loss(module(noisy[chosen]), noisy[chosen] - clean[chosen], reduction="sum")
        return error / (2 * len(chosen))

    per_epoch = max(1, len(noisy) // BATCH)
    count = max(1, -(-STEPS // per_epoch)) if epochs is None else epochs
    if count < 1:
        raise ConfigError(f"setting 'epochs' = {count}: must be at least 1")
    stream = torch_rng(seed, "denoiser.batches")
    train_module.descend(
        list(module.parameters()), loss, len(noisy), count, learning_rate, stream, progress, BATCH
    )
    module = module.cpu().eval().requires_grad_(False)
    metadata: dict[str, Any] = {
        "kind": KIND,
        "architecture": architecture,
        "channels": channels,
        "depth": depth,
        "width": width,
        "seed": seed,
        "held_out": held_out,
        "settings": {"epochs": count, "learning_rate": learning_rate},
        "pairs": held.metadata,
    }
    denoiser = Denoiser(module, metadata)
    figures = _score(denoiser, test) | {
        "trained_on": len(train.noisy),
        "held_out_by": held.metadata.get("grouped_by", "images"),
    }
    metadata["figures"] = figures
    if out is not None:
        files.save_learned(out, module.state_dict(), metadata)
    before, after = figures["psnr"]["noisy"], figures["psnr"]["denoised"]
    progress(1.0, f"denoiser: {before:.2f} -> {after:.2f} dB on held-out pairs")
    return denoiser, figures | {"seconds": time.monotonic() - began}


def load_denoiser(path: str | Path) -> Denoiser:
    """Read a denoiser; DataError if the file is missing or malformed."""
    tensors, metadata = files.load_learned(path, KIND)
    try:
        name, channels, depth, width = (metadata[k] for k in ("architecture", "channels", "depth", "width"))
        # A file may name what is registered, not what is to be imported.
        if name not in DENOISERS:
            raise DataError(
                f"{str(path)!r} names the architecture {name!r}; known: {', '.join(DENOISERS.names())}"
            )
        if not 2 <= depth <= 10_000:
            raise ValueError(f"depth {depth}")
        with torch.device("meta"):
            module = build_denoiser(name, channels, depth, width)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{str(path)!r}: its description of the denoiser is malformed ({error!r})") from None
    return Denoiser(files.fill(module, tensors, path), metadata)


def test_denoiser(
    path: str | Path,
    pairs: Pairs | str | Path,
    held_out_only: bool = True,  # noqa: PT028 (not a pytest function, whatever its name)
) -> dict[str, Any]:
    """Score a denoiser's file on pairs; `held_out_only` where `pairs` are those that it was trained on.

    Returns "psnr": mean dB "noisy" and "denoised"; "improved": share of pairs that became better; "pairs".
    """
    denoiser = load_denoiser(path)
    held = load_pairs(pairs) if isinstance(pairs, str | Path) else pairs
    if held_out_only:
        held = held[_unseen(denoiser, held)]
    return _score(denoiser, held)


test_denoiser.__test__ = False  # type: ignore[attr-defined]


def _split(pairs: Pairs, share: float, seed: int) -> tuple[Tensor, Tensor]:
    return train_module.hold_out(Auxiliary(pairs.clean, groups=pairs.groups), share, seed)


def _unseen(denoiser: Denoiser, pairs: Pairs) -> Tensor:
    """Rows of the pairs that the training left out."""
    if pairs.metadata != denoiser.metadata["pairs"]:
        raise DataError(
            "these are not the pairs that the denoiser was trained on, so none of them is known to be new"
        )
    return _split(pairs, float(denoiser.metadata["held_out"]), int(denoiser.metadata["seed"]))[1]


def _score(denoiser: Denoiser, pairs: Pairs) -> dict[str, Any]:
    before = psnr(pairs.noisy, pairs.clean)
    after = psnr(denoiser(pairs.noisy), pairs.clean)
    return {
        "psnr": {"noisy": float(before.mean()), "denoised": float(after.mean())},
        "improved": float((after > before).double().mean()),
        "pairs": len(before),
    }
