"""The matching engine's choices: labels, optimisers, regularisers, charts, refusals, and going on after a kill."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hcgla_scenes import observe, psnr, scenario, smooth_images
from torch import Tensor, nn

from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.gradients import AutogradGradients, Prediction, schedule_for
from adversaries.inversion.gradients.sent import lay_out
from adversaries.inversion.matching import checkpoint as keeping
from adversaries.inversion.matching import match as match_module
from adversaries.inversion.matching.charts import Latent, LatentBall, NetworkWeights, project_l1
from adversaries.inversion.matching.match import Match, Matching, match
from adversaries.inversion.matching.objectives import OBJECTIVES
from adversaries.inversion.matching.settings import Optimiser
from fedattack.config import TrainingConfig
from fedattack.errors import ConfigError, NotApplicable, PayloadError
from fedattack.models import build_model
from fedattack.models.decoders.from_latent import ImageGenerator
from fedattack.observation import Observation

CPU = torch.device("cpu")
SIZE, CLASSES = 8, 6
FIRST_ORDER = Matching(
    objective="cosine", optimiser="signed-adam", learning_rate=0.02, iterations=20, regularisers={"tv1": 1e-3}
)


def client(number: int = 0, **settings: Any) -> Observation:
    """One image of label 1 + number, full gradient unless told otherwise."""
    scene = scenario(CLASSES, size=SIZE, **({"name": "none"} | settings))
    return observe(scene, smooth_images(1, SIZE, seed=10 + number), torch.tensor([1 + number]), client=number)


def truth(number: int = 0) -> Tensor:
    return smooth_images(1, SIZE, seed=10 + number)


def labels(count: int) -> Tensor:
    return torch.arange(1, 1 + count)[:, None]


def begin(restarts: int, count: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(restarts, count, 1, 3, SIZE, SIZE, generator=generator)


def same(one: Match, other: Match) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and (one.loss, one.history, one.restart, one.recoveries, one.losses)
        == (other.loss, other.history, other.restart, other.recoveries, other.losses)
    )


# Labels


def test_joint_labels_are_the_optimised_ones() -> None:
    seen = [client(0), client(3)]
    generator = torch.Generator().manual_seed(0)
    settings = Matching(labels="joint", iterations=100)
    logits = torch.randn(3, 2, 1, CLASSES, generator=generator)
    found = match(seen, None, begin(3, 2), settings, CPU, label_starts=logits)
    assert [one.labels.tolist() for one in found] == [[1], [4]]
    assert [int(logits[one.restart, v].argmax()) for v, one in enumerate(found)] != [1, 4]
    assert psnr(found[0].images, truth(0)) > 25
    with pytest.raises(ConfigError, match="label starts"):
        match(seen, None, begin(1, 2), settings, CPU)
    with pytest.raises(ConfigError, match="infer them"):
        match(seen, None, begin(1, 2), Matching(), CPU)


def test_restarts_bring_their_losses() -> None:
    (found,) = match([client()], labels(1), begin(3, 1), FIRST_ORDER, CPU)
    assert found.loss == min(found.losses) == found.losses[found.restart]
    assert found.loss == pytest.approx(min(found.history))
    assert found.labels.tolist() == [1]


# Optimisers


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "sign"])
@pytest.mark.parametrize("optimiser", ["lbfgs", "adam", "signed-adam", "signed-sgd"])
def test_every_objective_falls_under_every_optimiser(objective: str, optimiser: Optimiser) -> None:
    settings = Matching(
        objective=objective, optimiser=optimiser, iterations=25, regularisers={"tv2": 1e-3, "l2": 1e-5},
        learning_rate=1.0 if optimiser == "lbfgs" else 0.01,
    )  # fmt: skip
    grey = torch.full((1, 1, 1, 3, SIZE, SIZE), 0.5)
    (found,) = match([client(name="topk", rate=0.3)], labels(1), grey, settings, CPU)
    assert found.loss < 0.8 * found.history[0]


def test_inverting_gradients_is_the_plain_loop() -> None:
    seen = client()
    module = build_model(seen.scenario.model)
    module.load_state_dict(seen.weights)
    target = seen.update.values
    x = begin(1, 1)[0, 0].clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.05)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [4, 7, 10], gamma=0.1)
    losses = []
    for iteration in range(13):
        loss = F.cross_entropy(module(x), torch.tensor([1]))
        gradients = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        cost = 1 - F.cosine_similarity(torch.cat([g.flatten() for g in gradients]), target, dim=0)
        cost = cost + 0.02 * (x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean())
        losses.append(float(cost.detach()))
        if iteration < 12:
            x.grad = torch.autograd.grad(cost, x)[0].sign()
            optimiser.step()
            schedule.step()
            x.data.clamp_(0, 1)
    settings = Matching(
        objective="cosine", optimiser="signed-adam", learning_rate=0.05, iterations=12, clamp=True,
        regularisers={"tv1": 0.02},
    )  # fmt: skip
    (found,) = match([seen], labels(1), begin(1, 1), settings, CPU)
    assert found.history == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("optimiser", "rate", "extra"),
    [("sgd", 3.0, {"momentum": 0.9}), ("signed-lbfgs", 0.05, {"line_search": "none"})],
)
def test_the_rarer_optimisers_fall_too(optimiser: Optimiser, rate: float, extra: dict[str, Any]) -> None:
    settings = Matching(objective="cosine", optimiser=optimiser, learning_rate=rate, iterations=60, **extra)
    (found,) = match([client()], labels(1), begin(1, 1), settings, CPU)
    assert found.loss < 0.9 * found.history[0]


@pytest.mark.parametrize("optimiser", ["signed-adam", "sgd", "adam"])
def test_rows_do_not_depend_on_their_companions(optimiser: Optimiser) -> None:
    seen = [client(number) for number in range(3)]
    settings = dataclasses.replace(FIRST_ORDER, optimiser=optimiser, noise=0.1, clamp=True, patience=5)
    together = match(seen, labels(3), begin(2, 3), settings, CPU, seed=4)
    alone = match(seen[1:2], labels(3)[1:2], begin(2, 3)[:, 1:2], settings, CPU, seed=4)
    torch.testing.assert_close(alone[0].images, together[1].images, rtol=0, atol=1e-4)
    assert len(set(together[1].losses)) == 2


def test_noise_comes_from_the_seed() -> None:
    settings = dataclasses.replace(FIRST_ORDER, noise=0.2)

    def run(seed: int, settings: Matching = settings) -> Match:
        return match([client()], labels(1), begin(1, 1), settings, CPU, seed=seed)[0]

    assert same(run(1), run(1))
    assert not same(run(1), run(2))
    assert not same(run(1), run(1, FIRST_ORDER))


@pytest.mark.parametrize("parametrisation", ["pixels", "standardised"])
@pytest.mark.parametrize("optimiser", ["signed-adam", "lbfgs"])
def test_clamped_pixels_stay_in_their_range(parametrisation: Any, optimiser: Optimiser) -> None:
    rate = 0.3 if optimiser == "signed-adam" else 1.0
    settings = Matching(
        parametrisation=parametrisation, optimiser=optimiser, learning_rate=rate, iterations=10, clamp=True
    )
    (found,) = match([client()], labels(1), begin(1, 1), settings, CPU)
    assert -1e-6 <= float(found.images.min()) <= float(found.images.max()) <= 1 + 1e-6
    assert found.loss < found.history[0]


def test_patience_ends_a_victim_that_makes_no_progress() -> None:
    settings = dataclasses.replace(FIRST_ORDER, learning_rate=1e-9, iterations=200, patience=12)
    (found,) = match([client()], labels(1), begin(1, 1), settings, CPU)
    assert 12 <= len(found.history) - 1 <= 22
    falling = dataclasses.replace(FIRST_ORDER, iterations=40, patience=12)
    (found,) = match([client()], labels(1), begin(1, 1), falling, CPU)
    assert len(found.history) == 41


def test_victims_that_have_finished_cost_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scenario(4, name="none", model="mlp", size=SIZE)
    seen = [observe(scene, truth(number), torch.tensor([1 + number]), client=number) for number in range(2)]
    asked: list[slice] = []

    class Counted(AutogradGradients):
        joint = False

        def predict(self, images: Tensor, victims: slice, **wanted: Any) -> Prediction:
            asked.append(victims)
            return super().predict(images, victims, **wanted)

    def build(rows: list[Observation], y: Tensor, **settings: Any) -> Counted:
        model, updates = rows[0].scenario.model, [row.update for row in rows]
        return Counted(model, rows[0].weights, lay_out(updates, "all", CPU), y, "train")

    monkeypatch.setattr(match_module, "gradient_model", build)
    start = torch.cat([truth(0)[None, None] + 1e-4, begin(1, 1)], 1)
    settings = Matching(optimiser="adam", learning_rate=1e-6, iterations=60, stop=1e-2, transform_every=30)
    done, running = match(seen, labels(2), start, settings, CPU, transform=lambda images: images)
    assert len(running.history) == 61
    assert done.loss < 1e-2 < running.loss
    first, second = (sum(part.start == row for part in asked) for row in range(2))
    assert second == 62
    assert first < 6


# Regularisers


def test_group_consistency_draws_the_restarts_together() -> None:
    def spread(weight: float) -> float:
        images: list[Tensor] = []

        def look(drawn: Tensor, shares: Tensor | None, rows: slice) -> Tensor:
            images[:] = [drawn.detach()]
            return drawn.new_zeros(len(drawn))

        terms = {"tv1": 1e-3, "group": weight}
        settings = dataclasses.replace(FIRST_ORDER, regularisers=terms, iterations=30)
        match([client()], labels(1), begin(4, 1), settings, CPU, penalty=look)
        return float(images[0].std(0).mean())

    assert spread(10.0) < 0.5 * spread(0.0)
    settings = dataclasses.replace(FIRST_ORDER, regularisers={"group": 1.0})
    with pytest.raises(ConfigError, match="2 or more restarts"):
        match([client()], labels(1), begin(1, 1), settings, CPU)


def test_units_say_what_a_weight_is_measured_in() -> None:
    seen = client()
    square = float(seen.update.values.square().sum())
    relative = Matching(iterations=3, regularisers={"tv2": 0.5})
    absolute = dataclasses.replace(relative, units="absolute", regularisers={"tv2": 0.5 * square})
    one, other = (match([seen], labels(1), begin(1, 1), s, CPU)[0] for s in (relative, absolute))
    assert one.history == pytest.approx(other.history, rel=1e-4)


def test_a_penalty_of_the_attacks_own_is_obeyed() -> None:
    def bright(images: Tensor, shares: Tensor | None, rows: slice) -> Tensor:
        assert shares is None
        assert len(images) == rows.stop - rows.start
        return 100 * (1 - images).square().flatten(1).mean(1)

    settings = Matching(objective="cosine", iterations=40)
    (plain,) = match([client()], labels(1), begin(1, 1), settings, CPU)
    (pushed,) = match([client()], labels(1), begin(1, 1), settings, CPU, penalty=bright)
    assert float(pushed.images.mean()) > float(plain.images.mean()) + 0.2


def test_batch_norm_statistics_help_to_find_the_batch() -> None:
    scene = scenario(5, rate=0.1, model="resnet20", activation="relu", size=SIZE)
    private, y = smooth_images(2, SIZE), torch.tensor([1, 2])
    seen = observe(scene, private, y)
    settings = Matching(
        objective="cosine",
        optimiser="adam",
        learning_rate=0.02,
        iterations=3,
        regularisers={"batch-norm": 1e-3},
    )
    start = torch.full((1, 1, 2, 3, SIZE, SIZE), 0.5)
    (found,) = match([seen], y[None], start, settings, CPU)
    assert found.loss < found.history[0]
    plain = scenario(CLASSES, size=SIZE)
    with pytest.raises(NotApplicable, match="no BatchNorm"):
        match([observe(plain, private, y)], y[None], start, settings, CPU)


# Charts that networks draw


class Painter(nn.Module):
    """Five numbers to an image, through a fixed linear map and a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.map = nn.Linear(5, 3 * SIZE * SIZE)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(3 * self.map(z)).unflatten(1, (3, SIZE, SIZE))


def test_a_generators_latent_space_is_searched() -> None:
    painter = Painter()
    hidden = torch.tensor([[1.0, -1.0, 0.5, 2.0, -0.3]])
    image = painter(hidden).detach()
    seen = observe(scenario(CLASSES, size=SIZE, name="none"), image, torch.tensor([2]))
    chart = Latent(painter, (5,), 1, CPU)
    starts = chart.start(torch.Generator().manual_seed(0), 2, 1)
    assert starts.shape == (2, 1, 5)
    (found,) = match([seen], torch.tensor([[2]]), starts, Matching(iterations=50), CPU, chart=chart)
    assert psnr(found.images, image) > 40
    assert all(parameter.requires_grad for parameter in painter.parameters())
    priced = Latent(painter, (5,), 1, CPU, prior=10.0)
    (shy,) = match([seen], torch.tensor([[2]]), starts, Matching(iterations=50), CPU, chart=priced)
    assert float((shy.images - 0.5).abs().mean()) < float((found.images - 0.5).abs().mean())
    with pytest.raises(ConfigError, match="clamp"):
        match([seen], torch.tensor([[2]]), starts, FIRST_ORDER_CLAMPED, CPU, chart=chart)
    transformed = Matching(iterations=4, transform_every=2)
    with pytest.raises(ConfigError, match="cannot start from images"):
        match([seen], torch.tensor([[2]]), starts, transformed, CPU, chart=chart, transform=lambda x: x)


FIRST_ORDER_CLAMPED = dataclasses.replace(FIRST_ORDER, clamp=True)


def test_a_latent_ball_is_not_left() -> None:
    centre = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(1))
    chart = LatentBall(Painter(), (5,), 1, CPU, centre, radius=0.5)
    starts = chart.start(torch.Generator(), 2, 1)
    torch.testing.assert_close(starts, centre)
    drawn: list[Tensor] = []

    class Watched(LatentBall):
        def images(self, variables: Tensor) -> Tensor:
            drawn.append(variables.detach())
            return super().images(variables)

    watched = Watched(Painter(), (5,), 1, CPU, centre, radius=0.5)
    match([client()], labels(1), starts, FIRST_ORDER, CPU, chart=watched)
    distances = torch.cat([(z - centre.flatten(0, 1)).abs().sum(1) for z in drawn if len(z) == 2])
    assert float(distances.max()) <= 0.5 + 1e-5
    assert float(distances.max()) > 0.4
    with pytest.raises(ConfigError, match="radius"):
        LatentBall(Painter(), (5,), 1, CPU, centre, radius=0.0)


def test_the_projection_on_an_l1_ball_is_the_nearest_point() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 4, generator=generator)
    found = project_l1(x, 1.0)
    assert float(found.abs().sum(1).max()) <= 1 + 1e-6
    others = project_l1(torch.randn(5000, 4, generator=generator), 1.0)
    nearest = torch.cdist(x, others).amin(1)
    assert bool(((x - found).norm(dim=1) <= nearest + 1e-6).all())
    inside = 0.1 * x
    torch.testing.assert_close(project_l1(inside, 2.0), inside)


def test_a_deep_image_prior_is_fitted() -> None:
    network = ImageGenerator(16, (3, SIZE, SIZE), width=16)
    noise = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    chart = NetworkWeights(network, noise, CPU)
    starts = chart.start(torch.Generator().manual_seed(5), 1, 2)
    assert torch.equal(starts, chart.start(torch.Generator().manual_seed(5), 1, 2))
    assert not torch.equal(starts[0, 0], starts[0, 1])
    settings = Matching(objective="cosine", optimiser="adam", learning_rate=0.01, iterations=25)
    seen = [client(0), client(1)]
    together = match(seen, labels(2), starts, settings, CPU, chart=chart)
    assert all(one.loss < 0.5 * one.history[0] for one in together)
    assert all(0 <= float(one.images.min()) <= float(one.images.max()) <= 1 for one in together)
    (alone,) = match(seen[1:], labels(2)[1:], starts[:, 1:], settings, CPU, chart=chart)
    torch.testing.assert_close(alone.images, together[1].images, rtol=0, atol=1e-3)
    with pytest.raises(ConfigError, match="running statistics"):
        NetworkWeights(nn.Sequential(nn.BatchNorm2d(3)), noise, CPU)


# What was sent


def test_signs_are_matched() -> None:
    seen = client(name="sign")
    with pytest.raises(NotApplicable, match="sign"):
        one_gradient.as_gradient(seen)
    seen = dataclasses.replace(seen, update=one_gradient.as_gradient(seen, signs=True))
    # A gradient has no cosine of 1 with its own signs.
    for objective, share in (("sign", 0.7), ("cosine", 0.95)):
        settings = Matching(objective=objective, optimiser="adam", learning_rate=0.02, iterations=60)
        (found,) = match([seen], labels(1), begin(1, 1), settings, CPU)
        assert found.loss < share * found.history[0]
        if objective == "sign":
            assert psnr(found.images, truth()) > psnr(begin(1, 1)[0, 0], truth()) + 2


def test_local_steps_are_simulated() -> None:
    training = TrainingConfig(protocol="fedavg", local_steps=3, learning_rate=0.5)
    seen = client(training=training)
    settings = Matching(iterations=40)
    with pytest.raises(ValueError, match="as_gradient"):
        match([seen], labels(1), begin(1, 1), settings, CPU)
    schedule = schedule_for(seen.scenario, 1)
    (found,) = match([seen], labels(1), begin(1, 1), settings, CPU, unroll=schedule)
    assert psnr(found.images, truth()) > 25


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda values: torch.where(values > values.median(), torch.nan, values), "not finite"),
        (lambda values: torch.full_like(values, torch.inf), "not finite"),
        (torch.zeros_like, "zeros"),
    ],
)
def test_updates_that_say_nothing_are_refused(break_it: Callable[[Tensor], Tensor], named: str) -> None:
    seen = client(2)
    update = dataclasses.replace(seen.update, values=break_it(seen.update.values))
    with pytest.raises(PayloadError, match=f"client 2.*{named}"):
        match([dataclasses.replace(seen, update=update)], labels(1), begin(1, 1), Matching(), CPU)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer_weights": "heavy"}, "layer_weights"),
        ({"optimiser": "adamw"}, "adam"),
        ({"line_search": "weak"}, "line_search"),
        ({"regularisers": {"tv": 1.0}}, "tv1"),
        ({"momentum": 0.9}, "sgd"),
        ({"optimiser": "sgd", "momentum": 1.0}, "below 1"),
        ({"noise": 0.1}, "L-BFGS"),
        ({"clamp": True, "parametrisation": "box"}, "clamp"),
        ({"patience": -1}, "patience"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"memory": 0}, "memory"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Matching(**fields)


# Going on after a kill


class Killed(Exception):
    pass


def killed_after(share: float) -> Callable[[float, str], None]:
    def progress(done: float, text: str) -> None:
        if done >= share:
            raise Killed

    return progress


KINDS = {
    "lbfgs": Matching(iterations=40),
    "armijo": Matching(iterations=40, line_search="armijo", objective="cosine"),
    "torch": Matching(iterations=40, line_search="none", learning_rate=0.1, block=20),
    "signed-adam": dataclasses.replace(FIRST_ORDER, iterations=40, patience=40, clamp=True),
    "sgd": dataclasses.replace(FIRST_ORDER, iterations=40, optimiser="sgd", momentum=0.9, noise=0.1),
    "denoised": dataclasses.replace(FIRST_ORDER, iterations=40, transform_every=15),
}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "SHARE", math.inf)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    seen = [client(number) for number in range(2)]

    def run(progress: Any = match_module.no_progress, path: Path | None = None) -> list[Match]:
        def smooth(images: Tensor) -> Tensor:
            return F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)

        with keeping.checkpoints_in(path and path.parent, 0.0):
            return match(seen, labels(2), begin(2, 2), KINDS[kind], CPU, progress, transform=smooth, seed=1)

    unbroken = run()
    path = tmp_path / "folder" / "0001.safetensors"
    for share in (0.3, 0.7):
        with pytest.raises(Killed):
            run(killed_after(share), path)
        assert path.exists()
    shares: list[float] = []
    resumed = run(lambda share, _: shares.append(share), path)
    assert min(shares) > 0.6
    assert all(same(one, other) for one, other in zip(unbroken, resumed, strict=True))
    # A finished one answers again without another evaluation.
    again = run(killed_after(0.0), path)
    assert all(same(one, other) for one, other in zip(unbroken, again, strict=True))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.usefixtures("at_once")
def test_a_state_of_something_else_or_broken_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "0001.safetensors"

    def run(
        number: int = 0, settings: Matching = FIRST_ORDER, seed: int = 0, kept: bool = True
    ) -> list[Match]:
        with keeping.checkpoints_in(tmp_path if kept else None, 0.0):
            return match([client(number)], labels(1), begin(1, 1), settings, CPU, seed=seed)

    run()
    for other in ({"number": 1}, {"seed": 1}, {"settings": dataclasses.replace(FIRST_ORDER, iterations=21)}):
        caplog.clear()
        assert same(run(**other)[0], run(**other, kept=False)[0])
        assert "is of another problem" in caplog.text
    expected, whole = run(), path.read_bytes()
    for broken in (whole[:100], whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(broken)
        caplog.clear()
        assert same(run()[0], expected[0])
        assert "cannot be read" in caplog.text


@pytest.mark.usefixtures("at_once")
def test_a_full_disk_is_named_and_the_attack_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "0001.safetensors"
    with pytest.raises(Killed), keeping.checkpoints_in(tmp_path, 0.0):
        match([client()], labels(1), begin(1, 1), FIRST_ORDER, CPU, killed_after(0.4))
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with keeping.checkpoints_in(tmp_path, 0.0):
        found = match([client()], labels(1), begin(1, 1), FIRST_ORDER, CPU)
    assert caplog.text.count("no space left") == 1
    assert same(found[0], match([client()], labels(1), begin(1, 1), FIRST_ORDER, CPU)[0])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
