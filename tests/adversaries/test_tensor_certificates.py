"""The tensor attack's certificates: ranks under noise, similar samples, black pictures, and no wrong one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from adversaries.inversion.gradients.activations import ACTIVATIONS
from adversaries.inversion.solvers.span import noise_edge, rank_under_noise, row_space
from adversaries.needs import Facts
from adversaries.reconstruction.tensor import TensorAttack, certificate, refine
from adversaries.reconstruction.tensor.head import TwoLayerHead
from fedattack.config import CompressionConfig, DefenseConfig, ModelConfig, TrainingConfig
from fedattack.errors import NotApplicable
from fedattack.models import resolve
from fedattack.observation import Scenario
from simulations.bench.tensor_certificates import Client, clients, compared, judged, pictures

CPU = torch.device("cpu")


def client(batch: int, width: int, kind: str = "plain", **options) -> Client:
    """Embedded digits, enough of which differ."""
    images, labels = pictures("digits", None)
    chosen = np.random.default_rng(0).permutation(len(labels))[:batch]
    activation, noise = options.get("activation", "poly3"), options.get("noise", 0.0)
    return Client("digits", kind, images[chosen].clone(), labels[chosen].clone(), width, activation, 3, noise)


def low_rank(m: int, d: int, values: list[float], generator: torch.Generator) -> torch.Tensor:
    left = torch.linalg.qr(torch.randn(m, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(d, len(values), generator=generator, dtype=torch.float64)).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


@pytest.mark.parametrize("unequal", [False, True])
def test_the_rank_is_what_stands_out_of_the_noise(unequal) -> None:
    generator = torch.Generator().manual_seed(0)
    m, d, sigma = 400, 150, 1e-3
    noise = sigma * torch.randn(m, d, generator=generator, dtype=torch.float64)
    if unequal:  # a tenth of the columns is three times as loud as the others, as dark pixels make them
        loud = torch.where(torch.arange(d) % 10 == 0, 3.0, 1.0)
        noise = noise * loud / float(loud.square().mean().sqrt())
    edge = float(torch.linalg.svdvals(noise)[0])
    if not unequal:
        assert edge == pytest.approx(sigma * (math.sqrt(m) + math.sqrt(d)), rel=0.05)
    matrix = low_rank(m, d, [1.0, 0.3, 4 * edge, 1.6 * edge, 0.3 * edge], generator) + noise
    for declared in (4, 8, 20):  # equal samples lower the rank below it
        span = row_space(matrix, declared + 1, generator)
        rank, found = rank_under_noise(matrix, span, declared, generator)
        assert rank == 4
        assert found == pytest.approx(edge, rel=0.1)
    assert rank_under_noise(matrix, row_space(matrix, 4, generator), 3, generator)[0] == 3
    # Where the rank may be full, the noise is taken for float32's rounding.
    whole = row_space(matrix, d, generator)
    assert noise_edge(matrix, whole, d, generator) < 1e-7


def test_normal_equations_are_the_jacobians() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    point = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    act = ACTIVATIONS["tanh"]

    def model(p: torch.Tensor) -> torch.Tensor:
        return (act.slope(u @ p[:, :3].T) * p[:, 3]) @ p[:, :3]

    jacobian = torch.autograd.functional.jacobian(model, point).reshape(60, 8)
    c, w = point[:, :3], point[:, 3]
    slope, bend = act.slope(u @ c.T), act.bend(u @ c.T)
    torch.testing.assert_close(
        refine._normal_equations(u, c, slope * w, slope, bend * w), jacobian.T @ jacobian
    )


@pytest.mark.parametrize("activation", ["poly3", "tanh"])
def test_second_derivatives_of_a_samples_part(activation) -> None:
    generator = torch.Generator().manual_seed(0)
    row = 0.1 * torch.randn(20, generator=generator)
    mixture = torch.tensor([1.0, 0.0, 0.5])
    head = TwoLayerHead.of(torch.zeros(20, 3), torch.outer(mixture, row), activation)
    u = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    x, count = torch.tensor([0.3, -0.5]).double(), torch.tensor([1.0, 0.0, 2.0]).double()

    def part(point: torch.Tensor) -> torch.Tensor:
        z = u @ point
        p = (head.head @ head.activation.value(z)).softmax(0)
        return ((count.sum() * p - count) @ head.row) * head.activation.slope(z)[:, None] * point

    def slopes(point: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.jacobian(part, point, create_graph=True)

    first, second = certificate._derivatives(head, u, x, count)
    torch.testing.assert_close(first, slopes(x))
    torch.testing.assert_close(second, torch.autograd.functional.jacobian(slopes, x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("activation", "width"), [("poly3", 128), ("sigmoid", 1024)])
def test_black_pictures_are_set_apart(activation, width) -> None:
    """One in four: no trace but in the count with an activation that is 0 at 0, and in the head with another."""
    victim = client(8 if activation == "poly3" else 4, width, activation=activation)
    count = len(victim.images) // 4
    victim.images[:count] = 0
    attack = TensorAttack()
    answer = attack.run([victim.observation(attack)], 0, CPU)[0]
    assert answer.details["status"] == "certified"
    worst, exact, wrong = compared(answer, victim.images, victim.labels)
    assert (worst < 1e-5, exact, wrong) == (True, True, False)
    unnamed = count if activation == "poly3" else 0
    assert answer.details["inferred"] == int((answer.labels < 0).sum()) == unnamed
    assert any("leave no trace" in note for note in answer.details["notes"]) == bool(unnamed)
    if unnamed:
        assert answer.details["inferred_error"] < 1e-2


def test_one_constant_picture_is_a_picture() -> None:
    victim = client(6, 128)
    victim.images[2] = 0.25
    assert judged(victim)["certified"]


def test_hardly_different_pictures_are_told_apart_or_the_error_is_told() -> None:
    for spread, certified in ((4e-2, True), (1e-2, False), (1e-3, True)):
        victim = client(8, 450)
        generator = torch.Generator().manual_seed(1)
        moved = victim.images[0] * (1 - spread * torch.rand(8, 8, generator=generator))
        victim.images[1] = moved
        victim.labels[1] = victim.labels[0]
        record = judged(victim)
        assert not record["wrong"]
        assert record["predicted_error"] is None or record["predicted_error"] > record["worst"]
        assert record["certified"] or not certified


@pytest.mark.parametrize("kind", ["half", "bfloat16", "noise"])
def test_copies_are_counted_under_noise(kind) -> None:
    victim = client(6, 512, kind, noise=1e-3)
    victim.images[[1, 3]], victim.labels[[1, 3]] = victim.images[[0, 2]], victim.labels[[0, 2]]
    attack = TensorAttack()
    answer = attack.run([victim.observation(attack)], 0, CPU)[0]
    assert answer.details["status"] == "approximate"
    assert answer.details["batch"] == 4
    assert sorted(answer.details["copies"]) == [1, 1, 2, 2]
    assert sorted(answer.labels.tolist()) == sorted(victim.labels.tolist())


@pytest.mark.parametrize(
    ("training", "facts", "number"),
    [
        ({"batch_size": 4, "local_steps": 3}, Facts(), "needs at least 455 neurons for B = 12"),
        ({"batch_size": 4, "local_steps": 3}, Facts(samples=(10, 30)), "286 neurons for B = 10 samples"),
        ({"batch_size": 0, "local_steps": 2}, Facts(samples=(11,)), "364 neurons for B = 11"),
        ({"batch_size": 4, "local_epochs": 2}, Facts(samples=(12,)), "in 6 local steps"),
        ({"batch_size": 16, "local_steps": 5}, Facts(), "samples of an update = 80"),
    ],
)
def test_width_for_local_steps_is_known_before_the_run(training, facts, number) -> None:
    model = resolve(ModelConfig(name="two-layer", width=200), 1, 8, 10)
    scenario = Scenario(model, TrainingConfig(protocol="fedavg", **training), CompressionConfig(name="none"))
    with pytest.raises(NotApplicable, match=number):
        TensorAttack().probe(scenario, facts)
    few = Facts(samples=(4,))  # a client that has no more than this
    TensorAttack().probe(scenario, few)
    sums = dataclasses.replace(scenario, defense=DefenseConfig(names=("secure-aggregation",)))
    with pytest.raises(NotApplicable, match="B = 16"):
        TensorAttack().probe(sums, dataclasses.replace(few, drawn=4))


@pytest.mark.slow
def test_similar_digits_are_certified_where_they_are_exact() -> None:
    record = judged(client(48, 1600))
    assert record["exact"]
    assert record["certified"]


@pytest.mark.slow
def test_no_certificate_is_wrong() -> None:
    records = [judged(one) for one in clients(63, ("digits",), None, first=5000)]
    assert [record for record in records if record["wrong"]] == []
    assert sum(record["certified"] for record in records) >= 15
    for record in records:
        if record["kind"] in ("bfloat16", "quantised"):
            assert not record["certified"]
