"""Init-Generation: the signal it is fed, what it learns, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from adversaries.inversion.evidence import client as client_module
from adversaries.inversion.evidence.client import ImitatedClient, SignalPairs
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.inversion.evidence.head import RowSignals, find_head
from adversaries.inversion.learning import files, train
from adversaries.inversion.learning import generator as init_generation
from adversaries.inversion.learning.generator import fit_linear, load_generator, train_generator
from fedattack.config import CompressionConfig, DataConfig, ModelConfig, TrainingConfig
from fedattack.data import load_dataset
from fedattack.errors import BadRequest, ConfigError, DataError, NotApplicable
from fedattack.metrics.pixels import psnr
from fedattack.models import build_model, initial_weights, resolve
from fedattack.models.decoders.from_features import Deconv, RidgeConv, build_generator
from fedattack.observation import Auxiliary, Scenario


@pytest.fixture(scope="module")
def digits() -> Tensor:
    dataset = load_dataset(DataConfig(name="digits"), 0)
    return dataset.tensors(np.arange(400))[0]


def make(
    classes: int = 100,
    batch_size: int = 1,
    model: str = "lenet-zhu",
    training: dict | None = None,
    **compression: object,
) -> tuple[Scenario, dict[str, Tensor]]:
    config = resolve(ModelConfig(name=model, classes=classes), 1, 8, 10)
    scenario = Scenario(
        config,
        TrainingConfig(batch_size=batch_size, **(training or {})),
        CompressionConfig(**({"rate": 0.02} | compression)),
    )
    return scenario, initial_weights(config, 3)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    ("classes", "batch_size", "rate"), [(100, 1, 0.02), (1000, 1, 0.001), (100, 4, 0.02)]
)
def test_fast_signals_are_those_of_the_compressed_update(digits, scope, classes, batch_size, rate):
    scenario, weights = make(classes, batch_size, scope=scope, rate=rate)
    client = ImitatedClient(scenario, weights, 0)
    images = digits[:12]
    fast = client_module.simulate_rows(client, images, torch.arange(12), batch_size, seed=5)
    rng = client_module.numpy_rng(5, "learned.batches", 0)
    order = torch.from_numpy(rng.permutation(12))
    assert torch.equal(fast.positions, order)
    for number, chosen in enumerate(order.split(batch_size)):
        labels = client_module.draw_labels(batch_size, classes, rng)
        slow = Evidence(client.observe(images[chosen], labels, number)).rows(labels)
        rows = slice(number * batch_size, (number + 1) * batch_size)
        assert torch.equal(fast.signals.sent[rows], slow.sent)
        torch.testing.assert_close(fast.signals.values[rows], slow.values, rtol=1e-4, atol=1e-5)
        assert slow.sent.any()


def test_signals_are_the_features_where_they_were_sent(digits):
    scenario, weights = make(1000, rate=0.001)
    client = ImitatedClient(scenario, weights, 0)
    label = torch.tensor([7])
    rows = Evidence(client.observe(digits[:1], label, 0)).rows(label)
    module = build_model(scenario.model)
    module.load_state_dict(weights)
    features = module.features(digits[:1]).detach()
    torch.testing.assert_close(rows.values[rows.sent], features[rows.sent], rtol=1e-4, atol=1e-5)
    assert 0 < int(rows.sent.sum()) < rows.sent.numel()
    # Top-k drops the small ones.
    assert float(features[~rows.sent].max()) <= float(features[rows.sent].min())


def test_a_delta_gives_the_same_signal_as_its_gradient(digits):
    label = torch.tensor([7])
    gradient, weights = make()
    delta, _ = make(training={"protocol": "fedavg", "learning_rate": 0.25})
    rows = [
        Evidence(ImitatedClient(scenario, weights, 0).observe(digits[:1], label, 0)).rows(label)
        for scenario in (gradient, delta)
    ]
    assert torch.equal(rows[0].sent, rows[1].sent)
    torch.testing.assert_close(rows[0].values, rows[1].values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("features", [6, 60], ids=["more images than inputs", "fewer"])
def test_linear_map_is_ridge_regression(features):
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.uniform(0.2, 0.8, (90, features))).float()
    sent = torch.from_numpy(rng.uniform(size=(90, features)) < 0.8)
    images = torch.from_numpy(rng.uniform(size=(90, 1, 4, 4))).float()
    signals = RowSignals(values * sent, sent)
    module = RidgeConv(features, (1, 4, 4), "sigmoid", width=4)
    drafts, notes = fit_linear(module, SignalPairs(signals, images, torch.arange(90)), torch.arange(90))
    logits = torch.logit(values.double()).numpy()
    known = sent.numpy()
    centre = logits.mean(0, where=known)
    filled = np.where(known, logits, centre) - centre
    inputs = np.concatenate(
        [filled / np.sqrt((filled**2).sum(0) / known.sum(0)), (known - known.mean(0)) / known.std(0)], 1
    )
    reference = Ridge(alpha=notes["ridge"]).fit(inputs, images.flatten(1).numpy())
    made = module(signals.values, sent).flatten(1).detach().numpy()
    np.testing.assert_allclose(made, reference.predict(inputs), atol=1e-4)
    # A draft comes from the folds that its person is not in.
    folds = np.arange(90) % init_generation.FOLDS
    away = Ridge(alpha=notes["ridge"]).fit(inputs[folds != 2], images.flatten(1).numpy()[folds != 2])
    np.testing.assert_allclose(drafts.flatten(1)[folds == 2], away.predict(inputs[folds == 2]), atol=1e-4)


def test_generator_beats_the_mean_on_held_out_images_and_repeats(digits, tmp_path):
    scenario, weights = make()
    auxiliary = Auxiliary(digits[:160], source="digits", groups=torch.arange(160) // 2)
    told: list[float] = []
    path, again = tmp_path / "a" / "generator.safetensors", tmp_path / "again.safetensors"
    _, result = train_generator(
        scenario, weights, auxiliary, path, 0, epochs=1, progress=lambda share, text: told.append(share)
    )
    train_generator(scenario, weights, auxiliary, again, 0, epochs=1)
    assert path.read_bytes() == again.read_bytes()
    assert result["psnr"]["generator"] > result["psnr"]["mean"] + 5
    assert result["held_out_by"] == "people"
    assert told == sorted(told)
    assert told[-1] == 1.0
    fresh = Auxiliary(digits[300:])
    tested = init_generation.test_generator(path, scenario, weights, fresh, 1)
    assert tested["psnr"]["generator"] > tested["psnr"]["mean"] + 5
    assert tested["psnr"]["generator"] == pytest.approx(np.mean(tested["per_image"]))


def test_start_reads_the_update_and_nothing_else(digits):
    scenario, weights = make()
    generator, _ = train_generator(scenario, weights, Auxiliary(digits[:200]), None, 0, epochs=0, passes=1)
    client = ImitatedClient(scenario, weights, 9)
    label = torch.tensor([42])
    seen = client.observe(digits[300:301], label, 0)
    made = generator.start(seen, label)
    assert made.shape == (1, 1, 8, 8)
    assert made.min() >= 0
    assert made.max() <= 1
    silent = dataclasses.replace(
        seen.update, values=torch.empty(0), indices=torch.empty(0, dtype=torch.int64)
    )
    blind = generator.start(dataclasses.replace(seen, update=silent), label)
    truth = digits[300:301]
    assert float(psnr(made, truth)) > float(psnr(blind, truth)) + 3


def test_each_image_of_a_batch_gets_its_own_row(digits):
    scenario, weights = make(1000, batch_size=4, rate=0.02)
    generator, result = train_generator(
        scenario, weights, Auxiliary(digits[:200]), None, 0, epochs=0, passes=1
    )
    assert result["psnr"]["generator"] > result["psnr"]["mean"] + 5
    labels = torch.tensor([5, 900, 17, 300])
    seen = ImitatedClient(scenario, weights, 9).observe(digits[300:304], labels, 0)
    made, turned = generator.start(seen, labels), generator.start(seen, labels.flip(0))
    torch.testing.assert_close(made.flip(0), turned, atol=1e-5, rtol=0)
    scores = torch.stack([psnr(made, digits[300 + i : 301 + i].expand(4, -1, -1, -1)) for i in range(4)])
    assert torch.equal(scores.argmax(1), torch.arange(4))


def test_a_generator_is_trained_on_the_spot_where_images_were_granted(digits):
    scenario, weights = make()
    label = torch.tensor([42])
    seen = ImitatedClient(scenario, weights, 9).observe(digits[300:301], label, 0)
    with pytest.raises(NotApplicable, match="needs auxiliary images"):
        init_generation.obtain_generator("train", seen, 0)
    granted = dataclasses.replace(seen, auxiliary=Auxiliary(digits[:80]))
    made = init_generation.obtain_generator("train", granted, 0).start(seen, label)
    again = init_generation.obtain_generator("train", granted, 0).start(seen, label)
    assert torch.equal(made, again)
    assert float(psnr(made, digits[300:301])) > float(psnr(digits[:80].mean(0, True), digits[300:301])) + 3


@pytest.mark.parametrize(
    ("training", "compression", "gain"),
    [
        ({}, {"name": "qsgd"}, 3),
        ({}, {"name": "randomk", "rate": 0.7}, 0.3),
        ({"protocol": "fedavg", "local_steps": 3, "learning_rate": 0.05}, {}, 3),
    ],
    ids=["qsgd", "randomk", "local steps"],
)
def test_it_learns_through_any_client(digits, training, compression, gain):
    scenario, weights = make(10, training=training, **compression)
    _, result = train_generator(scenario, weights, Auxiliary(digits[:150]), None, 0, epochs=0, passes=1)
    assert result["psnr"]["generator"] > result["psnr"]["mean"] + gain


def test_relu_network_with_a_pooled_head():
    config = resolve(ModelConfig(name="resnet18", classes=10), 1, 8, 10)
    scenario = Scenario(config, TrainingConfig(batch_size=2), CompressionConfig(rate=0.01, scope="layer"))
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator, result = train_generator(
        scenario, initial_weights(config, 0), Auxiliary(images), None, 0, epochs=1, passes=1, held_out=0.34
    )
    assert result["features"] == 512
    assert generator.module.training is False


def test_published_stack_has_the_published_shape():
    module = build_generator("deconv", 768, (3, 32, 32), "sigmoid")
    shapes = [tuple(p.shape) for name, p in module.named_parameters() if p.ndim == 4]
    assert shapes == [(768, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    assert isinstance(module, Deconv)
    small = build_generator("deconv", 48, (1, 28, 28), "relu", width=16).eval()
    assert small(torch.zeros(2, 48), torch.zeros(2, 48, dtype=torch.bool)).shape == (2, 1, 28, 28)
    with pytest.raises(ConfigError, match="ridge-conv"):
        build_generator("ridge-convv", 768, (3, 32, 32), "sigmoid")


def test_deconv_learns(digits):
    scenario, weights = make()
    auxiliary = Auxiliary(digits[:200])
    _, result = train_generator(
        scenario, weights, auxiliary, None, 0, "deconv", epochs=15, passes=1, width=32
    )
    assert result["psnr"]["generator"] > result["psnr"]["mean"] + 2


def test_other_scenarios_and_weights_are_refused(digits, tmp_path):
    scenario, weights = make()
    path = tmp_path / "generator.safetensors"
    train_generator(scenario, weights, Auxiliary(digits[:60]), path, 0, epochs=0, passes=1)
    generator = load_generator(path, scenario)
    label = torch.tensor([1])
    with pytest.raises(NotApplicable, match=r"compression\.rate = 0\.02, now 0\.01"):
        load_generator(path, make(rate=0.01)[0])
    with pytest.raises(NotApplicable, match=r"compression\.scope"):
        load_generator(path, make(scope="layer")[0])
    with pytest.raises(NotApplicable, match=r"model\.classes"):
        load_generator(path, make(classes=50)[0])
    other = initial_weights(scenario.model, 4)
    with pytest.raises(NotApplicable, match="other broadcast weights"):
        generator.start(ImitatedClient(scenario, other, 0).observe(digits[:1], label, 0), label)
    with pytest.raises(NotApplicable, match="batch_size = 1, now 2"):
        generator.start(
            ImitatedClient(scenario, weights, 0).observe(digits[:2], torch.tensor([1, 2]), 0), label
        )
    with pytest.raises(NotApplicable, match="round 2 with error feedback"):
        ImitatedClient(make(error_feedback=True)[0], weights, 0, round=2)
    with pytest.raises(DataError, match="outside the head"):
        generator.start(
            ImitatedClient(scenario, weights, 0).observe(digits[:1], label, 0), torch.tensor([100])
        )


def test_bad_files_and_data_are_refused(digits, tmp_path):
    scenario, weights = make()
    with pytest.raises(DataError, match="no such file"):
        load_generator(tmp_path / "none.safetensors", scenario)
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x04junk" * 10)
    with pytest.raises(DataError, match="not a readable safetensors"):
        load_generator(tmp_path / "junk.safetensors", scenario)
    files.save_learned(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"kind": "denoiser"})
    with pytest.raises(DataError, match="should hold a generator"):
        load_generator(tmp_path / "other.safetensors", scenario)
    files.save_learned(tmp_path / "nan.safetensors", {"a": torch.tensor(np.nan)}, {"kind": "generator"})
    with pytest.raises(DataError, match="NaN"):
        load_generator(tmp_path / "nan.safetensors", scenario)
    train_generator(scenario, weights, Auxiliary(digits[:40]), tmp_path / "good", 0, epochs=0, passes=1)
    tensors, metadata = files.load_learned(tmp_path / "good", "generator")
    for change, message in (
        ({"architecture": "os:system"}, "'architecture' = 'os:system' names code that is not registered"),
        ({"features": 10**9}, "do not fit the architecture"),
        ({"features": "many"}, "malformed"),
        ({"width": 97}, "do not fit the architecture"),
    ):
        files.save_learned(tmp_path / "bent", tensors, metadata | change)
        with pytest.raises(BadRequest, match=message):
            load_generator(tmp_path / "bent", scenario)
    with pytest.raises(ConfigError, match="did you mean 'deconv'"):
        train_generator(scenario, weights, Auxiliary(digits), None, 0, "deconf")
    with pytest.raises(DataError, match="do not fit the federation"):
        train_generator(scenario, weights, Auxiliary(torch.rand(20, 3, 8, 8)), None, 0)
    with pytest.raises(DataError, match=r"training\.batch_size"):
        train_generator(make(batch_size=0)[0], weights, Auxiliary(digits), None, 0)
    with pytest.raises(DataError, match="cannot be cut"):
        train_generator(scenario, weights, Auxiliary(digits[:2]), None, 0)
    with pytest.raises(NotApplicable, match="no linear layer"):
        find_head(torch.nn.Conv2d(1, 1, 1))


def test_people_are_held_out_whole():
    groups = torch.arange(100) // 7
    auxiliary = Auxiliary(torch.zeros(100, 1, 4, 4), groups=groups)
    seen, unseen = train.hold_out(auxiliary, 0.2, 0)
    assert not set(groups[seen].tolist()) & set(groups[unseen].tolist())
    assert len(seen) + len(unseen) == 100
    assert groups[unseen].unique().numel() == 3
