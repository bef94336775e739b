"""Whether the tensor attack's certificates are right: clients drawn at random, and sets of similar digits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adversaries.inversion.gradients.activations import ACTIVATIONS, stein_order
from adversaries.reconstruction.tensor import TensorAttack
from adversaries.reconstruction.tensor.moments import feature_count
from fedattack.compression import Memory, build_compressor, decode, encode
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError
from fedattack.metrics import match
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import Observation, Reconstruction, Scenario
from fedattack.rng import numpy_rng, torch_rng
from fedattack.training import local_update
from simulations.bench.scenes import data_set

EXACT = 1e-3
"""Root mean square error of an image from which on it counts as reproduced: 60 dB."""

_LIMIT = 2000
_ROUNDED = 1e-6
"""What saving an image in float32 may add to its error."""

_KINDS = ("plain", "copies", "near copies", "black", "constant", "half", "bfloat16", "quantised", "noise")
_ACTIVATIONS = ("poly3",) * 6 + ("tanh", "relu")
_SIMILAR = ((32, 1024), (48, 2048), (64, 2500))

console = Console()


@dataclass(frozen=True)
class Client:
    """One batch, images (B, C, H, W) and labels (B,), what is odd about it, and how its gradient is sent."""

    source: str
    kind: str
    images: Tensor
    labels: Tensor
    width: int
    activation: str
    seed: int
    noise: float = 0.0

    def observation(self, attack: TensorAttack) -> Observation:
        """The gradient as it came over the wire at the weights that the attack sends."""
        wanted = ModelConfig(name="two-layer", width=self.width, activation=self.activation)
        model = resolve(wanted, self.images.shape[1], self.images.shape[-1], 10)
        training = TrainingConfig(batch_size=len(self.images))
        name = "qsgd" if self.kind == "quantised" else "none"
        scenario = Scenario(model, training, CompressionConfig(name=name))
        weights = attack.arm(scenario, initial_weights(model, self.seed), self.seed, None)
        whole = [np.arange(len(self.images))]
        update = local_update(build_model(model), weights, self.images, self.labels, whole, training).update
        draws = torch_rng(self.seed, "bench.certificates.wire")
        sent = {name: self._worsened(part, draws) for name, part in update.items()}
        names, shapes = list(sent), [tuple(part.shape) for part in sent.values()]
        packet, _ = build_compressor(scenario.compression, names, shapes).compress(sent, Memory(), 1, draws)
        received = decode(encode(packet), names, shapes, "gradient", scenario.compression, round=1)
        return Observation(1, 0, scenario, weights, received, len(self.images))

    def _worsened(self, part: Tensor, draws: torch.Generator) -> Tensor:
        if self.kind == "noise":
            deviation = self.noise * part.norm() / part.numel() ** 0.5
            return part + deviation * torch.randn(part.shape, generator=draws)
        if self.kind == "half":  # scaled as mixed-precision training scales its losses
            size = part.abs().max() / 1024
            return (part / size).half().float() * size
        return part.bfloat16().float() if self.kind == "bfloat16" else part


def run(
    quick: bool = False, data: Path | None = None, count: int = 1000, long: bool = False
) -> dict[str, Any]:
    """Are the tensor attack's certificates right? Random clients, and batches of similar digits.

    A certificate is wrong if an image is farther off than it claims (`predicted_error`; of pictures answered as black
    because they leave no trace, `inferred_error`), if a label is wrong, or if images are missing or too many. `data`
    holds ``MNIST/``, ``FashionMNIST/``, ``CIFAR10/`` and perhaps ``USPS/``; `quick`: embedded digits only, a tenth of
    the clients. `long`: also ten batches each of 32, 48 and 64 digits of 16x16, USPS's or MNIST's cut and smoothed as
    those are, of which every exact one must be certified.

    Returns
    -------
    dict
        "clients", "certified", "exact" (all images within 60 dB and labels right), "wrong": numbers of clients;
        "kinds": the same for each; "similar": records of the batches of digits.
    """
    if data is None and not quick:
        raise ConfigError(
            "benchmark case 'tensor-certificates' needs the folder with MNIST/, FashionMNIST/ and CIFAR10/ (--data); "
            "or use --quick"
        )
    sources = ("digits",) if quick else ("digits", "digits16", "mnist14", "fashion14", "cifar16")
    records = []
    for client in clients(max(1, count // 10) if quick else count, sources, data):
        records.append(judged(client))
        if len(records) % 100 == 0:
            console.print(
                f"{len(records)} clients, {sum(record['wrong'] for record in records)} wrong certificates"
            )
    kinds = {kind: _counted([r for r in records if r["kind"] == kind]) for kind in _KINDS}
    similar = []
    if long and not quick:
        for batch, width in _SIMILAR:
            similar += [
                judged(client) | {"batch": batch}
                for client in (_plain("digits16", batch, width, seed, data) for seed in range(10))
            ]
    table = Table("clients", "number", "exact", "certified", "wrong", "s each")
    rows = list(kinds.items())
    rows += [
        (f"{b} similar digits", _counted([r for r in similar if r["batch"] == b]))
        for b, _ in _SIMILAR
        if similar
    ]
    for name, row in rows:
        cells = [str(row[key]) for key in ("clients", "exact", "certified", "wrong")]
        table.add_row(name, *cells, f"{row['seconds']:.1f}")
    console.print(table)
    missed = [record for record in records + similar if record["wrong"]]
    return {**_counted(records), "kinds": kinds, "similar": similar, "missed": missed}


def _counted(records: list[dict[str, Any]]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"clients": len(records)}
    numbers |= {name: sum(record[name] for record in records) for name in ("exact", "certified", "wrong")}
    return numbers | {"seconds": sum(record["seconds"] for record in records) / max(1, len(records))}


def judged(client: Client, attack: TensorAttack | None = None) -> dict[str, Any]:
    """The attack on one client, and whether what it certifies is true."""
    attack = attack or TensorAttack()
    observation = client.observation(attack)
    begin = time.perf_counter()
    answer = attack.run([observation], client.seed, torch.device("cpu"))[0]
    seconds = time.perf_counter() - begin
    certified = answer.details["status"] == "certified"
    worst, exact, wrong = compared(answer, client.images, client.labels)
    named = {
        "source": client.source,
        "kind": client.kind,
        "seed": client.seed,
        "activation": client.activation,
    }
    return {
        **named,
        "batch": len(client.images),
        "width": client.width,
        "certified": certified,
        "exact": exact,
        "wrong": certified and wrong,
        "worst": worst,
        "predicted_error": answer.details.get("predicted_error"),
        "residual": answer.details.get("residual"),
        "seconds": seconds,
        "notes": answer.details["notes"],
    }


def compared(answer: Reconstruction, images: Tensor, labels: Tensor) -> tuple[float, bool, bool]:
    """Worst root mean square error, whether all is exact, and whether a certificate of it would be wrong."""
    if len(answer.images) != len(images):
        return float("inf"), False, True
    order = list(match(answer.images, images).order)
    errors = (answer.images[order] - images).square().flatten(1).mean(1).sqrt()
    inferred = answer.labels[order] < 0
    claimed = answer.details.get("predicted_error") or 0.0
    dark = answer.details.get("inferred_error") or 0.0
    named = Counter(answer.labels[answer.labels >= 0].tolist())
    told = not named - Counter(labels.tolist())
    allowed = torch.where(inferred, dark, claimed) + _ROUNDED
    return (
        float(errors.max()),
        bool((errors <= EXACT).all()) and told,
        bool((errors > allowed).any()) or not told,
    )


# ---------------------------------------------------------------------- clients


def clients(count: int, sources: tuple[str, ...], data: Path | None, first: int = 0) -> Iterator[Client]:
    """Clients of 2 to 16 images and random width, the kinds in turn."""
    for seed in range(first, first + count):
        draws = numpy_rng(seed, "bench.certificates")
        source, kind = str(draws.choice(sources)), _KINDS[seed % len(_KINDS)]
        activation = str(draws.choice(_ACTIVATIONS))
        batch = int(draws.integers(2, 17 if activation == "poly3" else 7))
        order = stein_order(ACTIVATIONS[activation])
        needed = feature_count(batch, order - 1)
        least = needed if activation == "poly3" else max(1024, needed)
        width = int(least * draws.uniform(1.0, 3.0)) + 4
        plain = _plain(source, batch, width, seed, data)
        images, labels = plain.images.clone(), plain.labels.clone()
        odd = int(draws.integers(1, max(2, batch // 3 + 1)))
        if kind in ("copies", "near copies"):
            spread = 0.0 if kind == "copies" else 10 ** draws.uniform(-4, -2)
            for place in range(1, min(odd + 1, batch)):
                other = images[0 if draws.random() < 0.5 else place - 1]
                noise = torch.from_numpy(draws.standard_normal(other.shape)).float() * spread
                darker = draws.random() < 0.3  # the hardest to tell apart
                images[place] = other * (1 - spread) if darker else (other + noise).clamp(0, 1)
                labels[place] = labels[0] if draws.random() < 0.7 else labels[place]
        if kind == "black":
            images[:odd] = 0 if draws.random() < 0.7 else images[:odd] * 10 ** draws.uniform(-4, -1)
        if kind == "constant":
            images[:odd] = torch.from_numpy(draws.integers(1, 256, (odd, 1, 1, 1)) / 255).float()
        level = float(10 ** draws.uniform(-7, -1))
        yield Client(source, kind, images, labels, width, activation, seed, level)


def _plain(source: str, batch: int, width: int, seed: int, data: Path | None) -> Client:
    images, labels = pictures(source, data)
    chosen = numpy_rng(seed, "bench.certificates.batch").permutation(len(labels))[:batch]
    return Client(source, "plain", images[chosen], labels[chosen], width, "poly3", seed)


@lru_cache(maxsize=5)
def pictures(source: str, data: Path | None) -> tuple[Tensor, Tensor]:
    """Small images (N, C, H, W), in steps of 1/255 as files have them, and their labels (N,)."""
    if source == "digits16" and data is not None and (data / "USPS").exists():
        dataset = data_set("usps", data, _LIMIT)
        return dataset.tensors(np.arange(len(dataset)))
    names = {"digits16": "mnist", "mnist14": "mnist", "fashion14": "fashion-mnist", "cifar16": "cifar10"}
    dataset = data_set(names.get(source, source), data, None if source == "digits" else _LIMIT)
    images, labels = dataset.tensors(np.arange(len(dataset)))
    if source == "digits":
        return images, labels
    if source == "digits16":
        images = torch.cat([_filling(image) for image in images])
    else:
        images = F.avg_pool2d(images, 2)
    return (images * 255).round() / 255, labels


def _filling(image: Tensor) -> Tensor:
    """A digit (1, H, W) cut to its box, at 16x16 and smoothed, (1, 1, 16, 16): what USPS's look like."""
    rows, columns = (torch.nonzero(image[0].amax(axis) > 0.1).flatten() for axis in (1, 0))
    width = max(int(columns[-1] - columns[0]) + 1, 8)
    left = min(max((int(columns[0]) + int(columns[-1]) - width) // 2 + 1, 0), image.shape[2] - width)
    cut = image[None, :, int(rows[0]) : int(rows[-1]) + 1, left : left + width]
    small = F.interpolate(cut, (16, 16), mode="bilinear", antialias=True, align_corners=False)
    ramp = torch.arange(-3, 4, dtype=image.dtype)
    line = torch.exp(-0.5 * (ramp / 1.2).square())
    line = line / line.sum()
    kernel = torch.outer(line, line)[None, None]
    return F.conv2d(F.pad(small, (3, 3, 3, 3), mode="reflect"), kernel).clamp(0, 1)
