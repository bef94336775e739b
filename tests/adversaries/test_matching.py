"""The matching engine: back-ends, minimisers, objectives and their composition."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hcgla_scenes import observe, psnr, scenario, smooth_images
from torch import Tensor

from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.gradients import (
    AutogradGradients,
    ChainGradients,
    Prediction,
    Sent,
    gradient_model,
)
from adversaries.inversion.gradients.closed_form import describe
from adversaries.inversion.gradients.sent import lay_out
from adversaries.inversion.matching import pixels
from adversaries.inversion.matching.match import Matching, match
from adversaries.inversion.matching.objectives import OBJECTIVES, Layout
from adversaries.inversion.solvers.first_order import Adam, Sgd
from adversaries.inversion.solvers.lbfgs import Lbfgs
from adversaries.inversion.solvers.minimiser import LineSearch, Rules
from adversaries.reconstruction.hcgla.matching import published, settings_for
from fedattack.config import ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import Auxiliary, Observation, Scenario

CPU = torch.device("cpu")


def victims(
    scene: Scenario, count: int, batch: int = 1, labels: list[int] | None = None
) -> list[Observation]:
    assert scene.model.image_size is not None
    images = smooth_images(count * batch, scene.model.image_size)
    chosen = torch.tensor(labels or list(range(1, 1 + count * batch))).reshape(count, batch)
    return [observe(scene, images[v * batch : (v + 1) * batch], chosen[v], client=v) for v in range(count)]


def labels_of(count: int, batch: int) -> Tensor:
    return torch.arange(1, 1 + count * batch).reshape(count, batch)


def candidates(scene: Scenario, count: int, batch: int) -> Tensor:
    assert scene.model.image_size is not None
    size = scene.model.image_size
    return smooth_images(count * batch, size, seed=5).reshape(count, batch, 3, size, size)


def measure(objective: str, prediction: Prediction, sent: Sent) -> Tensor:
    return OBJECTIVES.get(objective).build(Layout(sent))(prediction, slice(0, len(sent.values)))


# Back-ends


def dense_entries(seen: Observation, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sent values and the plain gradient at the sent positions, both in the order of the update."""
    module = build_model(seen.scenario.model)
    module.load_state_dict(seen.weights)
    gradients = torch.autograd.grad(F.cross_entropy(module(images), labels), list(module.parameters()))
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    indices = torch.arange(len(flat)) if seen.update.indices is None else seen.update.indices
    return seen.update.values, flat[indices]


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize(
    ("classes", "batch", "settings"),
    [
        (30, 1, {"rate": 0.02}),
        (30, 3, {"rate": 0.02}),
        (30, 2, {"rate": 0.02, "scope": "layer"}),
        (12, 20, {"rate": 0.3}),  # a dense head, and the tall layout of its products
        (12, 1, {"name": "none"}),
        (30, 1, {"name": "randomk", "rate": 0.05}),
    ],
)
def test_back_ends_agree_with_each_other_and_with_autograd(
    classes: int, batch: int, settings: dict[str, object], layers: str
) -> None:
    scene = scenario(classes, size=16, **({"rate": 1.0} | settings))  # type: ignore[arg-type]
    seen = victims(scene, 2, batch, [(7 * i) % classes for i in range(2 * batch)])
    labels = torch.tensor([(7 * i) % classes for i in range(2 * batch)]).reshape(2, batch)
    images = candidates(scene, 2, batch)
    updates = [one.update for one in seen]
    layout = lay_out(updates, layers, CPU)  # type: ignore[arg-type]
    closed = ChainGradients(describe(scene.model), seen[0].weights, layout, labels)
    plain = AutogradGradients(scene.model, seen[0].weights, layout, labels, "train")
    assert torch.equal(closed.sent.values, plain.sent.values)
    assert torch.equal(closed.sent.valid, plain.sent.valid)
    slopes = []
    for model in (closed, plain):
        x = images.clone().requires_grad_()
        found = model.predict(x, slice(0, 2), whole=True)
        assert found.square is not None
        loss = measure("masked-l2", found, model.sent) + 0.1 * found.square
        slopes.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    torch.testing.assert_close(slopes[0][0], slopes[1][0], rtol=1e-4, atol=1e-7)
    assert float((slopes[0][1] - slopes[1][1]).norm() / slopes[1][1].norm()) < 1e-4
    if layers == "all":
        for v in range(2):
            sent, entries = dense_entries(seen[v], images[v], labels[v])
            found = closed.predict(images[v : v + 1], slice(v, v + 1))
            objective = measure("masked-l2", found, closed.sent[v : v + 1])
            assert float(objective) == pytest.approx(float((entries - sent).square().sum()), rel=1e-4)
            assert int(closed.sent.valid[v].sum()) == seen[v].update.kept


def test_the_norm_of_the_whole_gradient_includes_what_was_not_sent() -> None:
    scene = scenario(30, rate=0.02, size=16)
    (seen,) = victims(scene, 1, 2)
    images, labels = candidates(scene, 1, 2), labels_of(1, 2)
    module = build_model(scene.model)
    module.load_state_dict(seen.weights)
    gradients = torch.autograd.grad(F.cross_entropy(module(images[0]), labels[0]), list(module.parameters()))
    model = gradient_model([seen], labels, device=CPU)
    found = model.predict(images, slice(0, 1), whole=True)
    target = torch.cat([tensor.flatten() for tensor in seen.update.dense().values()])
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    assert found.square is not None
    assert float(found.square) == pytest.approx(float(flat.square().sum()), rel=1e-4)
    assert float(measure("l2", found, model.sent)) == pytest.approx(
        float((flat - target).square().sum()), rel=1e-4
    )


def test_last_layer_is_the_head_weight_alone() -> None:
    scene = scenario(30, rate=0.02, size=16)
    (seen,) = victims(scene, 1)
    model = gradient_model([seen], labels_of(1, 1), layers="last", device=CPU)
    assert int(model.sent.valid.sum()) == seen.update.kept_per_layer()["head.weight"]


def test_train_mode_batchnorm_without_side_effects() -> None:
    scene = scenario(10, rate=0.01, model="resnet18", activation="relu", size=16)
    (seen,) = victims(scene, 1, 2)
    before = {name: tensor.clone() for name, tensor in seen.weights.items()}
    model = gradient_model([seen], labels_of(1, 2), device=CPU)
    truth = smooth_images(2, 16)[None]
    first = model.predict(truth, slice(0, 1))
    # The client's own images explain its update, which holds in training mode only.
    assert float(measure("masked-l2", first, model.sent).detach()) < 1e-6 * float(
        seen.update.values.square().sum()
    )
    second = model.predict(truth, slice(0, 1))
    assert torch.equal(first.entries, second.entries)
    assert all(torch.equal(before[name], seen.weights[name]) for name in before)


# Minimisers


def rosenbrock(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    f = (100 * (x[:, 1:] - x[:, :-1].square()).square() + (1 - x[:, :-1]).square()).sum(1)
    return f.detach(), torch.autograd.grad(f.sum(), x)[0]


def starts(rows: int) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_lbfgs_finds_the_minimum_of_every_row() -> None:
    found = Lbfgs(rosenbrock, starts(5), Rules(), "armijo").run(400)
    assert float(found.losses[found.variables[:, 0] > 0].max()) < 1e-12
    assert float(found.losses.max()) < 4.0  # the other local minimum, at (-1, 1, ..., 1), is 3.97
    falling = torch.stack(found.history)
    assert bool((falling.diff(dim=0) <= 0).all())


@pytest.mark.parametrize("line_search", ["none", "armijo"])
def test_rows_do_not_depend_on_their_companions(line_search: LineSearch) -> None:
    rules = Rules(learning_rate=0.1 if line_search == "none" else 1.0)
    together = Lbfgs(rosenbrock, starts(4), rules, line_search, 5).run(40)
    for row in range(4):
        alone = Lbfgs(rosenbrock, starts(4)[row : row + 1], rules, line_search, 5).run(40)
        torch.testing.assert_close(alone.variables[0], together.variables[row], rtol=1e-6, atol=1e-8)


def test_without_line_search_lbfgs_is_torchs() -> None:
    start = starts(1)
    x = start.clone().requires_grad_()
    reference = torch.optim.LBFGS([x], lr=0.1, max_iter=20, history_size=100)

    def closure() -> Tensor:
        reference.zero_grad()
        f = (100 * (x[:, 1:] - x[:, :-1].square()).square() + (1 - x[:, :-1]).square()).sum()
        f.backward()
        return f

    losses = [float(reference.step(closure).detach()) for _ in range(4)]
    found = Lbfgs(rosenbrock, start, Rules(learning_rate=0.1), "none", memory=100, block=20).run(60)
    # torch reports the loss at the beginning of each call of 20 iterations.
    assert [float(found.history[i]) for i in (0, 20, 40, 60)] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_first_order_steps_are_torchs(momentum: float | None) -> None:
    rate = 0.05 if momentum is None else 1e-4
    x = starts(2)
    reference = x.clone()
    optimiser: torch.optim.Optimizer = (
        torch.optim.Adam([reference], lr=rate)
        if momentum is None
        else torch.optim.SGD([reference], lr=rate, momentum=momentum)
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [12, 20, 28], gamma=0.1)
    for _ in range(32):
        reference.grad = rosenbrock(reference)[1]
        optimiser.step()
        schedule.step()
    rules = Rules(learning_rate=rate, decay=32)
    mine = Adam(rosenbrock, x, rules) if momentum is None else Sgd(rosenbrock, x, rules, momentum)
    found = mine.run(32)
    torch.testing.assert_close(found.history[-1], rosenbrock(reference)[0])


def treacherous(x: Tensor) -> tuple[Tensor, Tensor]:
    """A parabola around 0 that is not a number beyond 10."""
    f = torch.where(x.abs().amax(1) > 10, torch.nan, x.square().sum(1))
    return f, 2 * x


@pytest.mark.parametrize("method", ["armijo", "none", "adam"])
def test_recovers_from_not_a_number(method: str) -> None:
    start = torch.full((2, 3), 9.0)
    start[1] = 1.0
    # A first step of this length lands far beyond 10.
    if method == "adam":
        found = Adam(treacherous, start, Rules(learning_rate=25.0)).run(60)
    else:
        found = Lbfgs(treacherous, start, Rules(learning_rate=1e3), method).run(60)  # type: ignore[arg-type]
    assert bool(found.losses.isfinite().all())
    assert float(found.losses[0]) < 243.0
    if method == "armijo":
        assert float(found.losses.max()) < 1e-6
    else:
        assert int(found.recoveries.max()) > 0


def test_stops_below_the_threshold() -> None:
    found = Lbfgs(treacherous, torch.ones(1, 3), Rules(stop=1e-3)).run(500)
    assert len(found.history) < 60
    assert float(found.losses) < 1e-3


# Parametrisations


@pytest.mark.parametrize("public", [None, Auxiliary(smooth_images(30, 16, seed=8))])
def test_charts_are_inverted(public: Auxiliary | None) -> None:
    images = smooth_images(4, 16).reshape(2, 2, 3, 16, 16).clamp(0.02, 0.98)
    for kind in get_args(pixels.Parametrisation):
        chart = pixels.chart(kind, (2, 3, 16, 16), public, CPU)
        torch.testing.assert_close(chart.images(chart.variables(images)), images, rtol=0, atol=1e-5)
    box = pixels.Box((2, 3, 16, 16)).images(100 * torch.randn(2, 1536))
    assert 0 <= float(box.min()) <= float(box.max()) <= 1


# The engine


def test_matching_comes_close_and_one_victim_is_as_in_company() -> None:
    scene = scenario(200, rate=0.05, size=16)
    seen = victims(scene, 3)
    start = torch.full((1, 3, 1, 3, 16, 16), 0.5)
    settings = Matching(parametrisation="spectrum", iterations=150)
    labels = labels_of(3, 1)
    together = match(seen, labels, start, settings, CPU)
    truth = smooth_images(3, 16)
    for v, found in enumerate(together):
        assert psnr(found.images, truth[v : v + 1]) > psnr(start[0, v], truth[v : v + 1]) + 10
        assert found.loss == pytest.approx(min(found.history))
    short = dataclasses.replace(settings, iterations=15)
    together = match(seen, labels, start, short, CPU)
    alone = match(seen[1:2], labels[1:2], start[:, 1:2], short, CPU)
    torch.testing.assert_close(alone[0].images, together[1].images, rtol=0, atol=1e-3)


def test_restarts_are_chosen_by_the_attacks_own_loss() -> None:
    scene = scenario(200, rate=0.05, size=16)
    seen = victims(scene, 2)
    noise = torch.randn(1, 2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    begin = torch.cat([5 * noise, torch.full_like(noise, 0.5), 2 * noise])
    settings = Matching(iterations=30)
    found = match(seen, labels_of(2, 1), begin, settings, CPU)
    alone = [match(seen, labels_of(2, 1), begin[r : r + 1], settings, CPU) for r in range(3)]
    for v in range(2):
        losses = [run[v].loss for run in alone]
        assert found[v].restart == losses.index(min(losses))
        assert found[v].loss == pytest.approx(min(losses), rel=0.2)


def test_a_denoiser_works_between_stretches() -> None:
    scene = scenario(50, rate=0.05, size=16)
    (seen,) = victims(scene, 1)
    calls: list[Tensor] = []

    def smooth(images: Tensor) -> Tensor:
        calls.append(images)
        return F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)

    settings = Matching(iterations=50, transform_every=20)
    begin = torch.full((1, 1, 1, 3, 16, 16), 0.5)
    shares: list[float] = []
    (found,) = match(
        [seen], labels_of(1, 1), begin, settings, CPU,
        lambda share, _: shares.append(share), transform=smooth,
    )  # fmt: skip
    assert [tuple(images.shape) for images in calls] == [(1, 3, 16, 16)] * 2
    assert len(found.history) == 51
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_any_model_is_matched() -> None:
    scene = scenario(20, rate=0.2, model="mlp", size=8)
    seen = victims(scene, 2)
    begin = torch.full((1, 2, 1, 3, 8, 8), 0.5)
    found = match(seen, labels_of(2, 1), begin, Matching(iterations=40), CPU)
    assert all(one.loss < 0.05 * one.history[0] for one in found)


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="masked-l2"):
        Matching(objective="masked-l3")
    with pytest.raises(ConfigError, match="tv2"):
        Matching(regularisers={"tv": 0.1})
    with pytest.raises(ConfigError, match="iterations"):
        Matching(iterations=-1)


# What was sent


def test_a_delta_of_one_step_is_turned_into_its_gradient() -> None:
    images, labels = smooth_images(2, 16), torch.tensor([3, 4])
    plain = observe(scenario(50, size=16, rate=0.1), images, labels)
    training = TrainingConfig(
        protocol="fedavg", local_steps=1, learning_rate=0.3, momentum=0.9, weight_decay=0.01
    )
    delta = observe(scenario(50, size=16, rate=0.1, training=training), images, labels)
    found = one_gradient.as_gradient(delta)
    assert found.kind == "gradient"
    module = build_model(plain.scenario.model)
    module.load_state_dict(plain.weights)
    gradients = torch.autograd.grad(F.cross_entropy(module(images), labels), list(module.parameters()))
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    assert found.indices is not None
    torch.testing.assert_close(found.values, flat[found.indices], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("training", "compression", "named"),
    [
        (TrainingConfig(protocol="fedavg", local_steps=2), {}, "local_steps"),
        (TrainingConfig(), {"name": "sign"}, "sign"),
        (TrainingConfig(), {"name": "dgc", "clip_norm": 1.0}, "clip_norm"),
    ],
)
def test_what_is_no_gradient_is_refused(
    training: TrainingConfig, compression: dict[str, object], named: str
) -> None:
    with pytest.raises(NotApplicable, match=named):
        one_gradient.check_one_gradient(scenario(10, training=training, **compression))  # type: ignore[arg-type]


def test_residuals_of_earlier_rounds_are_refused() -> None:
    seen = observe(
        scenario(10, size=16, rate=0.1, error_feedback=True), smooth_images(1, 16), torch.tensor([1])
    )
    one_gradient.as_gradient(seen)
    with pytest.raises(NotApplicable, match="round 2"):
        one_gradient.as_gradient(dataclasses.replace(seen, round=2))


# Presets


def test_the_published_preset_is_the_papers() -> None:
    lenet = ModelConfig(name="lenet-zhu", classes=10_177, channels=3, image_size=32, activation="sigmoid")
    one = published(lenet, 1)
    assert (one.optimiser, one.line_search, one.objective, one.layers) == (
        "lbfgs",
        "none",
        "masked-l2",
        "all",
    )
    assert (one.learning_rate, one.memory, one.block, one.stop) == (0.1, 100, 20, 6e-19)
    assert one.iterations == 42 * 20
    assert not one.regularisers
    assert one.parametrisation == "pixels"
    assert published(lenet, 4).learning_rate == 0.01
    assert published(lenet.model_copy(update={"name": "resnet18"}), 1).layers == "last"


def test_settings_replace_those_of_a_preset() -> None:
    lenet = ModelConfig(name="lenet-zhu", classes=10, channels=3, image_size=32, activation="sigmoid")
    chosen = settings_for("published", lenet, 1, iterations=7, tv=0.2, optimizer="adam", layers=None)
    assert (chosen.iterations, chosen.regularisers, chosen.optimiser) == (7, {"tv2": 0.2}, "adam")
    assert (chosen.layers, chosen.memory) == ("all", 100)
    assert settings_for("default", lenet, 4, tv=0.0).regularisers == {}
    assert settings_for("default", lenet, 1, learning_rate=0.3, optimizer="lbfgs").learning_rate == 0.3
