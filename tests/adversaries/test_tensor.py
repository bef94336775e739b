"""The tensor attack: moments and decompositions against closed forms, exact batches, refusals, certificates."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from adversaries import ATTACKS
from adversaries.inversion.gradients.activations import ACTIVATIONS, hermite_coefficients, stein_order
from adversaries.inversion.gradients.closed_form import Activation
from adversaries.inversion.solvers.span import Span, row_space
from adversaries.reconstruction.base import CERTIFIED
from adversaries.reconstruction.tensor import (
    TensorAttack,
    certificate,
    decompose,
    from_entries,
    from_steps,
    moments,
)
from adversaries.reconstruction.tensor.head import TwoLayerHead
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.metrics import match, psnr
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import EVERYONE, Auxiliary, Observation, Scenario, Update
from fedattack.training import local_update

CPU = torch.device("cpu")
NONE = CompressionConfig(name="none")


def pictures(count: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Smooth images (N, 1, S, S) in [0, 1] that resemble one another, as photographs do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    fine = torch.rand(count, 1, size, size, generator=generator)
    return (0.7 * smooth + 0.3 * fine).clamp(0, 1)


def observe(
    batch: int,
    width: int,
    attack: TensorAttack,
    *,
    activation: str = "poly3",
    training: TrainingConfig | None = None,
    compression: CompressionConfig = NONE,
    images: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    honest: bool = False,
    model: str = "two-layer",
    seed: int = 0,
    auxiliary: Auxiliary | None = None,
) -> tuple[Observation, torch.Tensor, torch.Tensor]:
    """One client's real update at the attack's weights, its images and labels."""
    images = pictures(batch, seed=seed + 1) if images is None else images
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (len(images),), generator=generator) if labels is None else labels
    training = training or TrainingConfig(batch_size=len(images))
    config = resolve(ModelConfig(name=model, width=width, activation=activation), 1, images.shape[-1], 10)
    scenario = Scenario(config, training, compression)
    weights = initial_weights(config, seed)
    if not honest:
        weights = attack.arm(scenario, weights, seed, auxiliary)
    everything = [np.arange(len(images))] * training.local_steps
    result = local_update(build_model(config), weights, images, labels, everything, training)
    names = tuple(result.update)
    values = torch.cat([result.update[name].flatten() for name in names])
    indices = None
    if compression.name == "topk":
        kept_count = round(compression.rate * len(values))
        indices = values.abs().topk(kept_count).indices.sort().values
        values = values[indices]
    shapes = tuple(tuple(result.update[name].shape) for name in names)
    kind = "gradient" if training.protocol == "fedsgd" else "delta"
    update = Update(names, shapes, indices, values, kind)  # type: ignore[arg-type]
    observation = Observation(1, 0, scenario, weights, update, len(images), auxiliary=auxiliary)
    return observation, images, labels


def scored(answer, images, labels) -> tuple[torch.Tensor, int]:
    pairing = match(answer.images, images).order
    assert min(pairing) >= 0
    right = sum(int(answer.labels[place] == label) for place, label in zip(pairing, labels, strict=True))
    return psnr(answer.images[list(pairing)], images).clamp(max=120.0), right


# ---------------------------------------------------------------------- pieces


def test_hermite_coefficients_and_orders() -> None:
    # E[s'''] sqrt(1/6): 6 / sqrt 6; E[s''] sqrt(1/2): 2 / sqrt 2; E[u^2] = 1.
    found = hermite_coefficients(ACTIVATIONS["poly3"])
    assert found[:4] == pytest.approx([1.0, 3.0, math.sqrt(2), math.sqrt(6)], rel=1e-9)
    # E s'''' = -1 / sqrt(2 pi) for ReLU; the quadrature is coarse at its kink.
    assert hermite_coefficients(ACTIVATIONS["relu"])[4] == pytest.approx(
        -1 / math.sqrt(2 * math.pi * 24), rel=0.03
    )
    orders = {name: stein_order(activation) for name, activation in ACTIVATIONS.items()}
    assert orders == {"poly3": 3, "tanh": 3, "sigmoid": 3, "gelu": 4, "softplus": 4, "relu": 4}
    for value in (lambda u: u, lambda u: u * u + u):
        with pytest.raises(NotApplicable, match="not identifiable"):
            stein_order(Activation(value, value, value))


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_regression_returns_the_symmetric_tensors_of_a_hermite_series(degree) -> None:
    generator = torch.Generator().manual_seed(degree)
    size, outputs = 3, 2
    u = torch.randn(400, size, generator=generator, dtype=torch.float64)
    tensors = {}
    y = torch.zeros(400, outputs, dtype=torch.float64)
    for q in range(1, degree + 1):
        tensor = torch.randn(*[size] * q, outputs, generator=generator, dtype=torch.float64)
        tensor = sum(tensor.permute(*order, q) for order in itertools.permutations(range(q)))
        tensors[q] = tensor
        # The orthonormal series of a tensor T: sum over products with multiplicities a of sqrt(q!/a!) T_a h_a(u).
        for index in itertools.combinations_with_replacement(range(size), q):
            powers = [index.count(variable) for variable in range(size)]
            product = torch.ones(400, dtype=torch.float64)
            for variable, power in enumerate(powers):
                polynomial = np.polynomial.hermite_e.HermiteE.basis(power)(u[:, variable].numpy())
                product *= torch.from_numpy(polynomial) / math.sqrt(math.factorial(power))
            weight = math.sqrt(math.factorial(q) / math.prod(math.factorial(p) for p in powers))
            y += weight * product[:, None] * tensor[index]
    found, unexplained = moments.regress(u, y, degree)
    assert unexplained < 1e-12
    for q, tensor in tensors.items():
        torch.testing.assert_close(found[q], tensor, rtol=1e-9, atol=1e-9)


def test_large_regression_in_float32_reaches_float64(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    exact, left = moments.regress(u, y, 2)
    monkeypatch.setattr(moments, "_LARGE", 10)
    monkeypatch.setattr(moments, "_BLOCK", 128)
    low, left_low = moments.regress(u, y, 2)
    assert left_low == pytest.approx(left, rel=1e-10)
    torch.testing.assert_close(low[2], exact[2], rtol=1e-8, atol=1e-9)
    with pytest.raises(NotApplicable, match=r"width 90 < 91"):
        moments.regress(u[:90], y[:90], 2)


def test_stein_averages_converge_to_the_moments() -> None:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    x = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    g = ACTIVATIONS["poly3"].value(w @ x)
    torch.testing.assert_close(moments.stein_second(w, g), 2 * torch.outer(x, x), rtol=0, atol=0.2)
    third = 6 * torch.einsum("a,b,c->abc", x, x, x)
    torch.testing.assert_close(moments.stein_third(w, g), third, rtol=0, atol=0.6)


def directions_and_tensor(size: int, noise: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(size, size, generator=generator, dtype=torch.float64)
    c = (c + 1.5 * c[:, :1]) / (c + 1.5 * c[:, :1]).norm(dim=0)
    weights = torch.linspace(0.5, 2, size, dtype=torch.float64) * torch.tensor([1.0, -1.0] * size)[:size]
    tensor = torch.einsum("i,ai,bi,ci->abc", weights, c, c, c)
    second = torch.einsum("i,ai,bi->ab", weights.abs(), c, c)
    extra = torch.randn(size, size, size, generator=generator, dtype=torch.float64)
    extra = decompose.symmetric(extra + extra.transpose(0, 1))
    return c, tensor + noise * extra * tensor.norm() / extra.norm(), second


def worst_cosine(found, wanted) -> float:
    return float((found.T @ wanted).abs().amax(0).min())


@pytest.mark.parametrize("method", ["simdiag", "jennrich", "als", "tensorly_power"])
def test_decomposers_find_oblique_directions(method) -> None:
    c, tensor, second = directions_and_tensor(4, 0.0)
    found, notes = decompose.decompose(method, tensor, second, torch.Generator().manual_seed(0), 0)
    assert worst_cosine(found, c) > 1 - (1e-3 if method == "als" else 1e-8)
    assert notes == []


def test_power_iteration_without_whitening_is_wrong_and_says_so() -> None:
    c, tensor, second = directions_and_tensor(4, 0.0)
    indefinite = second - 2 * torch.outer(c[:, 0], c[:, 0]) * second.norm()
    found, notes = decompose.decompose(
        "tensorly_power", tensor, indefinite, torch.Generator().manual_seed(0), 0
    )
    assert worst_cosine(found, c) < 0.99
    assert "P indefinite: whitening disabled" in notes[0]
    with pytest.raises(ConfigError, match="needs whitening"):
        decompose.decompose("tensorly_power", tensor, None, torch.Generator(), 0)


def test_simultaneous_diagonalisation_beats_jennrich_under_noise() -> None:
    shares = []
    for seed in range(3):
        c, tensor, second = directions_and_tensor(8, 1e-3, seed)
        joint, _ = decompose.decompose("simdiag", tensor, second, torch.Generator().manual_seed(0), 0)
        alone, _ = decompose.decompose("jennrich", tensor, second, torch.Generator().manual_seed(0), 0)
        shares.append((1 - worst_cosine(joint, c), 1 - worst_cosine(alone, c)))
    assert np.mean([a for a, _ in shares]) < 0.5 * np.mean([b for _, b in shares])


def test_row_space_is_the_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    matrix = low @ torch.randn(5, 200, generator=generator, dtype=torch.float64)
    noisy = matrix + 1e-6 * torch.randn(300, 200, generator=generator, dtype=torch.float64)
    span = row_space(noisy, 8, generator)
    exact = torch.linalg.svdvals(noisy)
    torch.testing.assert_close(span.values[:5], exact[:5], rtol=1e-9, atol=0)
    assert span.rank() == 5
    assert span.rank(4) is None
    # A last value below rounding is no further sample, where only two are declared.
    noisy = Span(torch.tensor([1, 0.5, 2e-8, 1e-16]).double(), torch.eye(4).double())
    assert (noisy.rank(), noisy.rank(2)) == (3, 2)
    assert row_space(torch.randn(300, 200, dtype=torch.float64), 8, generator).rank() is None


@pytest.mark.parametrize("activation", ["poly3", "tanh"])
def test_entry_model_matches_autograd(activation) -> None:
    generator = torch.Generator().manual_seed(0)
    wide, last = torch.randn(30, 7, generator=generator), torch.zeros(4, 30)
    last[1] = 0.1
    head = TwoLayerHead.of(wide, last, activation)
    labels, x = torch.tensor([1, 0, 2]), torch.randn(3, 7, generator=generator, dtype=torch.float64)
    module = torch.nn.Sequential(
        torch.nn.Linear(7, 30, bias=False), torch.nn.Linear(30, 4, bias=False)
    ).double()
    w, a = wide.double().requires_grad_(), last.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(ACTIVATIONS[activation].value(x @ w.T) @ a.T, labels)
    wide_gradient, head_gradient = torch.autograd.grad(loss, (w, a))
    del module
    own = head.gradient(x, labels)
    torch.testing.assert_close(own[0], wide_gradient)
    torch.testing.assert_close(own[1], head_gradient)
    at = (
        (torch.tensor([0, 1, 3, 0]), torch.tensor([2, 5, 9, 2])),
        (torch.tensor([1, 1, 8]), torch.tensor([0, 3, 3])),
    )
    entries = from_entries.Entries(*at[0], head_gradient[at[0]], *at[1], wide_gradient[at[1]])
    model = from_entries.Model(head, entries, labels)
    torch.testing.assert_close(model(x), from_entries.targets(entries))
    other = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    _, push, pull = model.at(other)
    jacobian = torch.autograd.functional.jacobian(model, other)
    step, left = torch.randn(3, 7, generator=generator).double(), torch.randn(7, generator=generator).double()
    torch.testing.assert_close(push(step), torch.einsum("kij,ij->k", jacobian, step))
    torch.testing.assert_close(pull(left), torch.einsum("kij,k->ij", jacobian, left))
    gram, right = model.normal_equations(other, left)
    flat = jacobian.reshape(7, -1)
    torch.testing.assert_close(gram, flat.T @ flat, rtol=1e-4, atol=1e-5 * float(gram.abs().max()))
    torch.testing.assert_close(right, flat.T @ left)


# ---------------------------------------------------------------------- whole batches


@pytest.mark.parametrize(("batch", "width"), [(1, 16), (8, 64), (16, 256)])
def test_cubic_batches_are_exact_with_labels_and_norms(batch, width) -> None:
    attack = TensorAttack()
    observation, images, labels = observe(batch, width, attack)
    attack.check(observation.scenario)
    answer = attack.run([observation], 0, CPU)[0]
    values, right = scored(answer, images, labels)
    assert values.mean() > 110
    assert values.min() > 60
    assert right == batch
    assert answer.details["status"] == "certified"
    assert answer.loss <= CERTIFIED
    assert answer.details["batch"] == batch
    wanted = sorted(images.flatten(1).norm(dim=1).tolist())
    assert sorted(answer.details["norms"]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("activation", "batch", "width", "least"),
    [
        ("tanh", 4, 1024, 100),
        ("sigmoid", 4, 1024, 100),
        ("gelu", 4, 1024, 100),
        ("softplus", 4, 1024, 100),
        ("relu", 4, 1024, 60),
    ],
)
def test_other_activations_are_finished_by_refinement(activation, batch, width, least) -> None:
    attack = TensorAttack()
    observation, images, labels = observe(batch, width, attack, activation=activation)
    answer = attack.run([observation], 0, CPU)[0]
    values, right = scored(answer, images, labels)
    assert values.mean() > least
    assert right == batch
    assert answer.details["status"] == "certified"
    rough = TensorAttack(refine="off").run([observation], 0, CPU)[0]
    assert rough.loss > 100 * answer.loss
    assert rough.details["status"] != "certified"
    assert any("order 4" in note for note in answer.details["notes"]) == (
        activation in ("relu", "gelu", "softplus")
    )


@pytest.mark.parametrize("decomposer", ["jennrich", "als", "tensorly_power"])
def test_other_decomposers(decomposer) -> None:
    attack = TensorAttack(decomposer=decomposer)
    # No sample of class 0: then all residuals have one sign and P is definite.
    observation, images, labels = observe(4, 128, attack, labels=torch.tensor([1, 5, 5, 9]))
    answer = attack.run([observation], 0, CPU)[0]
    values, right = scored(answer, images, labels)
    assert values.min() > 60
    assert right == 4


def test_equal_images_are_counted_by_their_labels() -> None:
    attack = TensorAttack()
    images = pictures(3)[[0, 1, 1, 2, 1]]
    labels = torch.tensor([4, 7, 7, 0, 2])
    observation, *_ = observe(5, 256, attack, images=images, labels=labels)
    answer = attack.run([observation], 0, CPU)[0]
    values, right = scored(answer, images, labels)
    assert values.min() > 100
    assert sorted(answer.labels.tolist()) == sorted(labels.tolist())
    assert sorted(answer.details["copies"]) == [1, 1, 3]
    assert answer.details["status"] == "certified"
    assert any("equal or dependent" in note for note in answer.details["notes"])
    assert right >= 3


def test_a_batch_size_against_the_declared_one_is_not_certified() -> None:
    """The mean gradient of two equal samples is that of one."""
    attack = TensorAttack(batch=1)
    images = pictures(1)[[0, 0]]
    observation, images, _ = observe(2, 64, attack, images=images, labels=torch.tensor([4, 4]))
    answer = attack.run([observation], 0, CPU)[0]
    assert answer.details["residual"] < CERTIFIED
    assert answer.details["status"] == "approximate"
    assert any("declares 2 samples" in note for note in answer.details["notes"])


def test_dependent_samples_are_never_certified() -> None:
    attack = TensorAttack()
    images = pictures(3)
    images = torch.cat([images, (images[:1] + images[1:2]) / 2])
    observation, *_ = observe(4, 128, attack, images=images)
    answer = attack.run([observation], 0, CPU)[0]
    assert answer.details["status"] == "failed"
    assert answer.loss > 1e-3
    assert "dependent samples" in answer.details["reason"]


def test_noise_is_never_certified_and_does_not_worsen() -> None:
    attack = TensorAttack()
    observation, images, labels = observe(4, 256, attack)
    values = observation.update.values
    generator = torch.Generator().manual_seed(0)
    noisy = values + 1e-3 * torch.cat(
        [part.std() * torch.randn(len(part), generator=generator) for part in values.split([256 * 64, 2560])]
    )
    update = Update(observation.update.names, observation.update.shapes, None, noisy)
    observation = Observation(1, 0, observation.scenario, observation.weights, update, 4)
    answer = attack.run([observation], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert answer.details["status"] == "approximate"
    assert quality.mean() > 40
    assert right == 4
    assert any("not certified" in note for note in answer.details["notes"])


def test_published_moments_are_weak() -> None:
    attack = TensorAttack(method="published")
    observation, images, labels = observe(2, 4096, attack, labels=torch.tensor([3, 5]))
    answer = attack.run([observation], 0, CPU)[0]
    quality, _ = scored(answer, images, labels)
    assert quality.mean() < 40
    assert answer.details["status"] != "certified"
    exact = TensorAttack().run([observation], 0, CPU)[0]
    assert scored(exact, images, labels)[0].mean() > 100


def test_top_k_entries_are_equations() -> None:
    attack = TensorAttack()
    compression = CompressionConfig(name="topk", rate=0.004)
    observation, images, labels = observe(1, 1024, attack, compression=compression)
    attack.check(observation.scenario)
    answer = attack.run([observation], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert quality.mean() > 100
    assert right == 1
    assert answer.details["status"] == "certified"
    few = CompressionConfig(name="topk", rate=0.0002)
    observation, *_ = observe(1, 1024, attack, compression=few)
    with pytest.raises(NotApplicable, match=r"kept entries 15 < unknowns 64: underdetermined"):
        attack.check(observation.scenario)
    answer = attack.run([observation], 0, CPU)[0]
    assert answer.details["status"] == "failed"
    assert "underdetermined" in answer.details["reason"]
    assert len(answer.images) == 0


def test_more_entries_than_unknowns_do_not_certify_what_no_entry_sees() -> None:
    attack = TensorAttack()
    observation, images, labels = observe(1, 512, attack)
    dense = observation.update
    wide, head = dense.values.split([512 * 64, 512 * 10])
    near = wide.abs().reshape(512, 64)
    near[:, 40:], near[10:] = 0, 0  # 24 pixels are seen only through 10 neurons here and 5 in the head
    at = torch.cat([near.flatten().topk(400).indices, 512 * 64 + head.abs().topk(5).indices]).sort().values
    compression = CompressionConfig(name="topk", rate=405 / len(dense.values), scope="layer")
    update = dataclasses.replace(dense, indices=at, values=dense.values[at])
    scene = dataclasses.replace(observation.scenario, compression=compression)
    answer = attack.run([dataclasses.replace(observation, update=update, scenario=scene)], 0, CPU)[0]
    assert answer.details["equations"] > 1.2 * answer.details["unknowns"]
    assert answer.details["residual"] < 1e-5
    assert scored(answer, images, labels)[0].mean() < 60
    assert answer.details["status"] == "approximate"
    assert any("unseen" in note for note in answer.details["notes"])


def uncertified(observation, images, labels, attack, why: str) -> None:
    """An answer that explains the update and is not the batch: told to be uncertain, and why."""
    answer = attack.run([observation], 0, CPU)[0]
    assert answer.details["residual"] < CERTIFIED
    quality, right = scored(answer, images, labels)
    assert quality.min() < 60 or right < len(labels)
    assert answer.details["status"] == "approximate"
    assert any(why in note for note in answer.details["notes"]), answer.details["notes"]


def test_few_neurons_do_not_certify_however_many_entries_they_have() -> None:
    """A sample's entries are c_j x_k: a neuron's second entry says nothing new of it."""
    attack = TensorAttack()
    images = pictures(1) * (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5)
    images[0, 0, 0, :5] = 1.0
    observation, images, labels = observe(
        1, 512, attack, activation="sigmoid", images=images, labels=torch.tensor([9])
    )
    dense = observation.update
    of_row = torch.arange(34)[:, None] * 64 + torch.arange(5)
    head = 512 * 64 + 9 * 512 + torch.arange(100, 126)
    at = torch.cat([of_row.flatten(), head])
    compression = CompressionConfig(name="topk", rate=196 / len(dense.values), scope="layer")
    update = dataclasses.replace(dense, indices=at, values=dense.values[at])
    scene = dataclasses.replace(observation.scenario, compression=compression)
    observation = dataclasses.replace(observation, update=update, scenario=scene)
    uncertified(observation, images, labels, attack, "64 independent equations for 64 unknowns")
    entries = [torch.zeros(0, dtype=torch.int64)] * 2 + [torch.zeros(0)]
    wide = [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.ones(4)]
    assert from_entries.Entries(*entries, *wide).independent(1) == 3


def test_a_brighter_sample_of_the_heads_class_explains_as_much() -> None:
    """ReLU: n delta(n) has the same value on either side of its maximum."""
    attack = TensorAttack(scale=6.0, head_strength=0.008, view="last_layer")
    images = pictures(1).clamp(0.3)
    uncertified(
        *observe(1, 256, attack, activation="relu", images=images, labels=torch.tensor([0])),
        attack,
        "another brightness",
    )


def test_the_label_of_a_black_image_is_not_certified() -> None:
    attack = TensorAttack(view="last_layer")
    images = pictures(2)
    images[1] = 0
    labels = torch.tensor([6, 2])  # taken for another 6
    uncertified(*observe(2, 512, attack, images=images, labels=labels), attack, "too little trace")


def test_copies_that_differ_a_little_are_not_certified() -> None:
    attack = TensorAttack()
    images = pictures(8)
    generator = torch.Generator().manual_seed(1)
    images[1] = (images[0] + 3e-3 * torch.randn(1, 8, 8, generator=generator)).clamp(0, 1)
    uncertified(
        *observe(8, 450, attack, images=images, labels=torch.full((8,), 5)), attack, "may move an input"
    )


def test_predicted_errors_are_those_that_noise_makes() -> None:
    """Hardly different samples from few entries: what noise moves them by is foretold, within its safety."""
    generator = torch.Generator().manual_seed(0)
    attack = TensorAttack()
    images = 0.8 + 0.2 * pictures(2)
    observation, images, labels = observe(2, 1024, attack, images=images, labels=torch.tensor([3, 7]))
    weights = {name: tensor.double() for name, tensor in observation.weights.items()}
    head = TwoLayerHead.of(weights["wide.weight"], weights["head.weight"], "poly3")
    wide, last = head.gradient(images.flatten(1).double(), labels)
    rows, columns = (
        last.abs().flatten().topk(400).indices // 1024,
        last.abs().flatten().topk(400).indices % 1024,
    )
    none = torch.zeros(0, dtype=torch.int64)
    entries = from_entries.Entries(rows, columns, last[rows, columns], none, none, torch.zeros(0).double())
    function, wanted = from_entries.Model(head, entries, labels), from_entries.targets(entries)
    noise = 1e-8 * torch.randn(400, generator=generator).double()
    truth = images.flatten(1).double()
    found, _ = from_entries.fit(function, wanted + noise, truth, 30, settled=0)
    made = (found - truth).square().mean(1).sqrt()
    unseen, foretold = from_entries.foundation(
        function, truth, torch.zeros(400).double(), 5 * torch.full((400,), 1e-8).double(), generator
    )
    assert unseen < 1e-6
    assert bool((foretold > made).all())
    assert bool((foretold < 20 * made).all())
    # The wide layer's gradient, with noise in all its entries.
    noise = 1e-3 * wide.std() * torch.randn(wide.shape, generator=generator).double()
    r = (head.logits(truth).softmax(1) - torch.nn.functional.one_hot(labels, 10)) @ head.row
    k = ACTIVATIONS["poly3"].slope(head.wide @ truth.T) * r
    scale = 2 / head.scale[:, None]
    moved = torch.linalg.lstsq(k, noise * scale).solution.square().mean(1).sqrt()
    foretold = certificate.input_errors(head, truth, r, noise * scale)
    assert bool((foretold > moved).all())
    assert bool((foretold < 20 * moved).all())


@pytest.mark.parametrize("view", ["full", "last_layer"])
def test_a_black_batch_leaves_nothing(view) -> None:
    attack = TensorAttack(view=view)
    observation, *_ = observe(1, 128, attack, images=torch.zeros(1, 1, 8, 8))
    answer = attack.run([observation], 0, CPU)[0]
    assert answer.details["status"] == "failed"
    assert "nothing of the batch" in answer.details["reason"]


@pytest.mark.parametrize(("width", "labels"), [(256, [3, 8]), (512, [6, 9, 3, 0]), (512, [7, 7, 7, 1])])
def test_last_layer_alone(width, labels) -> None:
    attack = TensorAttack(view="last_layer")
    observation, images, labels = observe(len(labels), width, attack, labels=torch.tensor(labels))
    answer = attack.run([observation], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert quality.mean() > 100
    assert right == len(labels)
    assert answer.details["status"] == "certified"
    with pytest.raises(NotApplicable, match="underdetermined"):
        attack.check(observe(8, 50, attack)[0].scenario)


def test_equal_labels_under_top_k_are_climbed_to() -> None:
    """Two images of one label start from their mean; coarse images first, they come apart."""
    attack = TensorAttack()
    compression = CompressionConfig(name="topk", rate=0.004)
    images = pictures(2, 16, seed=3)
    observation, images, labels = observe(
        2, 2048, attack, images=images, labels=torch.tensor([7, 7]), compression=compression
    )
    answer = attack.run([observation], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert quality.mean() > 100
    assert right == 2
    assert answer.details["status"] == "certified"


def test_what_all_clients_sum_up_to_is_one_larger_batch() -> None:
    attack = TensorAttack()
    parts = [observe(3, 256, attack, images=pictures(3, seed=k)) for k in (5, 6, 7)]
    images, labels = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    one = parts[0][0]
    mean = torch.stack([part[0].update.values for part in parts]).mean(0)
    together = dataclasses.replace(
        one,
        client=EVERYONE,
        num_examples=9,
        update=dataclasses.replace(one.update, values=mean),
        scenario=dataclasses.replace(one.scenario, training=TrainingConfig(batch_size=0)),
    )
    attack.check(together.scenario)
    answer = attack.run([together], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert answer.details["status"] == "certified"
    assert quality.min() > 60
    assert right == 9
    at = torch.arange(0, len(mean), 2)
    sparse = dataclasses.replace(together.update, indices=at, values=mean[at])
    answer = attack.run([dataclasses.replace(together, update=sparse)], 0, CPU)[0]
    assert answer.details["status"] == "failed"
    assert "those clients that sent it" in answer.details["reason"]


def test_local_steps_are_played_again() -> None:
    """Real digits; the images that the update says little about stay approximate, and nothing is certified."""
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images[:4] / 16.0).float()[:, None]
    training = TrainingConfig(protocol="fedavg", batch_size=0, local_steps=5, learning_rate=0.01)
    attack = TensorAttack()
    observation, images, labels = observe(
        4, 1024, attack, training=training, images=digits, labels=torch.arange(4)
    )
    answer = attack.run([observation], 0, CPU)[0]
    rough = TensorAttack(refine="off").run([observation], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert right == 4
    assert quality.mean() > 60
    assert quality.mean() > scored(rough, images, labels)[0].mean() + 10
    assert answer.loss < 0.1 * rough.loss
    assert 0 < answer.details["rounding"] < answer.loss * 10


def test_play_is_the_clients_training() -> None:
    training = TrainingConfig(
        protocol="fedavg", batch_size=0, local_steps=4, learning_rate=0.05, momentum=0.5
    )
    observation, images, labels = observe(3, 32, TensorAttack(), training=training)
    head = TwoLayerHead.of(observation.weights["wide.weight"], observation.weights["head.weight"], "poly3")
    wide, last = from_steps.play(head, head.wide, images.flatten(1).double(), labels, training)
    sent = observation.update.dense()
    assert float((wide - sent["wide.weight"]).norm() / wide.norm()) < 1e-3
    assert float((last - sent["head.weight"]).norm() / last.norm()) < 1e-4


def test_features_behind_convolutions() -> None:
    attack = TensorAttack(whiten_weights=True)
    granted = Auxiliary(pictures(300, 16, seed=50))
    images = pictures(2, 16, seed=99)
    observation, images, labels = observe(
        2, 256, attack, images=images, model="lenet-two-layer", auxiliary=granted
    )
    answer = attack.run([observation], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    floor = psnr(granted.images.mean(0, keepdim=True).expand_as(images), images).mean()
    assert quality.mean() > floor + 5
    assert right == 2
    assert answer.loss < 1e-4
    assert answer.details["feature_residual"] < 1e-3
    assert answer.details["status"] == "approximate"  # pixels that the stem lost are the prior's


# ---------------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("batch", "width", "options", "part"),
    [
        (48, 1024, {}, r"1024 < 1225.*\(B\+1\)\(B\+2\)/2 = 1225"),
        (65, 4096, {}, "65 > input dimension 64"),
        (8, 100, {"activation": "gelu"}, "100 < 165"),
        (4, 512, {"compression": CompressionConfig(name="sign")}, "only signs"),
    ],
)
def test_refusals_before_anything_starts(batch, width, options, part) -> None:
    attack = TensorAttack()
    observation, *_ = observe(batch, width, attack, **options)
    with pytest.raises(NotApplicable, match=part):
        attack.check(observation.scenario)
    if "compression" not in options:
        answer = attack.run([observation], 0, CPU)[0]
        assert answer.details["status"] == "failed"
        assert len(answer.images) == 0


def test_honest_weights_and_other_models_are_refused() -> None:
    attack = TensorAttack()
    observation, *_ = observe(4, 256, attack, honest=True)
    answer = attack.run([observation], 0, CPU)[0]
    assert answer.details["status"] == "failed"
    assert "more than one direction" in answer.details["reason"]
    lenet = Scenario(resolve(ModelConfig(), 1, 8, 10), TrainingConfig(), NONE)
    with pytest.raises(NotApplicable, match="two-layer"):
        attack.check(lenet)
    with pytest.raises(NotApplicable, match="third Hermite"):
        TensorAttack(method="published").check(observe(2, 64, attack, activation="relu")[0].scenario)
    for settings in ({"batch": 0}, {"scale": 0.0}, {"restarts": 0}):
        with pytest.raises(ConfigError, match="tensor"):
            TensorAttack(**settings)
    with pytest.raises(NotApplicable, match="public images"):
        observe(2, 64, TensorAttack(whiten_weights=True))


def test_answer_depends_on_the_observation_only() -> None:
    attack = TensorAttack()
    observation, *_ = observe(3, 64, attack)
    first, second = attack.run([observation], 3, CPU)[0], attack.run([observation], 3, CPU)[0]
    assert torch.equal(first.images, second.images)
    assert ATTACKS.get("tensor") is TensorAttack


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "width"), [(16, 256), (32, 1024), (48, 2048), (64, 2500)])
def test_real_digits(shared_dir, batch, width) -> None:
    from fedattack.config import Config
    from fedattack.data import build_world

    settings = {"dataset": "mnist", "data-dir": str(shared_dir / "data" / "MNIST"), "limit": "2000"}
    world = build_world(Config.from_mapping(settings))
    ids = np.random.default_rng(0).permutation(len(world.dataset.labels))[:batch]
    images, labels = world.dataset.tensors(ids)
    attack = TensorAttack()
    observation, *_ = observe(batch, width, attack, images=images, labels=labels)
    answer = attack.run([observation], 0, CPU)[0]
    quality, right = scored(answer, images, labels)
    assert quality.mean() >= 110
    assert quality.min() >= 60
    assert right == batch
    assert answer.details["status"] == "certified"
