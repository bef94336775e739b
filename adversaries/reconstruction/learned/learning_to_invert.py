"""Learning to Invert: a network from gradients to images, trained on public images through the same compressor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from adversaries.base import Progress, no_progress, share_of
from adversaries.inversion.evidence.client import ImitatedClient
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.floors import floors
from adversaries.inversion.evidence.labels.label_strategies import infer
from adversaries.inversion.learning import train
from adversaries.reconstruction.learned import base
from fedattack.config import Positive
from fedattack.metrics.matching import match
from fedattack.metrics.pixels import psnr
from fedattack.models.decoders.from_latent import GradientMLP
from fedattack.observation import Auxiliary, Observation, Reconstruction, Update
from fedattack.rng import numpy_rng, torch_rng

_BATCH = 32


@dataclass
class LearningToInvert(base.TrainedAttack):
    """LTI: an MLP answers the images of an update at once, having seen updates of public images (Wu et al. 2023).

    The auxiliary images, with random labels, go through the scenario's own client and compressor; the network
    learns to go back, by mean squared error to the nearest order of the batch. What it reads of an update are
    all entries that were sent, or, of larger models, signed sums of them in random buckets. Any compressor
    and any local training that can be imitated will do, sign included: nothing is differentiated.

    Parameters
    ----------
    hidden, layers : int
        Of the network; published: 3,000 and 3, trained on 50,000 images for 200 epochs.
    inputs : int
        Buckets that larger updates are hashed to.

    References
    ----------
    Wu, Chen, Guo, Weinberger, "Learning to Invert: Simple Adaptive Attacks for Gradient Inversion in Federated
    Learning", UAI 2023.
    """

    name: ClassVar[str] = "lti"

    hidden: Positive = 512
    layers: Positive = 2
    inputs: Positive = 4096

    def answer(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """What the network makes of one update."""
        public = train.public_images(observation, "lti")
        key = train.key(self, observation, observation.num_examples, public, seed)
        inverter = train.once(key, lambda: _train(self, observation, public, seed, device, progress))
        labels = infer("auto", Evidence(observation))
        images = inverter.answer(observation.update)
        return Reconstruction(
            images.clamp(0, 1).float(),
            labels.values,
            # Nothing is matched: what the network leaves on images it has not seen stands for the loss.
            loss=inverter.figures["held-out loss"],
            label_confidence=labels.confidence,
            method="lti",
            floors=floors(observation, labels.values),
            details={"kept": observation.update.kept, "labels": labels.note, **inverter.figures},
        )


class _Reader:
    """Updates as vectors of one length: all entries, or signed sums in random buckets."""

    def __init__(self, entries: int, inputs: int, seed: int) -> None:
        self.inputs = min(entries, inputs)
        self._hashed = entries > inputs
        if self._hashed:
            stream = torch_rng(seed, "lti.buckets")
            self._bucket = torch.randint(inputs, (entries,), generator=stream)
            self._sign = torch.randint(2, (entries,), generator=stream) * 2.0 - 1

    def read(self, update: Update) -> Tensor:
        """float32 (inputs,)."""
        values = update.values.float().cpu()
        places = torch.arange(update.numel) if update.indices is None else update.indices.cpu()
        if self._hashed:
            values, places = values * self._sign[places], self._bucket[places]
        return torch.zeros(self.inputs).index_add_(0, places, values)


@dataclass(frozen=True)
class _Inverter:
    module: nn.Module
    reader: _Reader
    mean: Tensor
    scale: Tensor
    figures: dict[str, Any]

    @torch.no_grad()
    def answer(self, update: Update) -> Tensor:
        """Images (B, C, H, W) on the CPU."""
        row = (self.reader.read(update)[None] - self.mean) / self.scale
        return self.module(row)[0]


def _train(
    attack: LearningToInvert,
    observation: Observation,
    public: Auxiliary,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> _Inverter:
    size, scenario = observation.num_examples, observation.scenario
    client = ImitatedClient(scenario, observation.weights, seed, observation.round)
    reader = _Reader(observation.update.numel, attack.inputs, seed)
    seen, unseen = train.hold_out(public, 0.1, seed)
    told = share_of(progress, 0.0, 0.5)
    rows, images = _pairs(client, reader, public.images, seen, size, attack.passes, seed, told)
    test_rows, test_images = _pairs(client, reader, public.images, unseen, size, 1, seed + 1)
    mean = rows.mean(0)
    # Entries that hardly vary are not blown up to the size of the others.
    scale = rows.std(0)
    scale = scale.clamp_min(1e-2 * float(scale.max())).clamp_min(1e-30)
    rows, test_rows = (rows - mean) / scale, (test_rows - mean) / scale
    public_mean = public.images[seen].mean(0)

    def fresh() -> GradientMLP:
        return GradientMLP(reader.inputs, size, scenario.image_shape, attack.hidden, attack.layers)

    module = train.initialised(fresh, seed, "lti")
    module.begin_at(public_mean)
    module = module.to(device)
    moved, targets = rows.to(device), images.to(device)

    def loss(chosen: Tensor) -> Tensor:
        return nearest_order(module(moved[chosen]), targets[chosen])

    train.descend(
        list(module.parameters()),
        loss,
        len(rows),
        attack.epochs,
        attack.learning_rate,
        torch_rng(seed, "lti.batches"),
        share_of(progress, 0.5, 1.0),
        _BATCH,
    )
    module = module.cpu().eval().requires_grad_(False)
    with torch.no_grad():
        found = module(test_rows)
        left = float(nearest_order(found, test_images))
    scores = [psnr(a[list(match(a, b).order)], b).mean() for a, b in zip(found, test_images, strict=True)]
    floor = public_mean.expand_as(test_images[0])
    flat = [psnr(floor, b).mean() for b in test_images]
    figures = {
        "held-out PSNR": float(torch.stack(scores).mean()),
        "mean image's held-out PSNR": float(torch.stack(flat).mean()),
        "held-out loss": left,
        "trained on": len(rows),
        "inputs": reader.inputs,
    }
    return _Inverter(module, reader, mean, scale, figures)


def _pairs(
    client: ImitatedClient,
    reader: _Reader,
    images: Tensor,
    positions: Tensor,
    size: int,
    passes: int,
    seed: int,
    progress: Progress = no_progress,
) -> tuple[Tensor, Tensor]:
    """Vectors (N, inputs) of updates of public images, and the batches (N, B, C, H, W)."""
    rows, batches = [], []
    for turn in range(passes):
        rng = numpy_rng(seed, "lti.pairs", turn)
        order = positions[torch.from_numpy(rng.permutation(len(positions)))]
        for number, chosen in enumerate(order.split(size)):
            if len(chosen) < size:
                continue
            labels = torch.from_numpy(rng.integers(client.head.classes, size=size))
            seen = client.observe(images[chosen], labels, turn * len(order) + number)
            rows.append(reader.read(seen.update))
            batches.append(images[chosen])
            if number % 50 == 0:
                done = (turn + number * size / len(order)) / passes
                progress(done, f"imitating clients, pass {turn + 1}/{passes}")
    return torch.stack(rows), torch.stack(batches)


def nearest_order(found: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of batches (N, B, C, H, W) under the best order of each."""
    if found.shape[1] == 1:
        return nn.functional.mse_loss(found, targets)
    costs = torch.cdist(found.detach().flatten(2), targets.flatten(2)).square().cpu().numpy()
    orders = torch.tensor([linear_sum_assignment(cost)[1].tolist() for cost in costs], device=found.device)
    ordered = targets[torch.arange(len(targets), device=found.device)[:, None], orders]
    return nn.functional.mse_loss(found, ordered)
