"""An imitation of the scenario's client on public images, from which learned attacks learn beforehand."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adversaries.base import Progress, no_progress
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.head import RowSignals, find_head
from adversaries.inversion.evidence.one_gradient import accumulates
from fedattack.compression import Compressor, Memory, build_compressor, decode, encode, kept_share
from fedattack.compression.selection import largest, quotas
from fedattack.errors import DataError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Observation, Scenario, Update, UpdateKind
from fedattack.rng import adversary_seed, numpy_rng, torch_rng
from fedattack.task import trained_parameters
from fedattack.training import batch_positions, load_weights, local_update

_CHUNK = 64


@dataclass(frozen=True)
class SignalPairs:
    """Row signals and their images, float32 (N, C, H, W), `positions` int64 (N,) in the auxiliary set."""

    signals: RowSignals
    images: Tensor
    positions: Tensor


def batch_size_of(scenario: Scenario, batch_size: int | None) -> int:
    """Images in one client's batch: asked for, or the scenario's; DataError where that leaves it open (0)."""
    size = scenario.training.batch_size if batch_size is None else batch_size
    if size < 1:
        raise DataError(
            f"setting 'training.batch_size' = {size}: a generator is made for one batch size; give it (1, 2, ...)"
        )
    return size


def draw_labels(count: int, classes: int, rng: np.random.Generator) -> Tensor:
    """Random labels (count,) of one batch, distinct while they last."""
    rounds = [rng.permutation(classes)[:count] for _ in range(-(-count // classes))]
    return torch.from_numpy(np.concatenate(rounds)[:count].astype(np.int64))


def check_memory(scenario: Scenario, round: int) -> None:
    """NotApplicable in a round whose updates carry what earlier rounds held back: one image cannot imitate that."""
    if accumulates(scenario) and round > 1:
        raise NotApplicable(
            f"round {round} with error feedback or DGC: updates hold residuals of earlier rounds, which public "
            "images cannot imitate; attack round 1"
        )


class ImitatedClient:
    """The scenario's client, from an empty memory, sent the state dict `weights` in 1-based `round`.

    NotApplicable as :func:`check_memory`.
    """

    def __init__(
        self,
        scenario: Scenario,
        weights: Mapping[str, Tensor],
        seed: int,
        round: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        check_memory(scenario, round)
        self.scenario, self.seed, self.round = scenario, seed, round
        self.weights = {name: tensor.detach().to(device) for name, tensor in weights.items()}
        self.module = build_model(scenario.model).to(device).train()
        self.head = find_head(self.module)
        self.names, parameters = zip(*trained_parameters(self.module).items(), strict=True)
        self.shapes = tuple(tuple(parameter.shape) for parameter in parameters)
        self.compressor: Compressor = build_compressor(scenario.compression, self.names, self.shapes)

        self.body = copy.deepcopy(self.module)
        self.body.set_submodule(self.head.weight.rpartition(".")[0], nn.Identity())

    def compute(self, images: Tensor, labels: Tensor, number: int) -> dict[str, Tensor]:
        """What the client computes from its images before compression."""
        training = self.scenario.training
        seed = adversary_seed(self.seed, "imitated client")  # never a real client's draws, whatever the seed
        steps = batch_positions(len(labels), training, seed, self.round, number)
        return local_update(self.module, self.weights, images, labels, steps, training).update

    def send(self, dense: Mapping[str, Tensor], number: int) -> Update:
        """What arrives of a dense update: compressed, encoded and decoded as on the wire."""
        kind: UpdateKind = "gradient" if self.scenario.training.protocol == "fedsgd" else "delta"
        stream = torch_rng(self.seed, "learned.compress", number)
        packet, _ = self.compressor.compress(dense, Memory(), self.round, stream)
        compression = self.scenario.compression
        return decode(encode(packet), self.names, self.shapes, kind, compression, round=self.round)

    def observe(self, images: Tensor, labels: Tensor, number: int) -> Observation:
        """What the adversary would see of a client with this batch."""
        update = self.send(self.compute(images, labels, number), number)
        return Observation(self.round, number, self.scenario, dict(self.weights), update, len(labels))


def simulate_rows(
    client: ImitatedClient,
    images: Tensor,
    positions: Tensor,
    batch_size: int,
    seed: int,
    passes: int = 1,
    mirror: bool = False,
    progress: Progress = no_progress,
) -> SignalPairs:
    """Put auxiliary images through the client and read off what it would have given away.

    Exact top-k of one gradient needs only its threshold and the label rows: :func:`topk_rows` finds them
    without the dense gradient of the head. Any other compression runs client and wire in full for each batch.

    Parameters
    ----------
    images, positions : Tensor
        All auxiliary images, float32 (N, C, H, W), and which of them to use, int64.
    batch_size : int
        Images per client; DataError if there are fewer. Each pass deals the images out anew, with new labels;
        what does not fill a batch sits out.
    passes : int
        How often each image is used.
    mirror : bool
        Flip the images left to right in every second pass.
    """
    if len(positions) < batch_size:
        raise DataError(f"{len(positions)} auxiliary images do not fill one batch of {batch_size}")
    batches: list[tuple[Tensor, Tensor, Tensor]] = []
    for turn in range(passes):
        rng = numpy_rng(seed, "learned.batches", turn)
        order = positions[torch.from_numpy(rng.permutation(len(positions)))]
        for chosen in order.split(batch_size):
            if len(chosen) == batch_size:
                pixels = images[chosen]
                if mirror and turn % 2:
                    pixels = pixels.flip(3)
                batches.append((chosen, pixels, draw_labels(batch_size, client.head.classes, rng)))
    exact = _is_exact(client, images[positions[:2]])
    found: list[RowSignals] = []
    step = max(1, _CHUNK // batch_size)
    for start in range(0, len(batches), step):
        part = batches[start : start + step]
        progress(start / len(batches), f"imitating clients {start}/{len(batches)}")
        if exact:
            found += _rows_by_threshold(client, part)
            continue
        for number, (_, pixels, labels) in enumerate(part, start):
            found.append(Evidence(client.observe(pixels, labels, number)).rows(labels))
    signals = RowSignals(torch.cat([f.values for f in found]), torch.cat([f.sent for f in found]))
    return SignalPairs(
        signals,
        torch.cat([pixels for _, pixels, _ in batches]),
        torch.cat([chosen for chosen, _, _ in batches]),
    )


def _is_exact(client: ImitatedClient, images: Tensor) -> bool:
    """Whether signals may be found without the dense gradient: plain top-k of one gradient of a linear head."""
    scenario, head = client.scenario, client.head
    if scenario.training.protocol != "fedsgd" or scenario.compression.name not in ("topk", "none"):
        return False
    load_weights(client.module, client.weights)
    client.body.load_state_dict({name: client.weights[name] for name in client.body.state_dict()})
    images = images.to(client.weights[head.weight].device)
    with torch.no_grad():
        logits = client.body(images) @ client.weights[head.weight].T + client.weights[head.bias]
        return bool(torch.allclose(client.module(images), logits, atol=1e-4))


def _rows_by_threshold(
    client: ImitatedClient, batches: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> list[RowSignals]:
    """Signals of batches by :func:`topk_rows`; the residuals of all of them in one product."""
    weight, bias = client.weights[client.head.weight], client.weights[client.head.bias]
    body = trained_parameters(client.body)
    compression = client.scenario.compression
    needed = bool(body) and compression.name == "topk" and compression.scope == "global"
    inputs = [client.body(pixels.to(weight.device)) for _, pixels, _ in batches]
    labels = torch.cat([y for *_, y in batches]).to(weight.device)
    features = torch.cat([h.detach() for h in inputs])
    size = len(batches[0][2])
    residual = (features @ weight.T + bias).softmax(1)
    residual[torch.arange(len(labels)), labels] -= 1
    residual /= size
    pulled = residual @ weight
    found = []
    for i, h in enumerate(inputs):
        rows = slice(i * size, (i + 1) * size)
        slopes = torch.autograd.grad(h, list(body.values()), pulled[rows]) if needed else ()
        rest = dict(zip(body, slopes, strict=True)) if needed else {}
        found.append(topk_rows(client, rest, residual[rows], features[rows], labels[rows]))
    return found


def topk_rows(
    client: ImitatedClient, rest: Mapping[str, Tensor], residual: Tensor, features: Tensor, labels: Tensor
) -> RowSignals:
    """What exact top-k lets through of the label rows, without forming the head's gradient.

    Entry (i, j) of that gradient is sum_b r_bi h_bj, at most ``sum_b |r_bi| max_j |h_bj|``. Rows are taken in
    the order of that bound until k entries are there; their k-th largest bounds the threshold from below, so
    rows whose bound stays below it cannot matter, and the k-th largest of the others is the threshold itself.
    Up to ties at the threshold the answer is :func:`read_rows` of the compressed gradient.

    Parameters
    ----------
    client : ImitatedClient
        Compression "topk" (or "none").
    rest : mapping of str to Tensor
        Gradients of all tensors but the head's; only looked at when entries are chosen over all layers.
    residual, features : Tensor
        (softmax - one-hot) / B, (B, classes), and the head's input, (B, F).
    """
    compression, head = client.scenario.compression, client.head
    bias = residual.sum(0)
    row_bias = bias[labels]
    rows = residual[:, labels].T @ features
    if compression.name == "none" or kept_share(compression, client.round) == 1.0:
        weight_bar = bias_bar = 0.0
    elif compression.scope == "layer":
        sizes = [head.classes * head.features, head.classes]
        weight_quota, bias_quota = quotas(compression, sizes, client.round)
        weight_bar = _head_threshold(residual, features, weight_quota.kept, features.new_empty(0))
        bias_bar = _kth_largest(bias.abs(), bias_quota.kept)
    else:
        (quota,) = quotas(compression, [torch.Size(shape).numel() for shape in client.shapes], client.round)
        certain = torch.cat([bias.abs(), *(g.detach().abs().flatten() for g in rest.values())])
        weight_bar = bias_bar = _head_threshold(residual, features, quota.kept, certain)
    kept = (rows.abs() >= weight_bar) & (rows != 0)
    known = (row_bias.abs() >= bias_bar) & (row_bias != 0)
    scale = torch.where(known, row_bias, torch.full_like(row_bias, -1 / len(labels)))
    return RowSignals((rows * kept / scale[:, None]).cpu(), kept.cpu())


def _head_threshold(residual: Tensor, features: Tensor, count: int, certain: Tensor) -> float:
    """The `count`-th largest magnitude of `certain` and the head's gradient ``residual.T @ features``."""
    classes, width = residual.shape[1], features.shape[1]
    bounds = residual.abs().T @ features.abs().amax(1)
    order = bounds.argsort(descending=True, stable=True)
    first = min(classes, max(0, -(-(count - certain.numel()) // width)) + len(residual))
    taken = torch.cat([certain, (residual[:, order[:first]].T @ features).abs().flatten()])
    if first == classes:
        return _kth_largest(taken, min(count, taken.numel()))
    # Rounding may lift an entry a little above its bound.
    low = _kth_largest(taken, count) if taken.numel() >= count else 0.0
    more = order[first : int((bounds >= low * (1 - 1e-5)).sum())]
    if len(more):
        taken = torch.cat([taken, (residual[:, more].T @ features).abs().flatten()])
    return _kth_largest(taken, count)


def _kth_largest(magnitudes: Tensor, count: int) -> float:
    values = magnitudes.cpu().numpy()
    return float(values[largest(values, count)].min())
