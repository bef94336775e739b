"""LTI, FGLA and ROG: learned from public images alone, above the floor, repeatable, refusing what cannot be done."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hcgla_scenes import observe, psnr, scenario
from simple_pictures import mixtures

from adversaries import ATTACKS
from adversaries.inversion.learning import train
from adversaries.reconstruction.learned.fgla import FGLA
from adversaries.reconstruction.learned.learning_to_invert import LearningToInvert, _Reader, nearest_order
from adversaries.reconstruction.matching.rog import ROG, LowResolution
from fedattack.config import TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import Update

CPU = torch.device("cpu")
PUBLIC = mixtures(160, seed=3)


def scene(model: str = "lenet-zhu", **options):
    options = {"name": "none", "rate": 1.0, "activation": "sigmoid", "size": 8} | options
    return scenario(10, model=model, **options)


def victims(count: int = 2, batch: int = 1, public: torch.Tensor | None = PUBLIC, **options):
    size = options.get("size", 8)
    images = mixtures(count * batch, size, seed=77).split(batch)
    public = mixtures(len(public), size, seed=3) if public is not None else None
    labels = torch.arange(10)[:batch]
    made = [observe(scene(**options), x, labels, n, public) for n, x in enumerate(images)]
    return made, images


def above_floor(answers, images) -> float:
    gains = [psnr(a.images, x) - psnr(a.floors["prior"], x) for a, x in zip(answers, images, strict=True)]
    return sum(gains) / len(gains)


LTI = LearningToInvert(passes=2, epochs=40, hidden=64, inputs=512, learning_rate=3e-3)
DECODER = FGLA(passes=2, epochs=15, width=16, learning_rate=5e-3)
SMALL = ROG(iterations=120, pairs=16, epochs=4)


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        (LTI, {}),
        (LTI, {"name": "sign"}),
        (LTI, {"name": "topk", "rate": 0.1}),
        (DECODER, {}),
        (SMALL, {"size": 16}),
    ],
)
def test_above_the_floor(attack, options) -> None:
    observations, images = victims(**options)
    attack.check(observations[0].scenario)
    answers = attack.run(observations, 0, CPU)
    assert above_floor(answers, images) > 1
    assert all(a.details["held-out PSNR"] > 0 for a in answers)
    if "sign" not in options.values():
        assert all(a.labels.tolist() == [0] for a in answers)


@pytest.mark.parametrize("attack", [LTI, DECODER, SMALL])
def test_an_answer_depends_on_its_own_observation_and_the_seed(attack) -> None:
    observations, _ = victims()
    together = attack.run(observations, 0, CPU)
    alone = attack.run(observations[1:], 0, CPU)
    torch.testing.assert_close(together[1].images, alone[0].images, rtol=0, atol=1e-3)
    assert not torch.equal(together[0].images, together[1].images)


def test_training_repeats_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    observations, _ = victims(1)
    for attack in (dataclasses.replace(LTI, epochs=2), dataclasses.replace(DECODER, epochs=1)):
        answers = []
        for _ in range(2):
            monkeypatch.setattr(train, "_KEPT", {})
            answers.append(attack.run(observations, 4, CPU)[0].images)
        assert torch.equal(*answers)


def test_training_happens_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(train, "_KEPT", {})
    for key in ("a", "b", "a", "c", "d", "e", "a"):
        train.once(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "d", "e", "a"]


@pytest.mark.parametrize("attack", [LTI, DECODER, SMALL])
def test_public_images_are_needed(attack) -> None:
    observations, _ = victims(public=None)
    with pytest.raises(NotApplicable, match="auxiliary images, and 0 were granted"):
        attack.run(observations, 0, CPU)
    observations, _ = victims(public=PUBLIC[:5])
    with pytest.raises(NotApplicable, match="5 were granted"):
        attack.run(observations, 0, CPU)


def test_batches_in_any_order() -> None:
    targets = torch.rand(3, 4, 1, 2, 2)
    mixed = torch.stack([t[torch.randperm(4)] for t in targets])
    assert float(nearest_order(mixed, targets)) == 0.0
    assert float(nearest_order(targets[:, :1] + 1, targets[:, :1])) == pytest.approx(1.0)
    observations, images = victims(1, batch=2)
    answer = LTI.run(observations, 0, CPU)[0]
    assert answer.images.shape == images[0].shape
    assert answer.labels.tolist() == [0, 1]


def test_updates_are_hashed_by_sums() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    dense = Update(("w",), ((50,),), None, values)
    assert torch.equal(_Reader(50, 64, 0).read(dense), values)
    hashed = _Reader(50, 8, 0)
    parts = [Update(("w",), ((50,),), torch.tensor([i]), values[i : i + 1]) for i in range(50)]
    torch.testing.assert_close(hashed.read(dense), sum(hashed.read(part) for part in parts))
    assert len(hashed.read(dense)) == 8


def test_small_images_and_back() -> None:
    chart = LowResolution((2, 3, 8, 8), 2)
    images = torch.full((4, 2, 3, 8, 8), 0.25)
    variables = chart.variables(images)
    assert variables.shape == (4, 2 * 3 * 4 * 4)
    torch.testing.assert_close(chart.images(variables), images)


def test_mending_can_be_left_out() -> None:
    observations, _ = victims(1)
    bare = dataclasses.replace(SMALL, mend="off").run(observations, 0, CPU)[0]
    mended = SMALL.run(observations, 0, CPU)[0]
    assert bare.loss == mended.loss
    assert not torch.equal(bare.images, mended.images)


@pytest.mark.parametrize(
    ("attack", "options", "part"),
    [
        (LTI, {"training": TrainingConfig(batch_size=0)}, "trained for one size"),
        (DECODER, {"training": TrainingConfig(batch_size=0)}, "trained for one size"),
        (DECODER, {"training": TrainingConfig(batch_size=11)}, "11 > 10 classes"),
        (DECODER, {"name": "sign"}, "as signs, and quotients"),
        (SMALL, {"training": TrainingConfig(protocol="fedavg", local_steps=2)}, "mend 'off'"),
    ],
)
def test_refusals_of_learned_attacks(attack, options, part) -> None:
    with pytest.raises(NotApplicable, match=part):
        attack.check(scene(**options))


def test_settings_and_names() -> None:
    for make in (
        lambda: LearningToInvert(epochs=0),
        lambda: FGLA(architecture="fgal"),
        lambda: FGLA(learning_rate=0),
        lambda: ROG(pairs=1),
    ):
        with pytest.raises(ConfigError):
            make()
    names = {"lti": LearningToInvert, "fgla": FGLA, "rog": ROG}
    assert all(ATTACKS.get(name) is cls for name, cls in names.items())
