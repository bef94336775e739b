"""What the learned parts of HCGLA share: how an update is imitated with public images, and their files.

Everything is learned offline from auxiliary images that the adversary puts through the very client of the scenario
(the broadcast weights, the local training, the compressor), and is fed online with the intercepted update alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adversaries.base import Progress, no_progress
from adversaries.reconstruction.engine import accumulates, as_gradient
from fedattack.compression import Compressor, Memory, build_compressor, decode, encode, kept_share
from fedattack.compression.selection import largest, quotas
from fedattack.config import ModelConfig
from fedattack.errors import DataError, NotApplicable, RunFailed
from fedattack.files import write_tensors
from fedattack.models import build_model
from fedattack.observation import Auxiliary, Observation, Scenario, Update, UpdateKind
from fedattack.rng import numpy_rng, torch_rng
from fedattack.training import batch_positions, load_weights, local_update

FORMAT = 1
_CHUNK = 64


@dataclass(frozen=True)
class Head:
    """The last linear layer: names of its tensors in the update and its size."""

    weight: str
    bias: str
    classes: int
    features: int


@dataclass(frozen=True)
class RowSignals:
    """What updates give away of the head's input, one row per image.

    Attributes
    ----------
    values : Tensor
        float32 (N, F): features h_j where they were sent, zero elsewhere.
    sent : Tensor
        bool (N, F): which were sent (and are not zero).
    """

    values: Tensor
    sent: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor | slice) -> RowSignals:
        return RowSignals(self.values[rows], self.sent[rows])


@dataclass(frozen=True)
class SignalPairs:
    """Row signals and the images they came from: what a generator learns from.

    Attributes
    ----------
    signals : RowSignals
    images : Tensor
        float32 (N, C, H, W), the targets.
    positions : Tensor
        int64 (N,): which auxiliary image each is.
    """

    signals: RowSignals
    images: Tensor
    positions: Tensor


def find_head(module: nn.Module) -> Head:
    """The last linear layer of a classifier.

    Raises
    ------
    NotApplicable
        If it has none, or that has no bias (whose gradient turns a row into features).
    """
    linear = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise NotApplicable("the model has no linear layer; a generator reads features off the last one")
    name, part = linear[-1]
    if part.bias is None:
        raise NotApplicable(f"the last linear layer {name!r} has no bias; a generator needs its gradient")
    return Head(f"{name}.weight", f"{name}.bias", part.out_features, part.in_features)


def read_rows(update: Update, head: Head, labels: Tensor, batch_size: int, unit: float = 1.0) -> RowSignals:
    """The features that an update gives away for each label.

    Row y of the head's gradient is ``r_y h`` and the bias gradient ``r_y``, so their quotient is h wherever both
    were sent (Geiping et al. 2020, proposition 3.1; Zhao et al. 2020); in a batch with distinct labels, up to what
    the softmax gives the other images there. Where the bias was not sent, ``r_y`` is taken for
    ``-unit / batch_size``, its value when the model gives y no probability.

    Parameters
    ----------
    update : Update
        As it came.
    head : Head
    labels : Tensor
        int64 (B,).
    batch_size : int
        Images the gradient is the mean of.
    unit : float
        What the update is of the gradient: 1, or minus the learning rate for a weight delta.

    Returns
    -------
    RowSignals
        B rows, on the CPU.
    """
    width = head.features
    values = torch.zeros(len(labels), width)
    residual = torch.full((len(labels),), -unit / batch_size)
    for name, _, positions, sent in update.layers():
        positions, sent = positions.cpu(), sent.float().cpu()
        if name not in (head.weight, head.bias):
            continue
        for i, label in enumerate(labels.tolist()):
            stride = width if name == head.weight else 1
            ends = torch.tensor([label * stride, (label + 1) * stride])
            low, high = torch.searchsorted(positions, ends).tolist()
            if name == head.weight:
                values[i, positions[low:high] - label * width] = sent[low:high]
            elif high > low and sent[low] != 0:
                residual[i] = sent[low]
    return RowSignals(values / residual[:, None], values != 0)


def observed_rows(observation: Observation, labels: Tensor) -> RowSignals:
    """:func:`read_rows` of an observation: the intercepted signal, one row per label.

    Raises
    ------
    DataError
        If a label is outside the head.
    NotApplicable
        If the model has no linear head with a bias.
    """
    head = head_of(observation.scenario.model)
    bad = [label for label in labels.tolist() if not 0 <= label < head.classes]
    if bad:
        raise DataError(f"labels {bad} are outside the head's 0 to {head.classes - 1}")
    training, compression = observation.scenario.training, observation.scenario.compression
    update, unit = observation.update, 1.0
    if update.kind == "delta":
        unit = -training.learning_rate * training.local_steps
        plain = compression.name != "sign" and compression.clip_norm is None and observation.round == 1
        if training.local_steps == 1 and plain:
            update, unit = as_gradient(observation), 1.0
    return read_rows(update, head, labels, observation.num_examples, unit)


@lru_cache(maxsize=8)
def head_of(model: ModelConfig) -> Head:
    """:func:`find_head` of a resolved configuration, without drawing any weights."""
    with torch.device("meta"):
        return find_head(build_model(model))


def hold_out(auxiliary: Auxiliary, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to train on and to test on, sorted; whole people where the auxiliary data says who is who.

    Raises
    ------
    DataError
        If either side would be empty.
    """
    groups = auxiliary.groups if auxiliary.groups is not None else torch.arange(len(auxiliary))
    names = groups.unique()
    order = numpy_rng(seed, "learned.hold-out").permutation(len(names))
    held = names[torch.from_numpy(order[: round(len(names) * share)])]
    mask = torch.isin(groups, held)
    if not mask.any() or mask.all():
        raise DataError(
            f"{len(auxiliary)} auxiliary images of {len(names)} people or images cannot be cut {share:.0%} to "
            f"{1 - share:.0%}; grant more of them"
        )
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def batch_size_of(scenario: Scenario, batch_size: int | None) -> int:
    """Images in one client's batch: asked for, or the scenario's.

    Raises
    ------
    DataError
        If the scenario leaves it open (0: all of the client's samples) and it was not given.
    """
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
    """Refuse a round in which updates carry what earlier rounds held back: that cannot be imitated from one image.

    Raises
    ------
    NotApplicable
    """
    if accumulates(scenario) and round > 1:
        raise NotApplicable(
            f"round {round} with error feedback or DGC: updates hold residuals of earlier rounds, which public "
            "images cannot imitate; attack round 1"
        )


class Client:
    """An imitation of the scenario's client, for auxiliary images.

    Parameters
    ----------
    scenario : Scenario
    weights : mapping of str to Tensor
        The broadcast state dict.
    seed : int
    round : int
        1-based round whose compression is imitated. Clients start with an empty memory.
    device : torch.device

    Raises
    ------
    NotApplicable
        If a client's update of that round would hold residuals of earlier rounds.
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
        self.names, parameters = zip(*self.module.named_parameters(), strict=True)
        self.shapes = tuple(tuple(parameter.shape) for parameter in parameters)
        self.compressor: Compressor = build_compressor(scenario.compression, self.names, self.shapes)

        self.body = copy.deepcopy(self.module)
        self.body.set_submodule(self.head.weight.rpartition(".")[0], nn.Identity())

    def compute(self, images: Tensor, labels: Tensor, number: int) -> dict[str, Tensor]:
        """What the client computes from its images before compression."""
        training = self.scenario.training
        steps = batch_positions(len(labels), training, self.seed, self.round, number)
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
    client: Client,
    images: Tensor,
    positions: Tensor,
    batch_size: int,
    seed: int,
    passes: int = 1,
    mirror: bool = False,
    progress: Progress = no_progress,
) -> SignalPairs:
    """Put auxiliary images through the client and read off what it would have given away.

    Parameters
    ----------
    client : Client
    images : Tensor
        float32 (N, C, H, W): all auxiliary images.
    positions : Tensor
        int64: which of them to use.
    batch_size : int
        Images per client. Each pass deals the images out anew, with new labels; what does not fill a batch sits out.
    seed : int
    passes : int
        How often each image is used.
    mirror : bool
        Flip the images left to right in every second pass.
    progress : Progress

    Returns
    -------
    SignalPairs

    Raises
    ------
    DataError
        If there are fewer images than a batch holds.

    Notes
    -----
    Exact top-k of one gradient needs only its threshold and the label rows: :func:`topk_rows` finds them without the
    dense gradient of the head. Any other compression runs client and wire in full for each batch.
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
            found.append(observed_rows(client.observe(pixels, labels, number), labels))
    signals = RowSignals(torch.cat([f.values for f in found]), torch.cat([f.sent for f in found]))
    return SignalPairs(
        signals,
        torch.cat([pixels for _, pixels, _ in batches]),
        torch.cat([chosen for chosen, _, _ in batches]),
    )


def _is_exact(client: Client, images: Tensor) -> bool:
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


def _rows_by_threshold(client: Client, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[RowSignals]:
    """Signals of batches by :func:`topk_rows`; the residuals of all of them in one product."""
    weight, bias = client.weights[client.head.weight], client.weights[client.head.bias]
    body = dict(client.body.named_parameters())
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
    client: Client, rest: Mapping[str, Tensor], residual: Tensor, features: Tensor, labels: Tensor
) -> RowSignals:
    """What exact top-k lets through of the label rows, without forming the head's gradient.

    Entry (i, j) of that gradient is sum_b r_bi h_bj, at most ``sum_b |r_bi| max_j |h_bj|``. Rows are taken in the
    order of that bound until k entries are there; their k-th largest bounds the threshold from below, so rows whose
    bound stays below it cannot matter, and the k-th largest of the others is the threshold itself.

    Parameters
    ----------
    client : Client
        Compression "topk" (or "none").
    rest : mapping of str to Tensor
        Gradients of all tensors but the head's; only looked at when entries are chosen over all layers.
    residual : Tensor
        (B, classes): (softmax - one-hot) / B.
    features : Tensor
        (B, F): the head's input.
    labels : Tensor
        int64 (B,).

    Returns
    -------
    RowSignals
        As :func:`read_rows` gives of the compressed gradient, up to ties at the threshold.
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
    """Write tensors as safetensors with JSON metadata in its header, whole or not at all.

    Parameters
    ----------
    path : str or Path
        Its folder is made where it is missing.
    tensors : mapping of str to Tensor
    metadata : mapping
        JSON-able; must say its "kind".

    Raises
    ------
    RunFailed
        If the file cannot be written.
    """
    header = {"fedattack": json.dumps({"format": FORMAT, **metadata}, sort_keys=True)}
    write_tensors(Path(path), tensors, header)


def load_learned(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_learned` wrote.

    Returns
    -------
    dict of str to Tensor
    dict
        The metadata.

    Raises
    ------
    DataError
        If the file is missing, is not safetensors, holds something else than `kind`, or NaN or infinite values.
    """
    try:
        with safe_open(path, framework="pt") as held:
            header = held.metadata() or {}
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 (not a mapping)
        metadata = json.loads(header.get("fedattack", "null"))
    except FileNotFoundError:
        raise DataError(f"no such file: {str(path)!r}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} is not a readable safetensors file ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or metadata.get("kind") != kind:
        found = metadata.get("kind", "nothing known") if isinstance(metadata, dict) else "nothing known"
        raise DataError(f"{str(path)!r} should hold a {kind} of format {FORMAT}; it holds {found!r}")
    del metadata["format"]
    if not all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
        raise DataError(f"{str(path)!r} holds NaN or infinite values")
    return tensors, metadata


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """Put tensors into a module that was built on the "meta" device, in evaluation mode, its parameters frozen.

    So a file can make nothing larger than itself.

    Raises
    ------
    DataError
        If they do not fit.
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
    """Refuse a learned file that was made for something else.

    Parameters
    ----------
    made_for, wanted : mapping
        From :func:`described`.
    kind : str
    path : str
    round_free : bool
        Leave the share that the round implies out of the comparison.

    Raises
    ------
    NotApplicable
        Naming the first few differences.
    """
    old, new = _flat(made_for), _flat(wanted)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if round_free:
        keys = [key for key in keys if key != "compression.share"]
    if not keys:
        return
    names = [_difference(key, old.get(key), new.get(key)) for key in keys[:4]]
    name = f"{kind} {path!r}" if path else f"this {kind}"
    raise NotApplicable(
        f"{name} was trained for something else: {'; '.join(names)}. Train one for this scenario."
    )


def _difference(key: str, old: Any, new: Any) -> str:
    if key == "weights":
        return f"other broadcast weights (fingerprint {str(old)[:12]}, now {str(new)[:12]})"
    return f"{key} = {old!r}, now {new!r}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_shapes(scenario: Scenario, auxiliary: Auxiliary) -> None:
    """Refuse auxiliary images that are not of the federation's shape.

    Raises
    ------
    DataError
    """
    found = tuple(auxiliary.images.shape[1:])
    if found != scenario.image_shape:
        raise DataError(
            f"auxiliary images of shape {found} do not fit the federation's {scenario.image_shape}"
        )


def descend(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    count: int,
    epochs: int,
    learning_rate: float,
    stream: torch.Generator,
    progress: Progress = no_progress,
    batch: int = 64,
) -> None:
    """Adam over shuffled batches, its rate falling to zero along half a cosine.

    Parameters
    ----------
    parameters : sequence of Tensor
    loss : callable
        Positions (n,) -> scalar.
    count : int
        Training samples.
    epochs : int
    learning_rate : float
        At the start.
    stream : torch.Generator
        Shuffles.
    progress : Progress
    batch : int
        Samples per step.

    Raises
    ------
    RunFailed
        If the loss becomes NaN or infinite.
    """
    batch = min(batch, count)
    steps = epochs * (count // batch)
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    for epoch in range(epochs):
        order = torch.randperm(count, generator=stream)
        # A last short batch would make BatchNorm's statistics noisy.
        for step, chosen in enumerate(order[: count // batch * batch].split(batch)):
            optimiser.zero_grad()
            value = loss(chosen)
            value.backward()
            optimiser.step()
            schedule.step()
            if step % 20 == 0:
                shown = float(value.detach())
                if not math.isfinite(shown):
                    raise RunFailed(f"training diverged: the loss became {shown}; lower the learning rate")
                done = epoch * (count // batch) + step
                progress(done / steps, f"training, epoch {epoch + 1}/{epochs}, loss {shown:.4g}")


def share_of(progress: Progress, low: float, high: float) -> Progress:
    """Report a part's share as one of the whole, from `low` to `high`."""
    return lambda share, text: progress(low + (high - low) * share, text)
