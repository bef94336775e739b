"""Compressors against independent references: argsort, literal loops from the papers, statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedattack.compression import (
    COMPRESSORS,
    Dense,
    Memory,
    Quantised,
    QuantisedSparse,
    Signs,
    Sparse,
    build_compressor,
    kept_share,
)
from fedattack.compression.selection import largest, quotas
from fedattack.config import CompressionConfig
from fedattack.errors import ConfigError, RunFailed

SHAPES = {"conv": (4, 3, 5, 5), "bias": (4,), "head": (30, 21), "scalar": ()}
NAMES, DIMS = list(SHAPES), list(SHAPES.values())
SIZES = [300, 4, 630, 1]
NUMEL = sum(SIZES)


def make(name: str, **settings):
    return build_compressor(CompressionConfig(name=name, **settings), NAMES, DIMS)


def draw(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) ** 3 for name, shape in SHAPES.items()}


def flat(update: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([update[name].reshape(-1) for name in NAMES]).numpy()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_argsort(values: np.ndarray, count: int) -> np.ndarray:
    """Stable sort on descending magnitude: ties go to the lowest position."""
    return np.sort(np.argsort(-np.abs(values), kind="stable")[:count])


@pytest.mark.parametrize("rate", [1e-9, 0.001, 0.01, 0.37, 1.0])
def test_topk_global_is_argsort(rate):
    update = draw(1)
    packet, memory = make("topk", rate=rate).compress(update, Memory(), 1, rng())
    expected = by_argsort(flat(update), max(1, round(NUMEL * rate)))
    np.testing.assert_array_equal(packet.indices, expected)
    np.testing.assert_array_equal(packet.values, flat(update)[expected])
    assert memory.tensors == {}


@pytest.mark.parametrize("rate", [0.001, 0.1])
def test_topk_per_layer_is_argsort_in_each(rate):
    update = draw(2)
    packet, _ = make("topk", rate=rate, scope="layer").compress(update, Memory(), 1, rng())
    expected, start = [], 0
    for name, size in zip(NAMES, SIZES, strict=True):
        values = update[name].reshape(-1).numpy()
        expected.append(start + by_argsort(values, max(1, round(size * rate))))
        start += size
    np.testing.assert_array_equal(packet.indices, np.concatenate(expected))


@pytest.mark.parametrize("count", [1, 7, 300, 999, 1000])
def test_ties_go_to_the_lowest_positions(count):
    values = np.random.default_rng(count).integers(0, 5, 1000).astype(np.float32)
    np.testing.assert_array_equal(largest(values, count), by_argsort(values, count))


def _tall(kind: str) -> np.ndarray:
    generator = np.random.default_rng(5)
    values = generator.random(400_000, np.float32)
    if kind == "many ties":
        return np.round(values, 3)
    if kind == "sparse":
        values[generator.random(values.size) > 0.001] = 0
    if kind == "hidden from the sample":  # the strided sample sees small entries only: the bar is too low
        values[np.arange(values.size) % 7 == 0] *= 1e-3
    if kind == "only in the sample":  # the sample sees large entries only: the bar is too high
        values[np.arange(values.size) % 7 != 0] *= 1e-3
    return values


@pytest.mark.parametrize(
    "kind", ["uniform", "many ties", "sparse", "hidden from the sample", "only in the sample"]
)
@pytest.mark.parametrize("count", [2_000, 40_000])
def test_sampling_never_changes_the_largest(kind, count):
    values = _tall(kind)
    np.testing.assert_array_equal(largest(values, count), by_argsort(values, count))


def test_quotas_of_the_published_lenet():
    sizes = [900, 12, 3600, 12, 3600, 12, 10_177 * 768, 10_177]
    assert sum(sizes) == 7_834_249
    assert [q.kept for q in quotas(CompressionConfig(rate=0.001), sizes, 1)] == [7_834]
    layered = quotas(CompressionConfig(rate=0.001, scope="layer"), sizes, 1)
    assert [q.kept for q in layered] == [1, 1, 4, 1, 4, 1, 7_816, 10]
    assert [q.start for q in layered] == [0, *np.cumsum(sizes)[:-1]]


def test_randomk_draws_uniformly_and_by_the_clients_generator():
    compressor = make("randomk", rate=0.1)
    update, generator = draw(3), rng(7)
    hits = np.zeros(NUMEL)
    rounds = 2_000
    for number in range(rounds):
        packet, _ = compressor.compress(update, Memory(), number + 1, generator)
        np.testing.assert_array_equal(packet.values, flat(update)[packet.indices])
        assert (np.diff(packet.indices) > 0).all()
        hits[packet.indices] += 1
    share = round(NUMEL * 0.1) / NUMEL
    z = (hits - rounds * share) / np.sqrt(rounds * share * (1 - share))
    assert abs(z).max() < 5
    assert np.square(z).mean() == pytest.approx(1, abs=0.2)
    again, _ = compressor.compress(update, Memory(), 1, rng(7))
    first, _ = compressor.compress(update, Memory(), 1, rng(7))
    other, _ = compressor.compress(update, Memory(), 1, rng(8))
    np.testing.assert_array_equal(first.indices, again.indices)
    assert not np.array_equal(first.indices, other.indices)


def test_randomk_per_layer_fills_each_quota():
    compressor = make("randomk", rate=0.1, scope="layer")
    packet, _ = compressor.compress(draw(3), Memory(), 1, rng())
    counts = [
        np.count_nonzero((packet.indices >= a) & (packet.indices < b)) for a, b, _ in compressor.quotas(1)
    ]
    assert counts == [30, 1, 63, 1]


def test_sign_is_scaled_by_each_tensors_mean_magnitude():
    update = draw(4)
    update["bias"] = torch.tensor([0.0, -1.0, 0.0, 3.0])
    packet, _ = make("sign").compress(update, Memory(), 1, rng())
    dense = np.split(packet.dense(SIZES), np.cumsum(SIZES)[:-1])
    for name, part in zip(NAMES, dense, strict=True):
        values = update[name].reshape(-1).numpy()
        scale = np.float32(np.abs(values.astype(np.float64)).mean())
        np.testing.assert_array_equal(part, np.where(values >= 0, scale, -scale))


@pytest.mark.parametrize(("norm", "levels"), [("max", 127), ("max", 4), ("l2", 16), ("l2", 1)])
def test_qsgd_is_unbiased_and_in_range(norm, levels):
    update, generator = draw(5), rng(1)
    compressor = make("qsgd", norm=norm, levels=levels)
    parts = np.split(flat(update).astype(np.float64), np.cumsum(SIZES)[:-1])
    order = np.inf if norm == "max" else 2
    scale = np.repeat([np.linalg.norm(part, order) for part in parts], SIZES)
    step = scale / levels
    exact = flat(update).astype(np.float64)
    repeats, total = 1_500, np.zeros(NUMEL)
    for _ in range(repeats):
        packet, _ = compressor.compress(update, Memory(), 1, generator)
        assert isinstance(packet, Quantised)
        assert abs(packet.steps.astype(int)).max() <= levels
        got = packet.dense(SIZES)
        assert (abs(got - exact) <= step * (1 + 1e-5)).all()
        total += got
    lower = np.floor(abs(exact) / step)
    chance = abs(exact) / step - lower
    deviation = step * np.sqrt(chance * (1 - chance) / repeats)
    noisy = chance * (1 - chance) * repeats > 20  # where the normal approximation holds
    z = (total / repeats - exact)[noisy] / deviation[noisy]
    assert noisy.sum() > 20
    assert abs(z).max() < 5
    assert abs(z.mean()) < 4 / np.sqrt(z.size)


def test_qsgd_of_zeros_and_of_a_lone_entry():
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    packet, _ = make("qsgd", norm="l2").compress(zeros, Memory(), 1, rng())
    assert not packet.dense(SIZES).any()
    zeros["head"][3, 4] = -0.1
    packet, _ = make("qsgd", norm="l2").compress(zeros, Memory(), 1, rng())
    assert packet.dense(SIZES)[300 + 4 + 3 * 21 + 4] == np.float32(-0.1)
    assert np.count_nonzero(packet.steps) == 1


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_quantised_topk_rounds_the_values_of_topk(scope):
    update = draw(5)
    kept, _ = make("topk", rate=0.05, scope=scope).compress(update, Memory(), 1, rng())
    rounded, _ = make("topk-qsgd", rate=0.05, scope=scope).compress(update, Memory(), 1, rng())
    np.testing.assert_array_equal(rounded.indices, kept.indices)
    sparse = rounded.sparse(SIZES)
    for low, high in np.searchsorted(kept.indices, np.cumsum([0, *SIZES])).repeat(2)[1:-1].reshape(-1, 2):
        if high > low:
            scale = np.abs(kept.values[low:high]).max()
            error = np.abs(sparse.values[low:high] - kept.values[low:high])
            assert error.max() <= scale / 127 * (1 + 1e-5)
    assert np.abs(sparse.values - kept.values).max() > 0


@pytest.mark.parametrize("name", ["topk", "randomk", "sign", "qsgd", "topk-qsgd"])
def test_error_feedback_loses_nothing(name):
    """What was sent plus what is left is the sum of all updates."""
    compressor = make(name, rate=0.05, levels=15, error_feedback=True)
    memory, generator = Memory(), rng(2)
    given, sent = np.zeros(NUMEL), np.zeros(NUMEL)
    for number in range(1, 13):
        update = draw(number)
        before = {role: tensor.clone() for role, tensor in memory.tensors.items()}
        packet, following = compressor.compress(update, memory, number, generator)
        assert all(torch.equal(memory.tensors[role], tensor) for role, tensor in before.items())
        memory = following
        given += flat(update)
        sent += packet.dense(SIZES)
        np.testing.assert_allclose(sent + memory.tensors["residual"].numpy(), given, atol=2e-4, rtol=0)
    assert np.abs(given - sent).max() > 0.1  # the residual is really in use


def test_error_feedback_topk_zeroes_what_was_sent_exactly():
    compressor = make("topk", rate=0.05, error_feedback=True)
    packet, memory = compressor.compress(draw(1), Memory(), 1, rng())
    residual = memory.tensors["residual"].numpy()
    assert not residual[packet.indices].any()
    rest = np.setdiff1d(np.arange(NUMEL), packet.indices)
    np.testing.assert_array_equal(residual[rest], flat(draw(1))[rest])
    second, _ = compressor.compress(draw(2), memory, 2, rng())
    np.testing.assert_array_equal(second.indices, by_argsort(residual + flat(draw(2)), round(NUMEL * 0.05)))


def dgc_literal(gradients, momentum, clip, rate, scope):
    """Algorithm 4 of Lin et al. (2018), one node, entry by entry as printed."""
    u = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
    v = [torch.zeros(size, dtype=torch.float64) for size in SIZES]
    for gradient in gradients:
        parts = [gradient[name].reshape(-1).double() for name in NAMES]
        norm = torch.cat(parts).norm()
        if norm > clip:
            parts = [part * (clip / norm) for part in parts]
        for layer, part in enumerate(parts):
            u[layer] = momentum * u[layer] + part
            v[layer] = v[layer] + u[layer]
        if scope == "global":
            keep = torch.zeros(NUMEL, dtype=torch.bool)
            keep[torch.cat(v).abs().topk(max(1, round(NUMEL * rate))).indices] = True
            masks = keep.split(SIZES)
        else:
            masks = []
            for part in v:
                mask = torch.zeros(part.numel(), dtype=torch.bool)
                mask[part.abs().topk(max(1, round(part.numel() * rate))).indices] = True
                masks.append(mask)
        sent = [part * mask for part, mask in zip(v, masks, strict=True)]
        v = [part * ~mask for part, mask in zip(v, masks, strict=True)]
        u = [part * ~mask for part, mask in zip(u, masks, strict=True)]
        yield torch.cat(sent).numpy(), torch.cat(u).numpy(), torch.cat(v).numpy()


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_dgc_is_the_papers_loop(scope, momentum):
    gradients = [draw(seed, scale=0.5 + seed % 3) for seed in range(10)]
    norms = [np.linalg.norm(flat(g)) for g in gradients]
    clip = float(np.median(norms))  # some are clipped, some are not
    compressor = make("dgc", rate=0.03, scope=scope, momentum=momentum, clip_norm=clip)
    assert compressor.stateful
    memory = Memory()
    expected = dgc_literal(gradients, momentum, clip, 0.03, scope)
    for number, (gradient, (sent, u, v)) in enumerate(zip(gradients, expected, strict=True), 1):
        packet, memory = compressor.compress(gradient, memory, number, rng())
        np.testing.assert_array_equal(np.flatnonzero(sent), packet.indices)
        np.testing.assert_allclose(packet.dense(SIZES), sent, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(memory.tensors["momentum"].numpy(), u, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(memory.tensors["residual"].numpy(), v, rtol=1e-4, atol=1e-5)


def test_dgc_warm_up_is_the_papers_schedule():
    config = CompressionConfig(name="dgc", rate=0.001, warmup_rounds=4)
    shares = [kept_share(config, number) for number in range(1, 8)]
    # section 3.3: sparsity 75 %, 93.75 %, 98.4375 %, 99.6 %, 99.9 %
    np.testing.assert_allclose(shares[:5], [0.25, 0.0625, 0.015625, 0.004, 0.001], rtol=0.02)
    assert shares[4:] == [0.001] * 3
    assert kept_share(config.model_copy(update={"rate": 0.5}), 1) == 0.5
    assert kept_share(config.model_copy(update={"name": "topk"}), 1) == 0.001
    compressor = make("dgc", rate=0.01, warmup_rounds=2)
    kept = [compressor.compress(draw(0), Memory(), number, rng())[0].indices.size for number in (1, 2, 3, 4)]
    assert kept == [round(NUMEL * share) for share in (0.25, 0.05, 0.01, 0.01)]


def test_none_sends_everything_and_remembers_nothing():
    compressor = make("none", error_feedback=True)
    packet, memory = compressor.compress(draw(1), Memory(), 1, rng())
    assert isinstance(packet, Dense)
    assert not compressor.stateful
    assert memory.tensors == {}
    np.testing.assert_array_equal(packet.dense(SIZES), flat(draw(1)))


@pytest.mark.parametrize("name", ["none", "topk", "randomk", "sign", "qsgd", "topk-qsgd", "dgc"])
def test_same_bits_with_one_and_two_threads(name):
    shapes = [(300_001,), (17, 1000)]
    config = CompressionConfig(
        name=name, error_feedback=True, rate=0.01, norm="l2", clip_norm=1.0 if name == "dgc" else None
    )
    compressor = build_compressor(config, ["a", "b"], shapes)
    update = {"a": torch.randn(shapes[0], generator=rng(1)), "b": torch.randn(shapes[1], generator=rng(2))}
    update["a"][:1000] = 3.5  # ties across the threshold
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            generator = rng(3)
            memory = Memory()
            for number in (1, 2):
                packet, memory = compressor.compress(update, memory, number, generator)
            results.append((packet, memory))
    finally:
        torch.set_num_threads(threads)
    (one, first), (two, second) = results
    assert one.dense(compressor.sizes).tobytes() == two.dense(compressor.sizes).tobytes()
    for role in first.tensors:
        assert first.tensors[role].numpy().tobytes() == second.tensors[role].numpy().tobytes()


def test_every_registered_compressor_says_its_codec():
    forms = {
        "dense": Dense,
        "sparse": Sparse,
        "signs": Signs,
        "quantised": Quantised,
        "quantised-sparse": QuantisedSparse,
    }
    for name in COMPRESSORS.names():
        packet, _ = make(name).compress(draw(0), Memory(), 1, rng())
        assert isinstance(packet, forms[COMPRESSORS.get(name).codec])
        assert packet.numel == NUMEL
        assert COMPRESSORS.summary(name)


def test_errors_say_what_is_wrong():
    with pytest.raises(ConfigError, match="did you mean 'topk'"):
        make("topkk")
    compressor = make("topk", error_feedback=True)
    update = draw(0)
    with pytest.raises(RunFailed, match=r"'head' should be \(30, 21\), got nothing"):
        compressor.compress({k: v for k, v in update.items() if k != "head"}, Memory(), 1, rng())
    with pytest.raises(RunFailed, match="model has not: \\['extra'\\]"):
        compressor.compress({**update, "extra": torch.zeros(1)}, Memory(), 1, rng())
    with pytest.raises(RunFailed, match="'bias' should be"):
        compressor.compress({**update, "bias": torch.zeros(5)}, Memory(), 1, rng())
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(RunFailed, match="NaN or infinite values in bias"):
            compressor.compress({**update, "bias": torch.tensor([0, bad, 0, 1])}, Memory(), 1, rng())
    with pytest.raises(RunFailed, match="client memory 'residual'"):
        compressor.compress(update, Memory({"residual": torch.zeros(3)}), 1, rng())
