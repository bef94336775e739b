"""The view of a round: norms, products and Gram matrices against autograd, sample by sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from membership_scenes import as_update, build_as, gradients, top_k
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adversaries.membership import layers, per_sample
from adversaries.membership import view as view_module
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.per_sample import Gradients, gram, products
from adversaries.membership.view import RoundView, System
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import NotApplicable, PayloadError
from fedattack.models import build_model, initial_weights
from fedattack.models.classifiers.resnet import ResNet
from fedattack.observation import Candidates, Observation, Scenario, Update
from fedattack.training import batch_gradient, load_weights
from simulations.bench.view import run as benchmark

CPU = torch.device("cpu")


def perceptron() -> nn.Module:
    return build_model(ModelConfig(name="mlp", classes=10, channels=1, image_size=8, activation="relu"))


def tiny_cnn() -> nn.Module:
    return build_model(ModelConfig(name="tiny-cnn", classes=10, channels=1, image_size=8, activation="relu"))


def with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics as after some training."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def resnet() -> nn.Module:
    config = ModelConfig(name="resnet18", classes=10, channels=1, image_size=8, activation="relu")
    return with_statistics(ResNet(config, (1, 1, 1, 1)))


def foreign() -> nn.Module:
    """None of the house's: normalised by statistics that its state holds, and overwriting what layers answer."""
    return with_statistics(
        nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Linear(12, 10)
        )
    )


class Unusual(nn.Module):
    """What rules do not cover: a layer used twice, a shared weight, rows of a sample, groups, a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.edge = nn.Conv2d(4, 2, 3, padding="same", padding_mode="reflect")
        self.twice = nn.Linear(8, 8)
        self.rows = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(8)
        self.one, self.other = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.other.weight = self.one.weight
        self.head = nn.Linear(32, 10)
        self.head.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.edge(torch.tanh(self.deep(torch.tanh(self.grouped(images))))).flatten(1)
        x = self.rows(x.reshape(-1, 8, 4)).reshape(-1, 4, 8)
        x = self.norm(self.twice(torch.tanh(self.twice(x)))).flatten(1)
        return self.head(self.other(torch.tanh(self.one(x))))


BUILDS = [(perceptron, 20), (tiny_cnn, 20), (resnet, 2), (foreign, 5), (Unusual, 7)]


@pytest.mark.parametrize(("build", "count"), BUILDS)
def test_products_and_gram_equal_autograd(build, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build().eval()
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    reference = gradients(build_as(model, torch.float64), state, samples(count))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()  # only its architecture is used
    tensors = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    dense = as_update(tensors, "gradient")
    last = list(tensors)[-1]
    only_last = as_update({n: t * (10.0 if n == last else 1e-3) for n, t in tensors.items()}, "gradient")
    updates = [dense, top_k(dense, 0.1), top_k(only_last, 0.0005)]
    flat = torch.stack([torch.cat([t.flatten() for t in u.dense().values()]).double() for u in updates])
    wanted, lengths = flat @ reference.T, reference.norm(dim=1)
    bound = 1e-6 * flat.norm(dim=1)[:, None] * lengths

    def check() -> None:
        first, second = (Gradients(model, state, samples(count, half)) for half in (0, 1))
        found = [products(one, updates) for one in (first, second)]
        assert ((torch.cat([dots for dots, _ in found], 1) - wanted).abs() <= bound).all()
        torch.testing.assert_close(torch.cat([norms for _, norms in found]), lengths, rtol=1e-5, atol=0)
        scale = lengths[:, None] * lengths
        for update in updates:
            columns = slice(None) if update.indices is None else update.indices
            whole = reference[:, columns] @ reference[:, columns].T
            assert ((gram([first, second], update) - whole).abs() <= 1e-5 * scale).all()

    check()
    monkeypatch.setattr(per_sample, "HELD", 1)  # one sample at a time, and worked out again
    monkeypatch.setattr(layers, "MEMORY", count * len(flat[0]) // 8)  # some entries at a time
    check()


def samples(count: int, half: int | None = None) -> Candidates:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    here = slice(None) if half is None else [slice(count // 2), slice(count // 2, None)][half]
    return Candidates(images[here], (torch.arange(count) % 10)[here])


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest floating-point tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not is_view(function):
                self.elements = max(self.elements, tensor.numel())
        return result


def is_view(function) -> bool:
    return bool(function._schema.returns and function._schema.returns[0].alias_info is not None)


def test_large_head_is_never_formed() -> None:
    """The 7.8M-entry head of the published LeNet: 40 dense gradients would be 1.25 GB."""
    config = ModelConfig(name="lenet-zhu", classes=10_177, channels=3, image_size=32, activation="sigmoid")
    model = build_model(config).eval()
    state = initial_weights(config, 0)
    names = tuple(n for n, _ in model.named_parameters())
    shapes = tuple(tuple(p.shape) for _, p in model.named_parameters())
    total = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(total, generator=generator)[: total // 1000].sort().values
    update = Update(names, shapes, indices, torch.randn(len(indices), generator=generator))
    images = torch.rand(40, 3, 32, 32, generator=generator)
    labels = torch.randint(10_177, (40,), generator=generator)
    one = Gradients(model, state, Candidates(images, labels))
    with LargestTensor() as watch:
        dots, norms = products(one, [update])
    assert watch.elements < total / 8  # nothing near one whole gradient
    g = gradients(build_as(model, torch.float64), state, Candidates(images[7:8], labels[7:8]))[0]
    assert float(norms[7]) == pytest.approx(float(g.norm()), rel=1e-5)
    off = abs(float(dots[0, 7]) - float(g[indices] @ update.values.double()))
    assert off < 1e-6 * float(g.norm()) * float(update.values.norm())


def seen(build=perceptron, name: str = "mlp") -> tuple[list[Observation], nn.Module]:
    """Four clients' gradients of four samples each; one's is sparse, and one was sent other weights."""
    scenario = Scenario(
        ModelConfig(name=name, classes=10, channels=1, image_size=8, activation="relu"),
        TrainingConfig(protocol="fedsgd"),
        CompressionConfig(name="none"),
    )
    model = build_model(scenario.model).eval()
    found = []
    for client in range(4):
        weights = initial_weights(scenario.model, seed=client // 3)
        load_weights(model, weights)
        batch = samples(16)
        here = slice(4 * client, 4 * client + 4)
        _, parts = batch_gradient(model, batch.images[here], batch.labels[here])
        names = [n for n, _ in model.named_parameters()]
        update = as_update(dict(zip(names, parts, strict=True)), "gradient")
        update = top_k(update, 0.05) if client == 1 else update
        found.append(Observation(1, client, scenario, weights, update, 4))
    return found, model


def test_equations_are_of_unit_gradients_over_what_was_sent() -> None:
    observations, model = seen()
    asked, public = samples(16), samples(6)
    view = RoundView(observations, Knowledge(asked, public), CPU)
    together = Candidates(torch.cat([asked.images, public.images]), torch.cat([asked.labels, public.labels]))
    assert [system.rows for system in view.systems()] == [[0, 2], [1], [3]]
    for o in observations:
        rows = gradients(build_as(model, torch.float64), o.weights, together)
        rows = rows / rows.norm(dim=1, keepdim=True)
        values = o.update.values.double()
        if o.update.indices is not None:
            rows = rows[:, o.update.indices]
        matrix, right = view.equations(o.client)
        torch.testing.assert_close(matrix, rows @ rows.T, rtol=0, atol=1e-6)
        torch.testing.assert_close(right, rows @ values / values.norm(), rtol=0, atol=1e-6)
        # A gradient of four samples is their mean: told apart exactly, for their gradients are independent.
        found = torch.linalg.lstsq(matrix[:16, :16], right[:16, None]).solution[:, 0]
        if o.update.indices is None:
            assert set(found.topk(4).indices.tolist()) == set(range(4 * o.client, 4 * o.client + 4))
            assert found.topk(5).values[4] < 1e-3 < found.topk(4).values[3]


def test_of_many_public_samples_some_are_in_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "MOST_PUBLIC", 4)
    observations, _ = seen()
    public = samples(7)
    (system,) = RoundView(observations[:1], Knowledge(samples(5), public), CPU).systems()
    chosen = Candidates(public.images[[0, 2, 4, 6]], public.labels[[0, 2, 4, 6]])
    (wanted,) = RoundView(observations[:1], Knowledge(samples(5), chosen), CPU).systems()
    assert torch.equal(system.gram, wanted.gram)
    assert torch.equal(system.products, wanted.products)


def test_an_update_of_another_model_is_refused() -> None:
    observations, _ = seen()
    others, _ = seen(name="tiny-cnn")
    for wrong in (others[0].update, replace(observations[0].update, shapes=((1,),) * 4)):
        view = RoundView([replace(observations[0], update=wrong)], Knowledge(samples(4)), CPU)
        with pytest.raises(PayloadError, match="an update of another model: tensor "):
            _ = view.cosines


def test_losses_are_taken_at_what_each_client_was_sent() -> None:
    observations, model = seen()
    first, second = observations[:2]
    moved = {name: tensor + 0.1 for name, tensor in second.weights.items()}
    view = RoundView([first, replace(second, weights=moved)], Knowledge(samples(4)), CPU)
    for row, weights in enumerate((first.weights, moved)):
        load_weights(model, weights)
        wanted = functional.cross_entropy(model(samples(4).images), samples(4).labels, reduction="none")
        torch.testing.assert_close(view.sent_losses[row], wanted.detach().double(), rtol=1e-5, atol=1e-6)
    assert (view.sent_losses[0] - view.sent_losses[1]).abs().max() > 1e-3


def test_batch_norm_statistics_that_were_not_sent() -> None:
    observations, model = seen(name="resnet20")
    o = observations[0]
    view = RoundView([o], Knowledge(samples(4)), CPU)
    assert view.losses("sent").shape == (4,)
    with pytest.raises(NotApplicable, match=r"client 0 trained .* statistics .* were not sent"):
        _ = view.client_losses
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    whole = RoundView([replace(o, buffers=buffers)], Knowledge(samples(4)), CPU)
    load_weights(model, o.weights)
    with torch.no_grad():
        for name, change in o.update.dense().items():
            model.get_parameter(name).sub_(o.scenario.training.learning_rate * change)
        for name, buffer in buffers.items():
            model.get_buffer(name).copy_(buffer)
    wanted = functional.cross_entropy(model(samples(4).images), samples(4).labels, reduction="none").double()
    torch.testing.assert_close(whole.client_losses[0], wanted.detach(), rtol=1e-5, atol=1e-5)


def test_the_benchmark_compares_like_with_like() -> None:
    figures = benchmark(quick=True)
    for name in ("mlp", "resnet20"):
        assert figures[f"{name}_apart"] < 1e-4
        assert figures[f"{name}_ratio"] == pytest.approx(
            figures[f"{name}_vmap_ms"] / figures[f"{name}_view_ms"]
        )


def test_damping_where_most_gradients_are_zero_over_what_was_sent() -> None:
    gram = torch.diag(torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64))
    products = torch.zeros(1, 4, dtype=torch.float64)
    for matrix, sparse, damping, added in (
        (gram, False, None, 0.01),
        (gram, True, None, 0.03 * 0.125),
        (0 * gram, True, None, 0.03),
        (torch.eye(4).double() / 4, True, None, 0.03 / 4),
        (torch.eye(4).double() / 4, True, 0.2, 0.05),
        (gram, False, 0.2, 0.2),
    ):
        found = System([0], matrix, products, sparse).damped(damping)
        torch.testing.assert_close(found, matrix + added * torch.eye(4).double())
