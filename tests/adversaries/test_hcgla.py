"""The attack as a whole."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hcgla_scenes import observe, psnr, scenario, smooth_images
from PIL import Image
from torch import Tensor

from adversaries import ATTACKS
from adversaries.reconstruction.hcgla import HCGLA
from fedattack.config import TrainingConfig
from fedattack.errors import ConfigError, NotApplicable, PayloadError
from fedattack.observation import Observation, Reconstruction
from fedattack.registry import build_plugin

CPU = torch.device("cpu")


def seen(count: int = 2, batch: int = 1, **settings: object) -> tuple[list[Observation], Tensor]:
    """Small victims with public images, and the truth."""
    scene = scenario(**({"classes": 60, "rate": 0.05, "size": 16} | settings))  # type: ignore[arg-type]
    images = smooth_images(count * batch, 16)
    public = smooth_images(60, 16, seed=21)
    victims = [
        observe(scene, part, torch.arange(len(part)) + 7 * v, client=v, auxiliary=public)
        for v, part in enumerate(images.split(batch))
    ]
    return victims, images


def run(attack: HCGLA, victims: list[Observation], seed: int = 0) -> list[Reconstruction]:
    return attack.run(victims, seed, CPU)


def test_registered_and_configurable() -> None:
    attack = build_plugin(
        ATTACKS.get("hcgla"), "hcgla", {"method": "matching", "iterations": "7"}, {"tv": 0.1, "x": 1}
    )
    assert attack == HCGLA(method="matching", iterations=7, tv=0.1)
    with pytest.raises(ConfigError, match="gauss-newton"):
        build_plugin(ATTACKS.get("hcgla"), "hcgla", {"method": "newton"}, {})


def test_auto_solves_by_gauss_newton_where_it_applies() -> None:
    victims, truth = seen()
    for v, answer in enumerate(run(HCGLA(), victims)):
        assert answer.method == "gauss-newton"
        assert answer.labels.tolist() == [7 * v]
        assert answer.certificate is not None
        assert answer.certificate < 1.5
        floor = psnr(answer.floors["prior"], truth[v : v + 1])
        assert psnr(answer.images, truth[v : v + 1]) > floor + 8
        assert answer.floors["prior"].shape == answer.images.shape


def test_auto_matches_where_gauss_newton_does_not_apply_and_says_why() -> None:
    victims, truth = seen(activation="softplus")
    answers = run(HCGLA(iterations=150), victims)
    for v, answer in enumerate(answers):
        assert answer.method == "matching"
        assert "softplus" in answer.details["why"]
        assert answer.details["start"] == "ridge"
        assert psnr(answer.images, truth[v : v + 1]) > psnr(answer.floors["prior"], truth[v : v + 1]) + 5
    with pytest.raises(NotApplicable, match="softplus"):
        run(HCGLA(method="gauss-newton"), victims)


def test_matching_beats_its_start_and_the_start_beats_the_floor() -> None:
    victims, truth = seen()
    answers = run(HCGLA(method="matching", iterations=120), victims)
    begin = run(HCGLA(method="matching", iterations=1), victims)
    for v in range(2):
        one = truth[v : v + 1]
        floor, start, end = (
            psnr(x, one) for x in (answers[v].floors["prior"], begin[v].images, answers[v].images)
        )
        assert floor + 2 < start < end - 3


@pytest.mark.slow
def test_one_step_of_federated_averaging_is_one_gradient() -> None:
    plain, truth = seen(1)
    training = TrainingConfig(protocol="fedavg", local_steps=1, learning_rate=0.25, momentum=0.9)
    delta, _ = seen(1, training=training)
    assert delta[0].update.kind == "delta"
    for attack in (HCGLA(), HCGLA(method="matching", iterations=60)):
        (one,), (other,) = run(attack, plain), run(attack, delta)
        assert one.method == other.method
        assert abs(psnr(one.images, truth) - psnr(other.images, truth)) < 3
    decayed, _ = seen(1, training=training.model_copy(update={"weight_decay": 0.01}))
    for attack in (HCGLA(), HCGLA(method="matching", iterations=60)):
        (one,), (other,) = run(attack, plain), run(attack, decayed)
        assert one.method == other.method
        assert abs(psnr(one.images, truth) - psnr(other.images, truth)) < 6


def test_auto_turns_to_matching_where_gauss_newton_leaves_too_much_unexplained() -> None:
    victims, _ = seen(1)
    update = victims[0].update
    noise = torch.randn(update.kept, generator=torch.Generator().manual_seed(1))
    noisy = dataclasses.replace(update, values=update.values + 3 * update.threshold * noise)
    (answer,) = run(HCGLA(iterations=20), [dataclasses.replace(victims[0], update=noisy)])
    assert answer.method == "matching"
    assert "unexplained" in answer.details["why"]


@pytest.mark.parametrize("name", ["randomk", "qsgd", "none"])
def test_other_compressors_are_matched(name: str) -> None:
    victims, truth = seen(1, name=name, rate=0.3)
    (answer,) = run(HCGLA(method="matching", iterations=80), victims)
    assert answer.labels.tolist() == [0]
    assert psnr(answer.images, truth) > psnr(answer.floors["prior"], truth) + 2


def test_batches_answer_in_the_order_of_their_labels() -> None:
    victims, truth = seen(1, 3, rate=0.2)
    swapped = observe(victims[0].scenario, truth[[2, 0, 1]], torch.tensor([50, 9, 30]))
    swapped = dataclasses.replace(swapped, auxiliary=victims[0].auxiliary)
    (answer,) = run(HCGLA(method="matching", iterations=150), [swapped])
    assert answer.labels.tolist() == [9, 30, 50]
    assert answer.label_confidence == 1.0
    order = truth[[0, 1, 2]]
    assert psnr(answer.images, order) > psnr(answer.floors["prior"], order) + 5


def test_victims_of_different_batch_sizes_keep_their_places() -> None:
    victims, _ = seen(2, 2)
    single, _ = seen(1)
    mixed = [victims[0], dataclasses.replace(single[0], client=5), victims[1]]
    answers = run(HCGLA(method="matching", iterations=30), mixed)
    assert [len(answer.images) for answer in answers] == [2, 1, 2]
    assert [answer.labels.tolist() for answer in answers] == [[0, 1], [0], [7, 8]]


def test_same_seed_same_bits_and_other_seeds_other_starts() -> None:
    victims, _ = seen(1)
    attack = HCGLA(method="matching", start="random", iterations=5)
    first, again, other = (run(attack, victims, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert first.history == again.history
    assert not torch.equal(first.images, other.images)


def test_a_victims_start_does_not_depend_on_its_companions() -> None:
    victims, _ = seen(3)
    attack = HCGLA(method="matching", iterations=3)
    alone, together = run(attack, victims[2:])[0], run(attack, victims)[2]
    torch.testing.assert_close(alone.images, together.images, rtol=0, atol=1e-4)


def test_repeated_labels_do_not_stay_twins() -> None:
    scene = scenario(60, rate=0.2, size=16)
    victim = observe(
        scene, smooth_images(2, 16), torch.tensor([4, 4]), auxiliary=smooth_images(60, 16, seed=21)
    )
    (answer,) = run(HCGLA(iterations=20), [victim])
    assert answer.method == "matching"
    assert "repeat" in answer.details["why"]
    assert not torch.equal(answer.images[0], answer.images[1])


@pytest.mark.parametrize("start", ["grey", "mean", "random", "red", "image"])
def test_starts_are_what_they_say(start: str, tmp_path: Path) -> None:
    from adversaries.reconstruction.hcgla.starts import Starts

    picture = tmp_path / "start.png"
    Image.new("RGB", (40, 20), (255, 0, 51)).save(picture)
    victims, _ = seen(1)
    made = Starts(start, victims[0], 0, str(picture)).make(victims[0], torch.tensor([0]), 2)  # type: ignore[arg-type]
    assert made.shape == (2, 1, 3, 16, 16)
    assert not torch.equal(made[0], made[1])
    colour = {"grey": [0.5] * 3, "red": [1.0, 0.0, 0.0], "image": [1.0, 0.0, 0.2]}.get(start)
    if colour is not None:
        assert made[0, 0].mean((1, 2)).tolist() == pytest.approx(colour, abs=1e-6)
    elif start == "mean":
        assert victims[0].auxiliary is not None
        torch.testing.assert_close(made[0, 0], victims[0].auxiliary.images.mean(0))
    else:
        assert 0.8 < float(made.std()) < 1.2


def test_same_label_start_needs_labels() -> None:
    from adversaries.reconstruction.hcgla.starts import Starts

    victims, _ = seen(1)
    public = victims[0].auxiliary
    assert public is not None
    with pytest.raises(NotApplicable, match="labels"):
        Starts("same-label", victims[0], 0).make(victims[0], torch.tensor([3]), 1)
    labelled = dataclasses.replace(public, labels=torch.arange(60))
    victim = dataclasses.replace(victims[0], auxiliary=labelled)
    made = Starts("same-label", victim, 0).make(victim, torch.tensor([3]), 1)
    assert torch.equal(made[0, 0], public.images[3])


def test_without_public_images_it_starts_grey() -> None:
    victims, _ = seen(1)
    (answer,) = run(HCGLA(method="matching", iterations=5), [dataclasses.replace(victims[0], auxiliary=None)])
    assert answer.details["start"] == "grey"
    assert float(answer.floors["prior"].std()) == 0.0
    with pytest.raises(NotApplicable, match="auxiliary"):
        run(HCGLA(method="matching", start="mean"), [dataclasses.replace(victims[0], auxiliary=None)])


def test_total_variation_only_from_flat_starts_with_few_entries() -> None:
    few, _ = seen(1, rate=0.01)
    many, _ = seen(1, rate=0.2)
    for victims, start, expected in ((few, "grey", {"tv2": 1e-3}), (few, "ridge", {}), (many, "grey", {})):
        (answer,) = run(HCGLA(start=start, iterations=2), victims)  # type: ignore[arg-type]
        assert answer.details["matching.regularisers"] == expected


def test_published_preset_runs_as_published() -> None:
    victims, _ = seen(1)
    (answer,) = run(HCGLA(preset="published", iterations=6), victims)
    assert answer.method == "matching"
    assert "published" in answer.details["why"]
    assert answer.details["start"] == "random"
    assert answer.details["matching.line_search"] == "none"
    assert answer.details["matching.learning_rate"] == 0.1
    assert len(answer.history) == 7


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"denoise_every": 5}, "hcgla.denoiser"),
        ({"denoiser": "x.safetensors"}, "denoise_every"),
        ({"restarts": 0}, "hcgla.restarts"),
        ({"iterations": 0}, "hcgla.iterations"),
        ({"learning_rate": 0.0}, "hcgla.learning_rate"),
        ({"tv": -1.0}, "hcgla.tv"),
        ({"method": "gauss-newton", "preset": "published"}, "hcgla.preset"),
        ({"method": "gauss-newton", "start": "grey"}, "hcgla.start"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        HCGLA(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attack", "scene", "error", "named"),
    [
        (
            HCGLA(method="matching"),
            {"training": TrainingConfig(protocol="fedavg", local_steps=3)},
            NotApplicable,
            "local_steps",
        ),
        (
            HCGLA(),
            {"training": TrainingConfig(protocol="fedavg", local_steps=3), "model": "mlp"},
            NotApplicable,
            "mlp",
        ),
        (HCGLA(), {"name": "sign"}, NotApplicable, "sign"),
        (HCGLA(method="gauss-newton"), {"model": "mlp"}, NotApplicable, "mlp"),
        (HCGLA(start="ridge"), {"model": "mlp"}, NotApplicable, "mlp"),
        (HCGLA(start="image"), {}, ConfigError, "start_image"),
        (HCGLA(start="generator"), {}, ConfigError, "hcgla.generator"),
        (HCGLA(objective="nearest"), {}, ConfigError, "masked-l2"),
    ],
)
def test_check_refuses_before_anything_starts(
    attack: HCGLA, scene: dict[str, object], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        attack.check(scenario(10, size=16, **scene))  # type: ignore[arg-type]


def test_hostile_declarations_are_refused() -> None:
    victims, _ = seen(1)
    with pytest.raises(PayloadError, match="declares 0"):
        run(HCGLA(), [dataclasses.replace(victims[0], num_examples=0)])
    with pytest.raises(PayloadError, match="1000000"):
        run(HCGLA(), [dataclasses.replace(victims[0], num_examples=1_000_000)])


def test_progress_never_goes_back() -> None:
    victims, _ = seen(2)
    for attack in (HCGLA(method="matching", iterations=25), HCGLA()):
        shares: list[float] = []
        attack.run(victims, 0, CPU, lambda share, _, shares=shares: shares.append(share))
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


# Real faces


def faces(folder: Path) -> tuple[Tensor, Tensor]:
    """Sixteen seeded victims and the public faces of other people."""
    pictures = []
    with tarfile.open(folder / "data/LFW/lfw32.tar.xz") as archive:
        for member in sorted((m for m in archive if m.name.endswith(".png")), key=lambda m: m.name):
            stored = archive.extractfile(member)
            assert stored is not None
            pictures.append(np.asarray(Image.open(io.BytesIO(stored.read())).convert("RGB")))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    order = np.random.default_rng(123).permutation(len(images))[:16]
    with np.load(folder / "data/LFW/lfw32-auxiliary.npz", allow_pickle=False) as held:
        public = torch.from_numpy(held["images"]).permute(0, 3, 1, 2).float() / 255
    return images[order], public


@pytest.mark.slow
def test_matching_alone_reaches_32_db_on_faces_at_a_thousandth(shared_dir: Path) -> None:
    images, public = faces(shared_dir)
    labels = torch.from_numpy(np.random.default_rng(1).permutation(10_177)[:8])
    scene = scenario(10_177)
    victims = [
        observe(scene, images[v : v + 1], labels[v : v + 1], client=v, auxiliary=public) for v in range(8)
    ]
    answers = run(HCGLA(method="matching"), victims)
    assert [int(answer.labels) for answer in answers] == labels.tolist()
    scores = [psnr(answer.images, images[v : v + 1]) for v, answer in enumerate(answers)]
    floors = [psnr(answer.floors["prior"], images[v : v + 1]) for v, answer in enumerate(answers)]
    assert float(np.mean(scores)) >= 32.0
    assert min(scores) >= 30.0
    assert float(np.mean(floors)) < 16.0
