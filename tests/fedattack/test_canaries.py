"""Canaries: who they are, what they put in the place of a contribution, and how it is found again."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedattack.audit.canaries import CanaryScores, audit_canaries
from fedattack.audit.family import headline
from fedattack.canaries import Canaries, choose_canaries, release_weights
from fedattack.config import Config, ModelConfig, TrainingConfig
from fedattack.defenses import ClientDefenses
from fedattack.defenses.accounting import Privacy, gaussian_epsilon
from fedattack.defenses.clip_noise import ClipNoise
from fedattack.errors import ConfigError, RunFailed
from fedattack.metrics.canaries import gaussian_estimate, shift_epsilon
from fedattack.models import build_model, initial_weights
from fedattack.observation import Update
from fedattack.rng import numpy_rng
from fedattack.training import batch_gradient, load_weights, local_update

SIZES = [7, 0, 12, 5]
PER_SAMPLE = {"defense": "clip-noise", "defense.unit": "sample"}


def chosen(count: int = 10, **settings: Any) -> Canaries:
    found = choose_canaries(Config.from_mapping({"canaries": count, **PER_SAMPLE, **settings}), SIZES, 10)
    assert found is not None
    return found


def test_who_they_are_follows_from_the_seed_alone() -> None:
    one, same, other = chosen(), chosen(), chosen(seed=1)
    assert np.array_equal(one.position, same.position)
    assert np.array_equal(one.present, same.present)
    assert not np.array_equal(one.position, other.position)
    everyone = chosen(24)
    assert sorted(zip(everyone.client, everyone.position, strict=True)) == [
        (client, position) for client, size in enumerate(SIZES) for position in range(size)
    ]
    assert [len(everyone.of(client)) for client in range(5)] == [*SIZES, 0]
    many = choose_canaries(Config.from_mapping({"canaries": 4000, **PER_SAMPLE}), [5000], 10)
    assert many is not None
    assert many.present.mean() == pytest.approx(0.5, abs=0.03)
    assert choose_canaries(Config(), SIZES, 10) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"defense": ""}, "add it to 'defense.names'"),
        ({"defense.noise": 0}, "'defense.clip-noise.noise' = 0 promises nothing"),
        ({"defense.clip_norm": ""}, "'defense.clip-noise.clip_norm' = None promises nothing"),
        ({"canaries.kind": "client"}, "accepted: 'gradient' or 'mislabelled'"),
        ({"defense.unit": "update", "canaries.kind": "mislabelled"}, "accepted: 'client'"),
        ({"canaries": 25}, "accepted: 2 to 24, the number of samples"),
        ({"canaries": 1}, "accepted: 2 to 24"),
        ({"defense.unit": "update", "canaries": 5}, "accepted: 2 to 4, the number of clients"),
    ],
)
def test_what_measures_nothing_is_refused(settings: dict[str, Any], words: str) -> None:
    given = {"canaries": 10, **PER_SAMPLE, **settings}
    given = {name: value for name, value in given.items() if given["defense"] or name != "defense.unit"}
    with pytest.raises(ConfigError, match=words):
        choose_canaries(Config.from_mapping(given), SIZES, 10)


MODEL = ModelConfig(name="tiny-cnn", classes=10, channels=1, image_size=8, activation="relu")


def network() -> nn.Module:
    module = build_model(MODEL)
    load_weights(module, initial_weights(MODEL, 0))
    return module.train()


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class Apart:
    """A classifier's step that takes samples apart."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Any:
        return batch_gradient(model, images, labels)

    def per_sample(self, model: nn.Module, images: Tensor, labels: Tensor) -> Any:
        each = [
            batch_gradient(model, image, label)
            for image, label in zip(images.split(1), labels.split(1), strict=True)
        ]
        losses, gradients = zip(*each, strict=True)
        return torch.stack(losses), tuple(torch.stack(parts) for parts in zip(*gradients, strict=True))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", ["gradient", "mislabelled"])
def test_a_step_holds_their_contributions_and_everybody_elses(kind: str, apart: bool) -> None:
    bound = 0.3
    canaries = chosen(12, **{"canaries.kind": kind, "defense.clip_norm": bound})
    client = 2
    own = canaries.of(client)
    assert 0 < canaries.present[own].sum() < len(own) < SIZES[client]
    positions = np.array([11, 3, 0, 7, 8, 1, 2, 10, 9, 4, 5, 6])
    images, labels = (
        torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(12) % 10,
    )
    model = network()
    defence = ClipNoise(clip_norm=bound, noise=0.0, unit="sample")
    plain = Apart() if apart else batch_gradient
    step = ClientDefenses([defence], 0, 1, client, plain, canaries.step).gradient
    loss, mean = step(model, images, canaries.coded(client, positions, labels))
    wanted, numel = torch.zeros(sum(p.numel() for p in model.parameters())), flat(model.parameters()).numel()
    for place, position in enumerate(positions):
        number = own[canaries.position[own] == position]
        label = labels[place : place + 1]
        if len(number) and not canaries.present[number[0]]:
            continue
        if len(number) and kind == "gradient":
            drawn = numpy_rng(0, "canary direction", int(number[0])).standard_normal(numel, np.float32)
            wanted += torch.from_numpy(bound * drawn / np.linalg.norm(drawn))
            continue
        if len(number):
            label = torch.tensor([canaries.wrong_label(int(number[0]), int(label))])
            assert int(label) != int(labels[place])
        gradient = flat(batch_gradient(model, images[place : place + 1], label)[1])
        wanted += gradient * min(1.0, bound / float(gradient.norm()))
    torch.testing.assert_close(flat(mean), wanted / 12, rtol=1e-4, atol=1e-6)
    assert float(loss) == pytest.approx(float(batch_gradient(model, images, labels)[0].detach()), rel=1e-5)
    with pytest.raises(RunFailed, match="one by one"):
        canaries.step(batch_gradient)(model, images, canaries.coded(client, positions, labels))


def test_a_canary_client_sends_its_direction_or_zeros() -> None:
    canaries = chosen(4, **{"defense.unit": "update", "defense.clip_norm": 2.0})
    assert {bool(there) for there in canaries.present} == {True, False}
    update = {"a": torch.ones(3, 5), "b": torch.ones(4)}
    for client, there in zip(canaries.client, canaries.present, strict=True):
        sent = canaries.update(int(client), update)
        assert [part.shape for part in sent.values()] == [(3, 5), (4,)]
        assert float(flat(sent.values()).norm()) == pytest.approx(2.0 if there else 0.0)
    assert chosen(4).update(0, update) is update
    assert canaries.replaced(2, 12).tolist() == list(range(12))


@pytest.mark.parametrize(
    "settings", [{"protocol": "fedsgd"}, {"momentum": 0.0}, {"momentum": 0.8, "weight_decay": 0.3}]
)
def test_the_weight_of_a_step_is_its_part_in_the_update(settings: dict[str, Any]) -> None:
    """Each step's gradient is moved by one unit in turn; what the update moves by is the weight times the batch."""
    given = {"protocol": "fedavg", "learning_rate": 0.1, **settings}
    steps = 1 if given["protocol"] == "fedsgd" else 4
    training, sizes = TrainingConfig(**given, local_steps=steps), [4, 4, 2, 4][:steps]
    model = nn.Linear(2, 2)
    start = {name: part.detach().clone() for name, part in model.named_parameters()}
    images, labels = torch.rand(4, 2), torch.zeros(4, dtype=torch.long)

    def moved(raised: int | None) -> Tensor:
        count = itertools.count()

        def step(net: nn.Module, _: Tensor, __: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            size = float(next(count) == raised)
            return torch.zeros(()), tuple(torch.full_like(p, size) for p in net.parameters())

        batches = [np.arange(size) for size in sizes]
        return flat(local_update(model, start, images, labels, batches, training, step).update.values())

    found = [float((moved(number) - moved(None)).mean()) / size for number, size in enumerate(sizes)]
    np.testing.assert_allclose(release_weights(training, sizes), found, rtol=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_scores_are_projections_on_what_was_sent(sparse: bool) -> None:
    rng, numel, count = np.random.default_rng(0), 60, 5
    held = rng.standard_normal((count, numel)).astype(np.float32)
    there, weight, known = (
        np.array([1, 0, 1, 1, 0]),
        np.array([1.0, 2.0, 0.5, 1.0, 1.0]),
        rng.standard_normal(numel),
    )
    values = (there * weight) @ held + known
    kept = np.sort(rng.choice(numel, 25, replace=False)) if sparse else np.arange(numel)
    sent = torch.from_numpy(values[kept].astype(np.float32))
    indices = torch.from_numpy(kept) if sparse else None
    found = CanaryScores(count)
    update = Update(("a",), ((numel,),), indices, sent)
    variance = 4.0
    for _ in range(2):
        found.add(update, np.arange(count), weight, variance, lambda i: held[i], known.astype(np.float32))
    part = held[:, kept].astype(float)
    for i in range(count):
        rest = sum(0.5 * weight[j] * part[j] for j in range(count) if j != i)
        score = 2 * weight[i] * part[i] @ (values[kept] - known[kept] - rest) / variance
        assert found.scores[i] == pytest.approx(score, rel=1e-4)
        assert found.inclusions[i] == pytest.approx(
            2 * weight[i] ** 2 * part[i] @ part[i] / variance, rel=1e-5
        )


def audited(mu: float, promised: float, count: int = 2000) -> Any:
    canaries = choose_canaries(
        Config.from_mapping({"canaries": count, **PER_SAMPLE, "defense.noise": promised}), [count], 10
    )
    assert canaries is not None
    found = CanaryScores(count)
    drawn = np.random.default_rng(4).standard_normal(count)
    found.scores, found.inclusions = canaries.present + drawn / mu, np.ones(count)
    account = Privacy(gaussian_epsilon(promised, 1, 1e-5), 1e-5, "sample", 1)
    return audit_canaries(canaries, found, account, 0, 0.1)


def test_only_a_bound_breaks_a_guarantee() -> None:
    kept = audited(1.0, 1.0)
    assert not kept.broken
    assert kept.headline == ""
    assert kept.gaussian_bound < kept.account.epsilon == pytest.approx(4.377, abs=1e-3)
    assert kept.view == pytest.approx(kept.account.epsilon)
    assert kept.estimate.low < kept.account.epsilon < kept.estimate.high
    assert "accounted 4.38 at delta 1e-05 for one sample there or zero (zero-out)" in kept.text
    broken = audited(2.0, 1.0)
    assert broken.broken
    assert broken.text.startswith("BROKEN GUARANTEE")
    assert f"{broken.least:.2f} or more, where 4.38 is accounted" in broken.headline
    few = audited(1.6, 1.0, 60)  # the estimate lies above, the bounds cannot
    assert few.estimate.epsilon > few.account.epsilon > few.gaussian_ceiling
    assert not few.broken
    assert any("breaks no guarantee" in remark for remark in few.remarks)
    assert any("could not show a broken guarantee" in remark for remark in few.remarks)


def test_a_broken_guarantee_stands_above_every_attack() -> None:
    broken, kept = audited(2.0, 1.0), audited(1.0, 1.0)
    assert headline([], {"canaries": kept.record()}) is None
    top = headline([], {"canaries": broken.record()})
    assert top is not None
    assert (top["level"], top["text"]) == ("leak", broken.headline)


def test_canaries_in_no_update_do_not_count() -> None:
    canaries, account = chosen(), Privacy(1.0, 1e-5, "sample", 1)
    assert audit_canaries(canaries, CanaryScores(10), account, 0, 0.1) is None
    found = CanaryScores(10)
    found.inclusions[:6] = 1.0
    found.scores[:6] = canaries.present[:6]
    audit = audit_canaries(canaries, found, account, 0, 0.1)
    assert audit is not None
    assert (audit.count, audit.planted, audit.guesses) == (6, 10, 2)
    assert "4 canaries were in no update" in audit.remarks


def test_how_far_normal_scores_lie_apart_is_a_bound() -> None:
    """Hardly ever above what is accounted under the agreed noise; under half of it, where guesses cannot be, so."""
    halved = audited(4.0, 0.5, 2000)
    assert halved.gaussian_ceiling < halved.account.epsilon
    assert halved.broken
    assert halved.normal_bound == pytest.approx(
        shift_epsilon(4 - 3.09 * halved.estimate.error, 1e-5), rel=0.01
    )
    rng, above = np.random.default_rng(8), 0
    for _ in range(1000):
        present = rng.random(60) < 0.5
        found = gaussian_estimate(present + rng.standard_normal(60) / 2, present, np.ones(60), 1e-5)
        assert found is not None
        above += found.least > shift_epsilon(2.0, 1e-5)
    assert above <= 5  # 1 is expected; more than 5 would come once in a thousand times
