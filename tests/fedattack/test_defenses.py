"""Defences: what each hook does to what is sent, what it leaves alone, and what it promises."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import comb
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from adversaries.base import Progress, no_progress
from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.config import CompressionConfig, Config, DefenseConfig, ModelConfig, TrainingConfig
from fedattack.data import build_world
from fedattack.defenses import DEFENSES, ClientDefenses, build_defenses, check_defenses, hides_clients
from fedattack.defenses.accounting import ORDERS, gaussian_epsilon, renyi_divergence, sampled_epsilon
from fedattack.defenses.clip_noise import ClipNoise
from fedattack.defenses.prune import Prune
from fedattack.defenses.soteria import Soteria
from fedattack.defenses.transform import SUB_POLICIES, Transform, parse_policy
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.models.classifiers.precode import Bottlenecked
from fedattack.observation import EVERYONE, Observation, Reconstruction, Scenario
from fedattack.training import batch_gradient, load_weights, local_update
from simulations.engine.federation import run_federation
from simulations.experiments.privacy import privacy_text
from simulations.pipeline import simulate

MODEL = ModelConfig(name="tiny-cnn", classes=5, channels=1, image_size=8, activation="relu")
SMALL = {"dataset": "digits", "model": "tiny-cnn", "clients": 3, "engine": "inline", "compressor": "none"}


@dataclass
class Grey(ReconstructionAttack):
    """Answers grey images."""

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Half of everything."""
        sizes = [(o.num_examples, *o.scenario.image_shape) for o in observations]
        return [Reconstruction(torch.full(size, 0.5), torch.zeros(size[0]).long(), 0.0) for size in sizes]


def network(model: ModelConfig = MODEL) -> nn.Module:
    module = build_model(model)
    load_weights(module, initial_weights(model, 0))
    return module.train()


def batch(count: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 5


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def configured(*names: str, **options: Any) -> DefenseConfig:
    return DefenseConfig(names=names, shared_options=options)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


# ---------------------------------------------------------------------- accounting


@pytest.mark.parametrize(("noise", "releases"), [(0.7, 1), (1.0, 1), (2.0, 5), (0.3, 40), (30.0, 1)])
def test_gaussian_epsilon_is_where_the_exact_delta_is_met(noise: float, releases: int) -> None:
    mu, epsilon = math.sqrt(releases) / noise, gaussian_epsilon(noise, releases, 1e-5)
    spent = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    assert spent == pytest.approx(1e-5, rel=1e-6)


def test_both_adjacencies_at_noise_one() -> None:
    account = ClipNoise(noise=1.0).privacy(TrainingConfig(), samples=4, rounds=1, statistics_sent=False)
    assert account.epsilon == pytest.approx(4.377, abs=5e-4)
    assert account.replacement_epsilon == pytest.approx(9.997, abs=5e-4)
    assert privacy_text(account) == (
        "epsilon 4.38 at delta 1e-05 for all that a client sends there or zero (zero-out), 1 release; "
        "10.00 where it is replaced by another (replacement)"
    )


def test_no_noise_guarantees_nothing_and_much_noise_everything() -> None:
    assert gaussian_epsilon(0.0, 1, 1e-5) == math.inf == sampled_epsilon(0.1, 0.0, 1, 1e-5)
    assert gaussian_epsilon(1.0, 0, 1e-5) == 0.0 == sampled_epsilon(0.1, 1.0, 0, 1e-5)
    assert gaussian_epsilon(1e7, 1, 1e-5) == 0.0
    with pytest.raises(ConfigError, match="delta"):
        gaussian_epsilon(1.0, 1, 0.0)


@pytest.mark.parametrize(("rate", "noise"), list(itertools.product((0.001, 0.1, 0.9), (0.5, 1.1, 5.0))))
def test_sampled_divergence_is_the_binomial_sum_at_whole_orders(rate: float, noise: float) -> None:
    for order in (2, 3, 8, 32):
        k = np.arange(order + 1)
        terms = np.log(comb(order, k)) + (order - k) * math.log1p(-rate) + k * math.log(rate)
        expected = np.logaddexp.reduce(terms + (k * k - k) / (2 * noise**2)) / (order - 1)
        assert renyi_divergence(order, rate, noise) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_without_sampling_it_is_the_gaussian_mechanism() -> None:
    assert renyi_divergence(7, 1.0, 2.0) == pytest.approx(7 / 8)
    assert renyi_divergence(7, 1 - 1e-12, 2.0) == pytest.approx(7 / 8)
    for noise, releases in ((1.0, 1), (3.0, 20)):
        exact, renyi = (
            gaussian_epsilon(noise, releases, 1e-5),
            sampled_epsilon(1.0, noise, releases, 1e-5),
        )
        assert exact <= renyi <= 1.15 * exact


@pytest.mark.parametrize(("noise", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.01)])
def test_published_epsilons_of_dp_sgd_on_mnist(noise: float, epochs: int, published: float) -> None:
    """TensorFlow Privacy's tutorial: batch 256 of 60,000, delta 1e-5, Mironov's conversion of 2017."""
    rate, steps = 256 / 60_000, epochs * 60_000 // 256
    spent = [steps * renyi_divergence(a, rate, noise) + math.log(1e5) / (a - 1) for a in ORDERS]
    assert min(spent) == pytest.approx(published, abs=0.006)
    assert sampled_epsilon(rate, noise, steps, 1e-5) < min(spent)


# ---------------------------------------------------------------------- clip-noise


def test_update_is_clipped_and_noised() -> None:
    update = {"a": torch.full((300,), 3.0), "b": torch.full((10, 10), -4.0)}
    clipped = ClipNoise(clip_norm=2.0, noise=0.0).update(update, generator())
    assert float(flat(clipped.values()).norm()) == pytest.approx(2.0)
    assert torch.allclose(clipped["a"] / clipped["a"][0], torch.ones(300))
    small = {"a": torch.full((4,), 0.1)}
    assert torch.equal(ClipNoise(clip_norm=2.0, noise=0.0).update(small, generator())["a"], small["a"])
    zero = ClipNoise(noise=0.0).update({"a": torch.zeros(3)}, generator())["a"]
    assert torch.equal(zero, torch.zeros(3))
    noise = flat(ClipNoise(clip_norm=2.0, noise=0.5).update({"a": torch.zeros(20_000)}, generator()).values())
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    plain = ClipNoise(clip_norm=None, noise=0.5).update({"a": torch.full((20_000,), 9.0)}, generator())["a"]
    assert float(plain.std()) == pytest.approx(0.5, abs=0.01)
    assert float(plain.mean()) == pytest.approx(9.0, abs=0.02)


def test_samples_are_clipped_one_by_one() -> None:
    model, (images, labels) = network(), batch()
    bound = 0.5
    loss, mean = ClipNoise(clip_norm=bound, noise=0.0, unit="sample").gradient(
        model, images, labels, batch_gradient, generator()
    )
    total = torch.zeros(sum(p.numel() for p in model.parameters()))
    for image, label in zip(images, labels, strict=True):
        single = flat(batch_gradient(model, image[None], label[None])[1])
        assert float(single.norm()) > bound
        total += single * (bound / single.norm())
    torch.testing.assert_close(flat(mean), total / 4, rtol=1e-5, atol=1e-7)
    assert float(loss) == pytest.approx(cross_entropy(model(images), labels).item(), rel=1e-5)
    noised = ClipNoise(clip_norm=bound, noise=2.0, unit="sample").gradient(
        model, images, labels, batch_gradient, generator()
    )[1]
    added = flat(noised) - flat(mean)
    assert float(added.std()) == pytest.approx(2.0 * bound / 4, rel=0.05)


def test_what_is_promised() -> None:
    training = TrainingConfig(batch_size=4, protocol="fedavg", local_steps=6)
    update = ClipNoise(noise=2.0).privacy(training, samples=12, rounds=5, statistics_sent=False)
    assert (update.unit, update.releases, update.sampled_epsilon) == ("client", 5, None)
    assert update.epsilon == gaussian_epsilon(2.0, 5, 1e-5)
    assert update.replacement_epsilon == gaussian_epsilon(1.0, 5, 1e-5)
    sample = ClipNoise(noise=2.0, unit="sample").privacy(training, 12, 5, False)
    assert (sample.unit, sample.releases) == ("sample", 10)  # 6 steps are 2 epochs of 3 batches
    assert sample.sampled_epsilon == sampled_epsilon(4 / 12, 2.0, 30, 1e-5)
    for defense, sent, word in (
        (ClipNoise(noise=0.0), False, "no noise"),
        (ClipNoise(clip_norm=None), False, "bounds"),
        (ClipNoise(), True, "BatchNorm"),
    ):
        account = defense.privacy(training, 12, 5, sent)
        assert account.epsilon == math.inf
        assert word in account.note


def test_no_sample_gradients_under_batch_norm() -> None:
    resnet = ModelConfig(name="resnet18", classes=3, channels=1, image_size=8, activation="relu")
    scenario = Scenario(
        resnet, TrainingConfig(), CompressionConfig(), configured("clip-noise", unit="sample")
    )
    with pytest.raises(NotApplicable, match="BatchNorm"):
        check_defenses(scenario)


# ---------------------------------------------------------------------- prune


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_prune_keeps_the_largest(scope: Any) -> None:
    update = {"a": torch.tensor([[5.0, -1.0], [0.5, -8.0]]), "b": torch.arange(1.0, 7.0) / 10}
    before = {name: tensor.clone() for name, tensor in update.items()}
    pruned = Prune(share=0.5, scope=scope).update(update, generator())
    assert all(torch.equal(update[name], before[name]) for name in update)
    if scope == "layer":
        assert pruned["a"].tolist() == [[5.0, 0.0], [0.0, -8.0]]
        assert (pruned["b"] != 0).tolist() == [False] * 3 + [True] * 3
    else:
        assert pruned["a"].tolist() == [[5.0, -1.0], [0.5, -8.0]]
        assert (pruned["b"] != 0).tolist() == [False] * 5 + [True]


# ---------------------------------------------------------------------- soteria


def test_soteria_prunes_the_heads_gradient_and_nothing_else() -> None:
    model, (images, labels) = network(), batch(1)
    plain_loss, plain = batch_gradient(model, images, labels)
    loss, defended = Soteria(share=0.75).gradient(model, images, labels, batch_gradient, generator())
    assert torch.equal(loss, plain_loss)
    names = [name for name, _ in model.named_parameters()]
    for name, one, other in zip(names, plain, defended, strict=True):
        if name != "head.weight":
            torch.testing.assert_close(one, other)
            continue
        gone = (other == 0).all(0)
        assert int(gone.sum()) >= round(0.75 * other.shape[1])
        torch.testing.assert_close(one[:, ~gone], other[:, ~gone])


def test_soteria_chooses_by_the_jacobian_of_each_sample() -> None:
    model, (images, labels) = network(), batch(3)
    images = images.requires_grad_()
    features = model.features(images)
    kept = Soteria(share=0.5).kept(features, images)
    for sample in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: model.features(x[None])[0], images[sample].detach()
        )
        ratio = jacobian.flatten(1).norm(dim=1) / (features[sample].detach().abs() + 0.1)
        order = ratio.argsort(stable=True)
        count = len(order) // 2
        assert float(ratio[kept[sample] == 0].max()) <= float(ratio[order[count]]) + 1e-6
        assert int((kept[sample] == 0).sum()) == count
    _, gradients = Soteria(share=0.5).gradient(model, images, labels, batch_gradient, generator())
    share = (model(images).softmax(1) - one_hot(labels, 5)) / 3
    names = [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(gradients[names.index("head.weight")], share.T @ (features * kept))


# ---------------------------------------------------------------------- precode


def test_precode_draws_with_the_client_and_nowhere_else() -> None:
    config = configured("precode", width=6)
    (defense,) = build_defenses(config).values()
    model = network(defense.model(MODEL))
    assert isinstance(model, Bottlenecked)
    assert [name for name, _ in model.named_parameters()][-2:] == ["model.head.weight", "model.head.bias"]
    (images, labels), state = batch(), torch.get_rng_state()
    one = defense.gradient(model, images, labels, batch_gradient, generator(1))
    same = defense.gradient(model, images, labels, batch_gradient, generator(1))
    other = defense.gradient(model, images, labels, batch_gradient, generator(2))
    assert torch.equal(flat(one[1]), flat(same[1]))
    assert not torch.allclose(flat(one[1]), flat(other[1]))
    assert torch.equal(torch.get_rng_state(), state)
    guess = batch_gradient(model, images, labels)  # an adversary's: the mean of the code, no divergence
    model.eval()
    assert guess[0].item() == cross_entropy(model(images), labels).item()


def test_precodes_divergence_is_that_of_two_normals() -> None:
    (defense,) = build_defenses(configured("precode", width=6, beta=0.1)).values()
    model, (images, _) = network(defense.model(MODEL)), batch()
    assert isinstance(model, Bottlenecked)
    model.generator, model.beta = generator(), 0.1
    model(images)
    mean, raw = model.encoder(model.model.features(images)).chunk(2, dim=1)
    spread = torch.nn.functional.softplus(raw)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, spread), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(model.penalty(), 0.1 * expected.sum(1).mean())


@pytest.mark.parametrize("name", ["soteria", "precode"])
def test_models_without_a_head_are_refused(name: str) -> None:
    (defense,) = build_defenses(configured(name)).values()
    perceptron = MODEL.model_copy(update={"name": "mlp"})
    scenario = Scenario(defense.model(perceptron), TrainingConfig(), CompressionConfig(), configured(name))
    with pytest.raises(NotApplicable, match="linear head"):
        check_defenses(scenario)


# ---------------------------------------------------------------------- transform


def test_policies_read_as_published() -> None:
    assert parse_policy("3-1-7+43-18-18") == ((3, 1, 7), (43, 18, 18))
    assert parse_policy("") == ()
    assert len(SUB_POLICIES) == 50
    assert [SUB_POLICIES[i] for i in (3, 1, 7, 43, 18)] == [
        ("translate_x", 9), ("contrast", 6), ("translate_y", 2), ("translate_y", 3), ("contrast", 7),
    ]  # fmt: skip
    for wrong in ("3-1-", "3,1", "50", "a", "-1"):
        with pytest.raises(ConfigError, match=r"defense\.transform\.policy"):
            Transform(policy=wrong)


def test_operations_do_what_their_magnitudes_say() -> None:
    image = torch.rand(1, 3, 32, 32, generator=generator())
    steps = (image * 255).round() / 255

    def shown(index: int, seed: int = 0) -> Tensor:
        return Transform(policy=str(index), crop=False).images(image, generator(seed))

    assert torch.equal(Transform(policy="", crop=False).images(image, generator()), steps)
    assert torch.equal(shown(0), (255 - steps * 255).round() / 255)
    for index, axis, pixels in ((3, 3, 14), (7, 2, 3), (43, 2, 5)):
        moved = {
            torch.equal(shown(index, s), _shifted(steps, axis, sign * pixels))
            for s in range(4)
            for sign in (1, -1)
        }
        assert moved == {True, False}  # each draw is one of the two directions
    for index, factor in ((13, 0.5 * 5 / 9), (15, 0.5)):
        up, down = steps * (1 + factor), steps * (1 - factor)
        for seed in range(4):
            error = min(float((shown(index, seed) - e.clamp(max=1)).abs().max()) for e in (up, down))
            assert error < 1.01 / 255
    assert torch.equal(shown(28), steps)  # solarize 0: no pixel reaches 256
    assert shown(45).ge(0).all()
    grey = Transform(policy="12-2-6-11").images(image[:, :1], generator())
    assert grey.shape == (1, 1, 32, 32)


def _shifted(image: Tensor, axis: int, pixels: int) -> Tensor:
    rolled = image.roll(pixels, axis)
    hidden = torch.arange(image.shape[axis])
    gone = hidden < pixels if pixels > 0 else hidden >= image.shape[axis] + pixels
    return rolled.index_fill(axis, torch.nonzero(gone).flatten(), 128 / 255)


def test_crops_flip_and_stay_in_range() -> None:
    images = torch.rand(64, 1, 8, 8, generator=generator())
    shown = Transform(policy="", crop=True).images(images, generator())
    assert shown.shape == images.shape
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
    padded = torch.nn.functional.pad((images * 255).round() / 255, [4] * 4)
    windows = {(y, x): padded[:, :, y : y + 8, x : x + 8] for y in range(9) for x in range(9)}
    found = [
        (place, flipped)
        for index in range(64)
        for place, window in windows.items()
        for flipped in (False, True)
        if torch.equal(shown[index], window[index].flip(2) if flipped else window[index])
    ]
    assert len(found) >= 64
    assert {flipped for _, flipped in found} == {False, True}
    assert len({place for place, _ in found}) > 30


# ---------------------------------------------------------------------- the list of them


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"defense": "clip-nois"}, "did you mean 'clip-noise'"),
        ({"defense": "prune", "defense.shar": 0.5}, "did you mean 'defense.share'"),
        ({"defense": "prune", "defense.prune.shar": 0.5}, "did you mean 'defense.prune.share'"),
        ({"defense": "prune", "defense.soteria.share": 0.5}, "not in setting 'defense.names'"),
        ({"defense": "prune", "defense.share": 1.5}, "'defense.prune.share' = 1.5"),
        ({"defense": "prune,prune"}, "each defence once"),
        ({"defense": "precode,soteria"}, "name it first"),
        ({"defense": "clip-noise,soteria"}, "name it first"),
    ],
)
def test_bad_requests_name_the_setting(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_defenses(Config.from_mapping(settings).defense)
    assert part in str(caught.value)


def test_order_options_and_streams() -> None:
    config = Config.from_mapping(
        {"defense": "prune,clip-noise", "defense.clip-noise.noise": "0.5", "defense.share": "0.5"}
    ).defense
    defenses = list(build_defenses(config).values())
    assert isinstance(defenses[0], Prune)
    assert isinstance(defenses[1], ClipNoise)
    assert (defenses[0].share, defenses[1].noise) == (0.5, 0.5)
    update = {"w": torch.arange(100.0)}

    def sent(*key: int) -> Tensor:
        return ClientDefenses(defenses, *key).update(update)["w"]

    assert torch.equal(sent(0, 1, 2), sent(0, 1, 2))
    different = [sent(0, 1, 2), sent(1, 1, 2), sent(0, 2, 2), sent(0, 1, 3)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(different, 2))
    assert hides_clients(configured("prune", "secure-aggregation"))
    assert not hides_clients(config)
    assert ClientDefenses([], 0, 1, 0).gradient is batch_gradient
    assert set(DEFENSES.names()) >= {
        "clip-noise",
        "prune",
        "soteria",
        "precode",
        "transform",
        "secure-aggregation",
    }


def test_per_sample_clipping_goes_around_soteria() -> None:
    config = configured("soteria", "clip-noise", unit="sample", noise=0.0, clip_norm=0.1)
    model, (images, labels) = network(), batch(2)
    step = ClientDefenses(list(build_defenses(config).values()), 0, 1, 0).gradient
    _, found = step(model, images, labels)
    expected = torch.zeros(len(flat(found)))
    for image, label in zip(images, labels, strict=True):
        single = flat(Soteria().gradient(model, image[None], label[None], batch_gradient, generator())[1])
        expected += single * min(1.0, 0.1 / float(single.norm())) / 2
    torch.testing.assert_close(flat(found), expected)


# ---------------------------------------------------------------------- in a federation


def observed(**settings: Any) -> tuple[dict[str, Tensor], list[Observation]]:
    config, seen = Config.from_mapping(SMALL | settings), []
    result = run_federation(config, build_world(config), on_observation=seen.append)
    return result.weights, seen


@pytest.mark.parametrize("name", ["clip-noise", "prune", "soteria", "precode", "transform"])
def test_a_defence_changes_what_is_sent_the_same_way_twice(name: str) -> None:
    _, plain = observed()
    weights, defended = observed(defense=name)
    again, repeated = observed(defense=name)
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    for one, other in zip(defended, repeated, strict=True):
        assert torch.equal(one.update.values, other.update.values)
    assert defended[0].scenario.defense.names == (name,)
    if name != "precode":
        assert all(
            not torch.equal(d.update.values, p.update.values) for d, p in zip(defended, plain, strict=True)
        )


@pytest.mark.parametrize("settings", [{}, {"compressor": "topk", "compression": 0.05}])
def test_secure_aggregation_shows_the_sum_and_trains_the_same(settings: dict[str, Any]) -> None:
    more = {"batch-size": 5, "rounds": 2} | settings
    weights, seen = observed(**more)
    hidden, sums = observed(**more, defense="secure-aggregation")
    for key in weights:
        torch.testing.assert_close(hidden[key], weights[key], rtol=1e-4, atol=1e-6)
    assert [o.key for o in sums] == ["round-0001-everyone", "round-0002-everyone"]
    for total in sums:
        parts = [o for o in seen if o.round == total.round]
        assert (total.client, total.num_examples) == (EVERYONE, 15)
        assert total.wire_bytes == sum(o.wire_bytes for o in parts)
        mean = sum(flat(o.update.dense().values()) * (o.num_examples / 15) for o in parts)
        torch.testing.assert_close(flat(total.update.dense().values()), mean, rtol=1e-4, atol=1e-6)
        if settings:
            union = torch.cat([o.update.indices for o in parts]).unique()
            assert torch.equal(total.update.indices, union)
        assert total.scenario.training.batch_size == 0


def run(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    config = Config.from_mapping(SMALL | {"run-dir": str(tmp_path / "run")} | settings)
    return simulate(config).summary


def test_the_auditor_knows_what_the_model_was_shown(tmp_path: Path) -> None:
    """The truth's `shown` has the very gradient that was sent; the private images have another one."""
    from fedattack.storage import load_observations, load_truths

    attack = {"attack": "test_defenses:Grey", "save-observations": True}
    for name, more in (
        ("one", {"batch-size": 3}),
        ("all", {"batch-size": 2, "defense": "transform,secure-aggregation"}),
    ):
        summary = run(tmp_path / name, **({"defense": "transform"} | attack | more))
        assert summary["attacks"]["test_defenses:Grey"]["shown"]["psnr"]["count"] == (
            9 if name == "one" else 6
        )
        folder = tmp_path / name / "run"
        for observation, truth in zip(
            load_observations(folder / "observations"), load_truths(folder / "truth"), strict=True
        ):
            assert truth.key == observation.key
            sent = flat(observation.update.dense().values())
            model = build_model(observation.scenario.model)
            everything = [np.arange(len(truth.images))]
            for images, equal in ((truth.shown, True), (truth.images, False)):
                assert images is not None
                local = local_update(
                    model, observation.weights, images, truth.labels, everything, TrainingConfig()
                )
                assert torch.allclose(flat(local.update.values()), sent, rtol=1e-3, atol=1e-6) is equal


def test_epsilon_is_printed_and_recorded(tmp_path: Path) -> None:
    summary = run(tmp_path, defense="clip-noise", rounds=2, participation=0.67, **{"defense.noise": 3.0})
    account = summary["federation"]["privacy"]["clip-noise"]
    assert account["epsilon"] == pytest.approx(gaussian_epsilon(3.0, 2, 1e-5))
    assert account["text"] == summary["federation"]["guarantee of clip-noise"]
    assert "epsilon 1.87 at delta 1e-05" in account["text"]
    assert account["text"] in (tmp_path / "run" / "report.html").read_text()
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["config"]["defense"]["names"] == ["clip-noise"]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"strategy": "krum", "clients": 5}, "single updates"),
        ({"attack": "fedmia", "clients": 4}, "no update of one alone"),
    ],
)
def test_what_needs_single_updates_is_refused_under_secure_aggregation(
    tmp_path: Path, settings: dict[str, Any], part: str
) -> None:
    options = {"federation.strategy_options.num_malicious_nodes": 1} if "strategy" in settings else {}
    with pytest.raises(NotApplicable, match=part):
        run(tmp_path, defense="secure-aggregation", **settings, **options)
    assert not (tmp_path / "run").exists()
