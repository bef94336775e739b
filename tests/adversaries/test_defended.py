"""Attacks that know which defence was declared: clipping, noise, entries that were pruned."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hcgla_scenes import psnr, scenario, smooth_images
from torch import Tensor

from adversaries.inversion.evidence import defences
from adversaries.inversion.evidence.evidence import Evidence
from adversaries.reconstruction.gauss_newton import GaussNewton
from adversaries.reconstruction.hcgla import HCGLA
from adversaries.reconstruction.hcgla.memory import LocalSteps, Remembered
from adversaries.reconstruction.matching.dlg import DLG
from adversaries.reconstruction.matching.inverting_gradients import InvertingGradients
from fedattack.compression import Memory, build_compressor, decode, encode
from fedattack.config import DefenseConfig, TrainingConfig
from fedattack.defenses import ClientDefenses, build_defenses
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Auxiliary, Observation, Reconstruction, Scenario, UpdateKind
from fedattack.rng import torch_rng
from fedattack.training import batch_positions, local_update

CPU = torch.device("cpu")
PUBLIC = Auxiliary(smooth_images(60, 12, seed=21), source="test")
IMAGE, LABEL = smooth_images(1, 12, seed=5), torch.tensor([17])
PAIR, LABELS = smooth_images(2, 12, seed=6), torch.tensor([9, 23])


def declared(
    name: str, training: TrainingConfig | None = None, rate: float = 0.15, **parameters: Any
) -> Scenario:
    """Clients with one defence."""
    compressor = "none" if rate == 1 else "topk"
    training = training or TrainingConfig(batch_size=0)
    plain = scenario(60, rate=rate, size=12, training=training, name=compressor)
    return dataclasses.replace(plain, defense=DefenseConfig(names=(name,), shared_options=parameters))


def noisy(noise: float, clip_norm: float | None = 1.0, **others: Any) -> Scenario:
    return declared("clip-noise", noise=noise, clip_norm=clip_norm, **others)


def observed(
    scene: Scenario, images: Tensor, labels: Tensor, memory: Memory | None = None, round: int = 1
) -> tuple[Observation, Memory]:
    """What the server sees of a real client that defends itself, and what the client keeps."""
    training = scene.training
    weights, model = initial_weights(scene.model, 7 + round), build_model(scene.model)
    defenses = ClientDefenses(list(build_defenses(scene.defense).values()), 3, round, 0)
    batches = batch_positions(len(labels), training, 3, round, 0)
    result = local_update(model, weights, images, labels, batches, training, defenses.gradient)
    names, shapes = list(result.update), [tuple(tensor.shape) for tensor in result.update.values()]
    compressor = build_compressor(scene.compression, names, shapes)
    packet, kept = compressor.compress(
        defenses.update(result.update), memory or Memory(), round, torch_rng(1, "test", round)
    )
    kind: UpdateKind = "gradient" if training.protocol == "fedsgd" else "delta"
    update = decode(encode(packet), names, shapes, kind, scene.compression, round)
    return Observation(round, 0, scene, weights, update, result.num_examples, auxiliary=PUBLIC), kept


def attacked(scene: Scenario, images: Tensor = IMAGE, labels: Tensor = LABEL) -> Reconstruction:
    (answer,) = HCGLA(iterations=40).run([observed(scene, images, labels)[0]], 0, CPU)
    return answer


def blind(scene: Scenario, images: Tensor = IMAGE, labels: Tensor = LABEL) -> Reconstruction:
    """The same attack, told nothing of the defence."""
    seen, _ = observed(scene, images, labels)
    (answer,) = HCGLA(iterations=40).run(
        [dataclasses.replace(seen, scenario=dataclasses.replace(scene, defense=DefenseConfig()))], 0, CPU
    )
    return answer


def stepping(steps: int, **settings: Any) -> TrainingConfig:
    given = {"protocol": "fedavg", "local_steps": steps, "learning_rate": 0.02, "batch_size": 0}
    return TrainingConfig.model_validate(given | settings)


# Clipping


@pytest.mark.parametrize(
    "training", [None, stepping(1, weight_decay=0.1), stepping(2)], ids=["fedsgd", "decay", "steps"]
)
@pytest.mark.parametrize("unit", ["update", "sample"])
def test_clipping_is_imitated(training: TrainingConfig | None, unit: str) -> None:
    scene = noisy(0.0, 0.01 if training and unit == "update" else 0.3, training=training, unit=unit, rate=1.0)
    seen, _ = observed(scene, PAIR, LABELS)
    plain, _ = observed(dataclasses.replace(scene, defense=DefenseConfig()), PAIR, LABELS)
    assert float(seen.update.values.norm()) < 0.9 * float(plain.update.values.norm())
    imitated = LocalSteps(Evidence(seen), LABELS).simulate(PAIR)
    unit_of = 1.0 if training is None else -training.learning_rate * training.local_steps
    torch.testing.assert_close((imitated * unit_of).float(), seen.update.values, rtol=1e-3, atol=1e-7)


def test_clipping_alone_hides_nothing() -> None:
    answer = attacked(noisy(0.0, 0.3))
    assert answer.method == "gauss-newton"
    assert answer.labels.tolist() == [17]
    assert psnr(answer.images, IMAGE) > 40
    assert psnr(blind(noisy(0.0, 0.3)).images, IMAGE) < psnr(answer.images, IMAGE) - 10


def test_repeated_labels_are_counted_in_a_clipped_batch() -> None:
    images, labels = smooth_images(3, 12, seed=6), torch.tensor([9, 23, 23])
    answer = attacked(noisy(0.0, 0.3, rate=1.0), images, labels)
    assert answer.labels.tolist() == [9, 23, 23]
    assert answer.details["matching.objective"] == "cosine"


# Noise


def test_noise_is_believed_to_its_size() -> None:
    scene = noisy(0.001)
    answer = attacked(scene)
    assert answer.labels.tolist() == [17]
    assert answer.certificate is not None
    assert 0.1 < answer.certificate < 1.5
    floor = psnr(answer.floors["prior"], IMAGE)
    assert psnr(answer.images, IMAGE) > floor + 3
    assert psnr(blind(scene).images, IMAGE) < psnr(answer.images, IMAGE) - 3


def test_dense_noisy_updates_are_explained_to_the_noise() -> None:
    answer = attacked(noisy(0.001, rate=1.0))
    assert answer.certificate == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("images", "labels"), [(IMAGE, LABEL), (PAIR, LABELS)], ids=["one", "two"])
def test_nothing_but_noise_leaves_the_prior(images: Tensor, labels: Tensor) -> None:
    answer = attacked(noisy(10.0), images, labels)
    assert answer.method == "gauss-newton"
    floor = psnr(answer.floors["prior"], images)
    assert psnr(answer.images, images) == pytest.approx(floor, abs=0.5)


def test_noise_in_units_of_the_mean_gradient() -> None:
    cases = [
        (noisy(0.5, 2.0), 1.0),
        (noisy(0.5, None), 0.5),
        (noisy(0.5, 2.0, training=stepping(4)), 1.0 / (0.02 * 4)),
        (noisy(0.5, 2.0, unit="sample"), 0.5),
        (noisy(0.5, 2.0, unit="sample", training=stepping(4, batch_size=1)), 0.5),
    ]
    for scene, expected in cases:
        assert defences.noise(observed(scene, PAIR, LABELS)[0]) == pytest.approx(expected)
    assert defences.noise(observed(declared("prune"), IMAGE, LABEL)[0]) == 0


def test_a_memory_follows_the_clipped_update() -> None:
    scene = noisy(0.0, 0.3)
    scene = dataclasses.replace(
        scene, compression=scene.compression.model_copy(update={"error_feedback": True})
    )
    seen, memory = observed(scene, IMAGE, LABEL)
    followed = Remembered()
    followed.follow(seen, IMAGE, LABEL)
    carry = followed.evidence(seen).carried
    assert carry is not None
    torch.testing.assert_close(carry.float(), memory.tensors["residual"], rtol=1e-3, atol=1e-7)


# Pruning


@pytest.mark.parametrize("name", ["prune", "soteria"])
@pytest.mark.parametrize("rate", [0.15, 1.0])
def test_pruned_entries_say_nothing(name: str, rate: float) -> None:
    answer = attacked(declared(name, rate=rate))
    assert answer.method == "gauss-newton"
    assert answer.details["explained"]
    assert psnr(answer.images, IMAGE) > 40


def test_only_zeros_are_left_out() -> None:
    seen, _ = observed(declared("prune", rate=1.0, share=0.9, scope="global"), IMAGE, LABEL)
    known = defences.known_entries(seen)
    assert known.update.indices is not None
    assert known.update.kept == int((seen.update.values != 0).sum())
    assert torch.equal(torch.cat([t.flatten() for t in known.update.dense().values()]), seen.update.values)
    assert (known.scenario.compression.name, known.scenario.compression.scope) == ("topk", "global")
    plain = observed(noisy(0.1), IMAGE, LABEL)[0]
    assert defences.known_entries(plain) is plain


def test_soteria_on_a_batch_is_not_solved_for() -> None:
    seen, _ = observed(declared("soteria"), PAIR, LABELS)
    with pytest.raises(NotApplicable, match=r"'soteria' .* use training.batch_size 1"):
        HCGLA(method="gauss-newton").run([seen], 0, CPU)


# Attacks that match


def test_matching_looks_at_directions_where_lengths_are_hidden() -> None:
    seen, _ = observed(noisy(0.001), IMAGE, LABEL)
    (answer,) = DLG(iterations=2).run([seen], 0, CPU)
    assert "clipping hides" in answer.details["notes"]
    (asked,) = DLG(iterations=2, objective="l2").run([seen], 0, CPU)
    (cosine,) = InvertingGradients(iterations=2).run([seen], 0, CPU)
    for one in (asked, cosine):
        assert "clipping" not in one.details["notes"]
    (matched,) = HCGLA(method="matching", iterations=2).run([seen], 0, CPU)
    assert matched.details["matching.objective"] == "cosine"


def test_the_matrix_free_solver_refuses_an_unknown_length() -> None:
    with pytest.raises(NotApplicable, match="clip_norm"):
        GaussNewton().check(noisy(0.001))
    GaussNewton().check(noisy(0.001, None))
