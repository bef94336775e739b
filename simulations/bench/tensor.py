"""The tensor attack on real images: exactness, certificates, seconds and memory, and what it must refuse."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from adversaries.reconstruction.tensor import TensorAttack
from adversaries.reconstruction.tensor.decompose import Decomposer, decompose, symmetric
from fedattack.compression import Memory, build_compressor, decode, encode
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.metrics import labels_right, match, psnr
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import Observation, Reconstruction, Scenario
from fedattack.rng import numpy_rng, torch_rng
from fedattack.training import local_update
from simulations.bench.scenes import data_set, memory

CAP = 120.0
"""dB beyond which float32 updates cannot tell; single values are cut here before they are averaged."""

_LIMITS: dict[str, int] = {"mnist": 5000, "cifar10": 2000}

console = Console()

Images = Literal["digits", "mnist", "cifar10"]


@dataclass(frozen=True)
class Row:
    """One scene and what is asked of it: `mean` and `worst` in dB (0: no bar), and the status.

    "not certified" may fail, and must not be called certified. `long`: left out unless asked for; `dependent`: the
    last image is the mean of the first two; `label`: of all images.
    """

    name: str
    images: Images
    batch: int
    width: int
    activation: str = "poly3"
    mean: float = 0.0
    worst: float = 0.0
    expect: Literal["certified", "approximate", "not certified"] = "certified"
    compression: CompressionConfig = field(default_factory=lambda: CompressionConfig(name="none"))
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    long: bool = False
    dependent: bool = False
    label: int | None = None


def _top(rate: float, scope: Literal["global", "layer"] = "global") -> CompressionConfig:
    return CompressionConfig(name="topk", rate=rate, scope=scope)


FULL = (
    Row("full view", "mnist", 16, 256, mean=110, worst=60),
    Row("full view", "mnist", 32, 1024, mean=110, worst=60),
    Row("full view", "mnist", 48, 2048, mean=110, worst=60),
    Row("full view", "mnist", 64, 2500, mean=110, worst=60),
    Row("full view", "cifar10", 32, 1024, mean=105),
    Row("full view", "mnist", 100, 5600, long=True),
    Row("full view", "mnist", 128, 9000, long=True),
    *(
        Row("activation", "mnist", 8, 4096, name, mean=100)
        for name in ("tanh", "sigmoid", "gelu", "softplus")
    ),
    Row("activation", "mnist", 8, 4096, "relu", mean=60),
    Row("top-k 0.1 %", "mnist", 1, 4096, mean=100, compression=_top(0.001), seeds=3),
    Row("top-k 0.1 %", "mnist", 2, 8192, mean=100, compression=_top(0.001), seeds=3),
    Row("top-k 0.1 %, one label", "mnist", 2, 8192, mean=100, compression=_top(0.001), label=7),
    Row("top-k 0.1 %", "mnist", 4, 16384, mean=100, compression=_top(0.001), long=True),
    Row("last layer", "digits", 4, 400, mean=100, settings={"view": "last_layer"}, seeds=3),
    Row("last layer", "digits", 8, 2000, mean=100, settings={"view": "last_layer"}, seeds=3),
    Row("too narrow", "mnist", 48, 1024, expect="not certified"),
    Row("more than pixels", "digits", 65, 2600, expect="not certified"),
    Row("dependent", "mnist", 8, 512, expect="not certified", dependent=True),
    Row("too few entries", "mnist", 1, 512, expect="not certified", compression=_top(0.001)),
    Row("top-k 0.1 % a layer", "mnist", 1, 4096, expect="not certified", compression=_top(0.001, "layer")),
)

QUICK = (
    Row("full view", "digits", 8, 128, mean=110, worst=60),
    Row("activation", "digits", 2, 512, "tanh", mean=100),
    Row("too narrow", "digits", 16, 128, expect="not certified"),
    Row("dependent", "digits", 4, 128, expect="not certified", dependent=True),
    Row("too few entries", "digits", 1, 512, expect="not certified", compression=_top(0.001)),
)


def run(quick: bool = False, data: Path | None = None, long: bool = False) -> dict[str, Any]:
    """The tensor attack, all of it: exact batches, other activations, top-k, the last layer, and impossible cases.

    Each row is a client's real gradient at the weights that the attack sends, cross-entropy over ten classes with
    the images' own labels, attacked through :class:`TensorAttack` as a run does (labels, certificate and refinement
    included) and scored here. `quick`: small scenes on embedded digits, else `data` holds ``MNIST/`` and
    ``CIFAR10/``; `long`: also rows of minutes.

    Returns
    -------
    dict
        "rows": one record each with PSNR in dB (mean and worst, cut at 120), labels right, status, residual,
        seconds, memory in MiB that the attack added to the process at its peak, and "met". "met" and "missed":
        numbers of rows; "wrong_certified": certified ones with an image below 60 dB or a wrong label.
    """
    if data is None and not quick:
        need = "needs the folder with MNIST/ and CIFAR10/ (--data); or use --quick"
        raise ConfigError(f"benchmark case 'tensor' {need}")
    rows = [row for row in (QUICK if quick else FULL) if long or not row.long]
    records = [_measured(row, seed, data) for row in rows for seed in range(row.seeds)]
    _print(records)
    return {
        "rows": records,
        "decomposers": [] if quick else decomposer_table(),
        "met": sum(record["met"] for record in records),
        "missed": sum(not record["met"] for record in records),
        "wrong_certified": sum(record["wrong_certified"] for record in records),
    }


def _measured(row: Row, seed: int, data: Path | None) -> dict[str, Any]:
    attack = TensorAttack(**row.settings)
    observation, images, labels = _observed(row, attack, seed, data)
    refused, answer = "", None
    with memory() as used:
        begin = time.perf_counter()
        try:
            attack.check(observation.scenario)
            answer = attack.run([observation], seed, torch.device("cpu"))[0]
        except NotApplicable as reason:
            refused = str(reason)
        seconds = time.perf_counter() - begin
    record: dict[str, Any] = {
        **{name: getattr(row, name) for name in ("name", "images", "batch", "width", "activation")},
        "seed": seed,
        "equal_labels": len(labels.unique()) < len(labels),
        "seconds": seconds,
        "memory_mib": used[0] / 2**20,
        "status": "refused" if answer is None else answer.details["status"],
        "reason": refused if answer is None else answer.details["reason"],
        **_scores(answer, images, labels),
    }
    return record | _verdict(row, record)


def _scores(answer: Reconstruction | None, images: Tensor, labels: Tensor) -> dict[str, Any]:
    if answer is None or not len(answer.images):
        return {"psnr_mean": None, "psnr_worst": None, "labels_right": None, "residual": None}
    order = match(answer.images, images, answer.labels, labels).order
    found, matched = [p for p in order if p >= 0], [n for n, p in enumerate(order) if p >= 0]
    values = psnr(answer.images[found], images[matched]).clamp(max=CAP)
    return {
        "psnr_mean": float(values.mean()),
        "psnr_worst": float(values.min()) if len(found) == len(order) else 0.0,
        "labels_right": sum(labels_right(answer.labels, labels)) / len(labels),
        "residual": answer.details["residual"],
        "predicted_error": answer.details["predicted_error"],
        "refined": bool(answer.details.get("refined", False)),
    }


def _verdict(row: Row, record: dict[str, Any]) -> dict[str, Any]:
    certified = record["status"] == "certified"
    exact = certified and record["psnr_worst"] > 60 and record["labels_right"] == 1
    if row.expect == "not certified":
        met = not certified
    else:
        enough = record["psnr_mean"] is not None and record["psnr_mean"] >= row.mean
        met = enough and record["psnr_worst"] >= row.worst
        met = met and (certified or (row.expect == "approximate" and record["status"] == "approximate"))
        met = met and (row.expect != "certified" or record["labels_right"] == 1)
    return {"bar_mean": row.mean, "bar_worst": row.worst, "expect": row.expect, "met": bool(met)} | {
        "wrong_certified": certified and not exact
    }


# ---------------------------------------------------------------------- scenes


def _observed(
    row: Row, attack: TensorAttack, seed: int, data: Path | None
) -> tuple[Observation, Tensor, Tensor]:
    """One client's update as it came over the wire at the weights sent, with its images and labels."""
    images, labels = _pictures(row.images, data)
    if row.label is not None:
        images, labels = images[labels == row.label], labels[labels == row.label]
    chosen = numpy_rng(seed, "bench.tensor").permutation(len(labels))[: row.batch]
    images, labels = images[chosen], labels[chosen]
    if row.dependent:
        images = torch.cat([images[:-1], images[:2].mean(0, keepdim=True)])
    wanted = ModelConfig(name="two-layer", width=row.width, activation=row.activation)
    model = resolve(wanted, images.shape[1], images.shape[-1], 10)
    training = TrainingConfig(batch_size=row.batch)
    scenario = Scenario(model, training, row.compression)
    weights = attack.arm(scenario, initial_weights(model, seed), seed, None)
    whole = [torch.arange(len(images)).numpy()]
    result = local_update(build_model(model), weights, images, labels, whole, training)
    names, shapes = list(result.update), [tuple(part.shape) for part in result.update.values()]
    compressor = build_compressor(row.compression, names, shapes)
    packet, _ = compressor.compress(result.update, Memory(), 1, torch_rng(seed, "bench.tensor.compressor"))
    update = decode(encode(packet), names, shapes, "gradient", row.compression, round=1)
    return Observation(1, 0, scenario, weights, update, len(images)), images, labels


@lru_cache(maxsize=3)
def _pictures(name: Images, data: Path | None) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) of a data set and their labels, of the large ones some thousands."""
    dataset = data_set(name, data, _LIMITS.get(name))
    return dataset.tensors(np.arange(len(dataset)))


def _print(records: list[dict[str, Any]]) -> None:
    score_names = ("dB mean", "worst", "labels")
    table = Table("case", "images", "B", "m", "activation", *score_names, "status", "s", "MiB", "met")
    forms = (("psnr_mean", "{:.1f}"), ("psnr_worst", "{:.1f}"), ("labels_right", "{:.0%}"))
    for r in records:
        score = ["" if r[name] is None else form.format(r[name]) for name, form in forms]
        place = [r["name"], r["images"], str(r["batch"]), str(r["width"]), r["activation"]]
        end = [r["status"], f"{r['seconds']:.2f}", f"{r['memory_mib']:.0f}", "yes" if r["met"] else "NO"]
        table.add_row(*place, *score, *end)
    console.print(table)


# ---------------------------------------------------------------------- decomposers


def decomposer_table(
    methods: Sequence[Decomposer] = ("simdiag", "jennrich", "als", "tensorly_power"),
    batches: Sequence[int] = (4, 8, 16),
    noises: Sequence[float] = (0.0, 1e-2),
    seeds: int = 3,
) -> list[dict[str, Any]]:
    """All decomposers on the same third-order tensors of embedded digits, clean and noisy.

    The tensor is ``sum_i t_i c_i^(3)`` with c_i the images' directions in their span, beside the second-order moment;
    noise is symmetric, Gaussian and relative to each one's norm. An image is scored at its best scale and sign, for
    a direction has none; a record holds the mean in dB, cut at 120, and the seconds for one tensor.
    """
    images, _ = _pictures("digits", None)
    records = []
    for method, size, noise in itertools.product(methods, batches, noises):
        values, seconds = [], 0.0
        for seed in range(seeds):
            generator = torch_rng(seed, "bench.tensor.decomposers", size)
            chosen = torch.randperm(len(images), generator=generator)[:size]
            inputs = images[chosen].flatten(1).double()
            basis = torch.linalg.svd(inputs, full_matrices=False)[2].T
            third, second = _moments(inputs @ basis, noise, generator)
            begin = time.perf_counter()
            found, _ = decompose(method, third, second, torch_rng(seed, "bench.tensor.draws"), seed)
            seconds += time.perf_counter() - begin
            values.append(float(_aligned(inputs, (basis @ found).T).mean()))
        means = {"psnr_mean": sum(values) / seeds, "seconds": seconds / seeds}
        records.append({"decomposer": method, "batch": size, "noise": noise, **means})
    return records


def _moments(inputs: Tensor, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Third and second order moments of inputs (B, B), with the cubic's weights."""
    weights = 0.3 + torch.randn(len(inputs), generator=generator, dtype=torch.float64).abs()
    moments = [
        6 * torch.einsum("i,ia,ib,ic->abc", weights, inputs, inputs, inputs),
        2 * torch.einsum("i,ia,ib->ab", weights, inputs, inputs),
    ]
    noisy = []
    for moment in moments:
        extra = torch.randn(moment.shape, generator=generator, dtype=torch.float64)
        extra = symmetric(extra + extra.transpose(0, 1))
        noisy.append(moment + noise * extra * moment.norm() / extra.norm())
    return noisy[0], noisy[1]


def _aligned(inputs: Tensor, directions: Tensor) -> Tensor:
    """dB (B,) of each input at its best multiple of the direction that is matched to it."""
    error = inputs.square().sum(1, keepdim=True) - (inputs @ directions.T).square()
    error = error.clamp_min(0) / inputs.shape[1]
    rows, columns = linear_sum_assignment(error.numpy())
    return (-10 * error[rows, columns].clamp_min(1e-300).log10()).clamp(max=CAP)
