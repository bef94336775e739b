"""The classic optimisation attacks: their recipes, what they recover, and what they refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hcgla_scenes import observe, psnr, scenario, smooth_images
from torch import Tensor

from adversaries import ATTACKS
from adversaries.reconstruction.matching.base import OptimisationAttack
from adversaries.reconstruction.matching.cpl import CPL
from adversaries.reconstruction.matching.dlg import DLG
from adversaries.reconstruction.matching.gradinversion import GradInversion
from adversaries.reconstruction.matching.idlg import IDLG
from adversaries.reconstruction.matching.inverting_gradients import SEMSIM, InvertingGradients
from adversaries.reconstruction.matching.sapag import SAPAG
from adversaries.reconstruction.matching.tag import TAG
from fedattack.config import TrainingConfig
from fedattack.errors import ConfigError, NotApplicable, PayloadError
from fedattack.models import build_model
from fedattack.observation import Auxiliary, Observation, Reconstruction
from fedattack.registry import build_plugin
from fedattack.rng import torch_rng
from fedattack.training import local_update

CPU = torch.device("cpu")
NAMES = ("dlg", "idlg", "ig", "sapag", "cpl", "tag", "gradinversion")


def victims(count: int, batch: int = 1, **how: object) -> tuple[list[Observation], list[Tensor]]:
    """Updates of 8x8 images of distinct labels under a sigmoid LeNet with five classes."""
    scene = scenario(5, size=8, **({"name": "none"} | how))
    images = smooth_images(count * batch, 8).split(batch)
    labels = (torch.arange(count * batch) % 5).split(batch)
    seen = [
        observe(scene, x, y, client=client) for client, (x, y) in enumerate(zip(images, labels, strict=True))
    ]
    return seen, list(images)


def attack_of(name: str, **settings: object) -> OptimisationAttack:
    cls = ATTACKS.get(name)
    assert issubclass(cls, OptimisationAttack)
    made = build_plugin(cls, name, settings, {})
    assert isinstance(made, OptimisationAttack)
    return made


def figures(answers: list[Reconstruction], truth: list[Tensor]) -> list[float]:
    return [psnr(answer.images, images) for answer, images in zip(answers, truth, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_can_be_chosen_by_name(name: str) -> None:
    cls = ATTACKS.get(name)
    assert issubclass(cls, OptimisationAttack)
    assert "published" in cls.recipes
    for preset in cls.recipes:
        assert attack_of(name, preset=preset).recipe() == cls.recipes[preset]
    with pytest.raises(ConfigError, match="did you mean 'published'"):
        attack_of(name, preset="publishd")


# cost, optimiser, learning rate, restarts, iterations, total variation, clamped, start
TABLE = {
    "inversed": ("cosine", "signed-adam", 0.1, 1, 8000, 1e-4, True, "random"),
    "inversed-zero": ("cosine", "signed-adam", 0.1, 1, 4800, 1e-4, True, "grey"),
    "inversed-sim-out": ("row-cosine", "signed-adam", 0.1, 1, 4800, 1e-4, True, "grey"),
    "inversed-sgd-sim": ("cosine", "signed-sgd", 0.01, 1, 4800, 1e-4, True, "random"),
    "inversed-LBFGS-sim": ("cosine", "signed-lbfgs", 1e-4, 16, 300 * 20, 1e-4, True, "random"),
    "inversed-adam-L1": ("l1", "signed-adam", 0.1, 1, 4800, 1e-4, True, "random"),
    "inversed-adam-L2": ("masked-l2", "signed-adam", 0.1, 1, 4800, 1e-4, True, "random"),
    "zhu": ("masked-l2", "lbfgs", 1e-4, 2, 50 * 20, 1e-3, False, "random"),
    "inversed_large": ("cosine", "signed-adam", 0.1, 1, 12_000, 1e-2, True, "random"),
    "inversed_large_24000_3_lr1": ("cosine", "signed-adam", 0.1, 4, 24_000, 1e-1, True, "random"),
    "inversed_large_12000_3_lr1": ("cosine", "signed-adam", 0.1, 3, 12_000, 1e-1, True, "random"),
    "inversed_large_8000_3_lr1": ("cosine", "signed-adam", 0.1, 3, 8000, 1e-1, True, "random"),
    "inversed_cele": ("cosine", "signed-adam", 0.1, 3, 12_000, 1e-1, True, "random"),
}


def test_the_semsim_presets_are_what_the_benchmark_runs() -> None:
    assert SEMSIM.keys() == TABLE.keys()
    assert SEMSIM.keys() <= InvertingGradients.recipes.keys()
    for name, recipe in SEMSIM.items():
        m = recipe.matching
        found = (m.objective, m.optimiser, m.learning_rate, recipe.restarts, m.iterations, recipe.tv, m.clamp)
        assert (*found, recipe.start) == TABLE[name]
    assert SEMSIM["inversed-sgd-sim"].matching.momentum == 0.9
    published = DLG().recipe()
    assert (published.matching.learning_rate, published.tv, published.labels) == (1.0, 0.0, "joint")


def test_dlg_recovers_images_and_answers_the_labels_it_optimised() -> None:
    seen, truth = victims(2)
    answers = DLG(iterations=120, restarts=2).run(seen, 0, CPU)
    assert min(figures(answers, truth)) > 30
    assert [answer.labels.tolist() for answer in answers] == [[0], [1]]
    assert all("optimised" in answer.details["labels"] for answer in answers)


def test_idlg_recovers_images() -> None:
    seen, truth = victims(2)
    answers = IDLG(iterations=100, restarts=4).run(seen, 0, CPU)
    assert min(figures(answers, truth)) > 40
    losses = answers[0].details["losses of restarts"]
    assert len(losses) == 4
    assert answers[0].details["restart"] == int(np.argmin(losses))


@pytest.mark.parametrize("cls", [DLG, IDLG, CPL, InvertingGradients])
def test_backtracking_from_standardised_noise_does_not_fail(cls: type[OptimisationAttack]) -> None:
    seen, truth = victims(3)
    answers = cls(preset="backtracking", iterations=80, tv=0.0).run(seen, 0, CPU)
    assert min(figures(answers, truth)) > 25
    assert [answer.labels.tolist() for answer in answers] == [[0], [1], [2]]


def test_inverting_gradients_is_the_published_loop() -> None:
    """Against a plain loop: autograd twice, torch's Adam and schedule, one victim, from the same start."""
    (seen,), _ = victims(1)
    (found,) = InvertingGradients(iterations=40, tv=1e-2).run([seen], 3, CPU)
    module = build_model(seen.scenario.model)
    module.load_state_dict(seen.weights)
    target = torch.cat([part.flatten() for part in seen.update.dense().values()])
    x = torch.randn(1, 1, 3, 8, 8, generator=torch_rng(3, "matching-start", 1, 0))[0].requires_grad_()
    adam = torch.optim.Adam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [15, 25, 35], gamma=0.1)
    best, losses = x.detach(), []
    for _ in range(41):
        logits = module(0.5 + 0.25 * x)
        parts = torch.autograd.grad(
            F.cross_entropy(logits, torch.tensor([0])), list(module.parameters()), create_graph=True
        )
        cosine = F.cosine_similarity(torch.cat([part.flatten() for part in parts]), target, dim=0)
        loss = 1 - cosine + 1e-2 * (x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean())
        losses.append(float(loss.detach()))
        if losses[-1] == min(losses):
            best = x.detach().clone()
        x.grad = torch.autograd.grad(loss, x)[0].sign()
        adam.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(-2, 2)
    torch.testing.assert_close(torch.tensor(found.history), torch.tensor(losses), atol=2e-3, rtol=2e-2)
    assert found.loss == pytest.approx(min(losses), rel=0.02)
    assert psnr(found.images, 0.5 + 0.25 * best) > 30


@pytest.mark.parametrize(
    ("attack", "share"),
    [
        (TAG(iterations=100), 0.7),
        (CPL(iterations=60, restarts=4), 0.7),
        (InvertingGradients(preset="inversed-sim-out", iterations=100), 0.7),
        (InvertingGradients(preset="inversed-sgd-sim", iterations=100), 0.7),
        # L-BFGS with learning rate 1e-4 hardly moves: that is what the benchmark runs.
        (InvertingGradients(preset="inversed-LBFGS-sim", iterations=20, restarts=2), 0.999),
        (InvertingGradients(preset="zhu", iterations=20), 0.999999),
    ],
    ids=lambda value: (
        f"{type(value).__name__}-{value.preset}" if isinstance(value, OptimisationAttack) else ""
    ),
)
def test_each_gets_nearer_to_the_update(attack: OptimisationAttack, share: float) -> None:
    (seen,), _ = victims(1)
    (answer,) = attack.run([seen], 0, CPU)
    assert min(answer.history) < share * answer.history[0]
    assert answer.labels.tolist() == [0]
    assert answer.images.shape == (1, 3, 8, 8)
    assert float(answer.images.min()) >= 0
    assert float(answer.images.max()) <= 1


def test_sapag_recovers_an_image() -> None:
    seen, truth = victims(2)
    assert min(figures(SAPAG(iterations=100).run(seen, 0, CPU), truth)) > 30


def test_cpls_label_term_counts() -> None:
    (seen,), _ = victims(1)
    losses = {}
    for weight in (0.0, 1.0):
        (answer,) = CPL(iterations=1, label_weight=weight).run([seen], 0, CPU)
        losses[weight] = answer.history[0]
    squared = float(seen.update.values.square().sum())
    # |p - e_y|^2 is at most 2, in units of the update's squared norm
    assert 0 < losses[1.0] - losses[0.0] < 2 * squared
    with pytest.raises(ConfigError, match="label_weight"):
        CPL(label_weight=-1.0)


def test_answers_are_repeatable_and_know_no_global_state() -> None:
    seen, _ = victims(2)
    attack = InvertingGradients(iterations=15, restarts=2)
    torch.manual_seed(0)
    first = attack.run(seen, 5, CPU)
    torch.manual_seed(1)
    again, other = attack.run(seen, 5, CPU), attack.run(seen, 6, CPU)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert (a.loss, a.history, a.details) == (b.loss, b.history, b.details)
        assert not torch.equal(a.images, c.images)


def test_batches_of_different_sizes_are_answered_in_order() -> None:
    (one, *_), _ = victims(1)
    (two,), _ = victims(1, batch=2)
    scene = dataclasses.replace(one.scenario, training=two.scenario.training)
    mixed = [two, dataclasses.replace(one, scenario=scene, client=1), dataclasses.replace(two, client=2)]
    told: list[float] = []
    answers = InvertingGradients(iterations=10).run(mixed, 0, CPU, lambda share, text: told.append(share))
    assert [len(answer.images) for answer in answers] == [2, 1, 2]
    assert [answer.labels.tolist() for answer in answers] == [[0, 1], [0], [0, 1]]
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_repeated_labels_get_different_starts() -> None:
    scene = scenario(5, size=8, name="none")
    seen = observe(scene, smooth_images(2, 8), torch.tensor([3, 3]))
    (answer,) = InvertingGradients(preset="inversed-zero", iterations=5).run([seen], 0, CPU)
    assert answer.labels.tolist() == [3, 3]
    assert not torch.equal(answer.images[0], answer.images[1])


def test_floors_are_what_needs_no_update() -> None:
    (seen,), _ = victims(1)
    public = Auxiliary(smooth_images(20, 8, seed=5), torch.arange(20) % 5)
    (answer,) = DLG(iterations=2).run([dataclasses.replace(seen, auxiliary=public)], 0, CPU)
    assert answer.floors.keys() == {"prior", "label alone"}
    torch.testing.assert_close(answer.floors["prior"][0], public.images.mean(0))
    (alone,) = DLG(iterations=2).run([seen], 0, CPU)
    assert alone.floors.keys() == {"prior"}
    assert bool((alone.floors["prior"] == 0.5).all())


def test_simulated_local_steps_beat_one_gradient() -> None:
    training = TrainingConfig(
        protocol="fedavg", local_steps=4, learning_rate=0.05, momentum=0.3, weight_decay=1e-3
    )
    seen, truth = victims(2, training=training)
    how = {"iterations": 25, "tv": 1e-3, "optimizer": "lbfgs", "start": "grey"}
    unrolled, ignored = (
        attack_of("ig", local_steps=steps, **how).run(seen, 0, CPU) for steps in ("unrolled", "ignored")
    )
    assert np.mean(figures(unrolled, truth)) > np.mean(figures(ignored, truth)) + 1
    assert "mean gradient" in ignored[0].details["notes"]
    assert ignored[0].loss > 2 * unrolled[0].loss


def test_one_local_step_is_one_gradient() -> None:
    training = TrainingConfig(protocol="fedavg", learning_rate=0.05, weight_decay=1e-3)
    (delta,), _ = victims(1, training=training)
    (gradient,), _ = victims(1)
    found, wanted = (IDLG(iterations=3).run([seen], 0, CPU)[0] for seen in (delta, gradient))
    assert found.history == pytest.approx(wanted.history, rel=1e-2)


def test_signs_bring_their_own_objective() -> None:
    (seen,), _ = victims(1, name="sign")
    (answer,) = InvertingGradients(iterations=60, start="grey").run([seen], 0, CPU)
    assert answer.details["matching.objective"] == "sign"
    assert "only signs were sent" in answer.details["notes"]
    assert answer.labels.tolist() == [0]
    assert answer.loss < 0.3 * answer.history[0]


@pytest.mark.parametrize("compression", [{"name": "topk", "rate": 0.3}, {"name": "qsgd"}])
def test_compressed_updates_are_matched_where_they_were_sent(compression: dict) -> None:
    (seen,), _ = victims(1, **compression)
    (answer,) = InvertingGradients(iterations=60, start="grey").run([seen], 0, CPU)
    assert answer.details["kept"] == seen.update.kept
    assert answer.loss < 0.5 * answer.history[0]


def test_gradinversion_aims_at_the_batchs_own_statistics() -> None:
    scene = scenario(5, size=8, model="resnet20", activation="relu", name="none")
    images, labels = smooth_images(2, 8), torch.tensor([1, 3])
    seen = observe(scene, images, labels)
    sent = local_update(
        build_model(scene.model), seen.weights, images, labels, [np.arange(2)], seen.scenario.training
    )
    seen = dataclasses.replace(seen, buffers=sent.buffers)
    (answer,) = GradInversion(iterations=3, restarts=2).run([seen], 0, CPU)
    assert answer.labels.tolist() == [1, 3]
    assert answer.details["matching.regularisers"].keys() == {"l2", "batch-norm", "group", "tv1"}
    assert len(answer.details["losses of restarts"]) == 2


@pytest.mark.parametrize(
    ("name", "batch", "how", "reason"),
    [
        ("idlg", 4, {}, "one label"),
        ("gradinversion", 1, {"name": "none"}, "BatchNorm"),
        ("gradinversion", 1, {"model": "resnet20", "activation": "relu"}, "leaves entries out"),
        ("gradinversion", 6, {"model": "resnet20", "activation": "relu"}, "distinct"),
        ("ig", 1, {"name": "dgc", "clip_norm": 1.0}, "clip_norm"),
        (
            "ig",
            1,
            {"name": "sign", "training": TrainingConfig(protocol="fedavg", weight_decay=0.1)},
            "weight_decay = 0.1",
        ),
    ],
)
def test_scenarios_that_cannot_work_are_refused_before_anything_starts(
    name: str, batch: int, how: dict, reason: str
) -> None:
    training = how.get("training") or TrainingConfig()
    scene = scenario(5, size=8, **how)
    scene = dataclasses.replace(scene, training=training.model_copy(update={"batch_size": batch}))
    with pytest.raises(NotApplicable, match=reason):
        attack_of(name).check(scene)


def test_held_back_residuals_are_refused() -> None:
    (seen,), _ = victims(1, name="topk", rate=0.3, error_feedback=True)
    with pytest.raises(NotApplicable, match="round 2"):
        InvertingGradients(iterations=2).run([dataclasses.replace(seen, round=2)], 0, CPU)


def test_more_examples_than_agreed_are_refused() -> None:
    (seen,), _ = victims(1)
    with pytest.raises(PayloadError, match="declares 7 examples"):
        DLG(iterations=2).run([dataclasses.replace(seen, num_examples=7)], 0, CPU)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"iterations": 0}, "iterations"),
        ({"restarts": 0}, "restarts"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"tv": -1.0}, "tv"),
        ({"start": "gray"}, "start"),
        ({"labels": "idgl"}, "label strategy"),
        ({"objective": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        attack_of("ig", **settings)


def test_settings_replace_the_presets() -> None:
    recipe = attack_of(
        "ig", preset="inversed-sgd-sim", optimizer="lbfgs", tv=0.0, labels="llg", restarts=2
    ).recipe()
    assert (recipe.matching.optimiser, recipe.matching.learning_rate, recipe.matching.momentum) == (
        "lbfgs",
        1.0,
        0,
    )
    assert (recipe.tv, recipe.labels, recipe.restarts) == (0.0, "llg", 2)
