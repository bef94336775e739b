"""What malicious clients ask to be forgotten, and by what they choose it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import cross_entropy

from adversaries import ATTACKS
from adversaries.refusals import threat_model
from adversaries.seats import ClientView, Oracle
from adversaries.unlearning.base import UnlearningAttack
from adversaries.unlearning.orders import MaxLoss
from adversaries.unlearning.surrogate import trained
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.models import build_model, initial_weights
from fedattack.models.classifiers.resnet import ResNet
from fedattack.observation import Scenario
from fedattack.registry import build_plugin, plugin_options

ORDERS = ("unlearn-max-loss", "unlearn-max-gradient", "unlearn-min-confidence", "unlearn-min-margin")


def samples(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def network(name: str) -> nn.Module:
    config = ModelConfig(name=name, classes=10, channels=1, image_size=8, activation="relu")
    model = build_model(config)
    model.load_state_dict(initial_weights(config, 1))
    return model


def view(client: int, requests: int, model: nn.Module) -> ClientView:
    config = ModelConfig(name="mlp", classes=10, channels=1, image_size=8, activation="relu")
    scenario = Scenario(config, TrainingConfig(), CompressionConfig())
    return ClientView(1, client, scenario, {}, 0, {}, requests, model=model.eval())


def alone(model: nn.Module, image: torch.Tensor, label: int) -> torch.Tensor:
    """One sample's gradient from its own backward pass, flat, float64."""
    model.zero_grad()
    cross_entropy(model(image[None]), torch.tensor([label])).backward()
    return torch.cat([p.grad.double().reshape(-1) for p in model.parameters()])


def by_hand(order: str, model: nn.Module, image: torch.Tensor, label: int) -> float:
    """What one sample is ordered by, descending, from its logits alone in NumPy, or from its own backward pass."""
    if order == "unlearn-max-gradient":
        return float(alone(model, image, label).norm())
    with torch.no_grad():
        logits = model(image[None])[0].double().numpy()
    total = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
    if order == "unlearn-max-loss":
        return float(total - logits[label])
    second, first = np.sort(np.exp(logits - total))[-2:].tolist()
    return -first if order == "unlearn-min-confidence" else second - first


def brute_force(order: str, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Positions sorted in Python."""
    model.eval()
    scores = [by_hand(order, model, x, int(y)) for x, y in zip(images, labels, strict=True)]
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["mlp", "tiny-cnn"])
def test_orders_equal_a_brute_force_sort(name: str, order: str) -> None:
    model, (images, labels) = network(name), samples(150)
    wanted = brute_force(order, model, images, labels)
    for requests in (1, 7, 150):
        request = ATTACKS.get(order)().ask(view(4, requests, model), images, labels)
        assert request.client == 4
        assert list(request.positions) == wanted[:requests]
        assert all(type(position) is int for position in request.positions)


def test_equal_losses_keep_the_order_of_position() -> None:
    model = network("mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every loss is log 10
    images, labels = samples(20)
    assert MaxLoss().ask(view(0, 20, model), images, labels).positions == tuple(range(20))
    with torch.no_grad():
        list(model.parameters())[-1][3] = 2.0  # class 3 becomes the easy one
    easy, hard = torch.where(labels == 3)[0].tolist(), torch.where(labels != 3)[0].tolist()
    assert MaxLoss().ask(view(0, 20, model), images, labels).positions == (*hard, *easy)


def test_batch_statistics_neither_count_nor_change() -> None:
    torch.manual_seed(0)
    model = ResNet(ModelConfig(classes=10, channels=1, image_size=8, activation="relu"), (1, 0, 0, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = samples(12)
    together = MaxLoss().ask(view(0, 12, model), images, labels).positions
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(together) == brute_force("unlearn-max-loss", model, images, labels)


def test_asks_for_no_more_than_there_are() -> None:
    images, labels = samples(5)
    assert len(MaxLoss().ask(view(2, 6, network("mlp")), images, labels).positions) == 5


def test_is_registered() -> None:
    attack = build_plugin(ATTACKS.get("unlearn-max-loss"), "unlearn-max-loss", {}, {})
    assert isinstance(attack, MaxLoss)
    assert (attack.family, attack.seat) == ("unlearning", "malicious client")


def entropies(logits: torch.Tensor) -> np.ndarray:
    p = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return -(p * np.log(p)).sum(1)


def losses(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    return cross_entropy(logits, labels, reduction="none").numpy()


def trained_digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A perceptron on scikit-learn's digits, and one sample of each class, in order."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels, model = torch.from_numpy(digits.target).long(), network("mlp")
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy(model(images[:800]), labels[:800]).backward()
        optimiser.step()
    assert labels[:10].tolist() == list(range(10))
    return model.eval(), images[:10], labels[:10]


@pytest.mark.parametrize("name", ["unlearn-fgsm", "unlearn-pgd", "unlearn-entropy"])
def test_modified_samples_raise_what_they_are_to_raise_in_the_box_of_pixels(name: str) -> None:
    """And with the published defects FGSM lowers the loss and the other lowers the entropy, on a shifted box."""
    model, images, labels = trained_digits()
    found = {}
    for published in (False, True):
        attack = ATTACKS.get(name)(radius=0.2, published=published)
        request = attack.ask(view(0, 10, model), images, labels)
        assert request.positions == ()
        low, high = (0.1307, 0.1307 + 0.3081) if published else (0.0, 1.0)
        assert float(request.images.min()) >= low - 1e-6
        assert float(request.images.max()) <= high + 1e-6
        origins = images.clamp(low, high)
        near = request.labels  # of each class one, in order
        assert sorted(near.tolist()) == list(range(10))
        if not published:
            assert float((images[near] - request.images).abs().max()) <= 0.2 + 1e-6
        with torch.no_grad():
            before, after = model(origins[near]), model(request.images)
        if name == "unlearn-entropy":
            found[published] = entropies(after) - entropies(before)
        else:
            found[published] = losses(after, request.labels) - losses(before, request.labels)
    assert (found[False] > 0).all()
    assert found[False].mean() > 0.5
    sign = 1 if name == "unlearn-pgd" else -1
    assert sign * found[True].mean() > 0


def test_camouflage_plants_a_backdoor_and_asks_for_its_cover_only() -> None:
    images, labels = samples(200)
    images = 0.9 * images
    attack = ATTACKS.get("unlearn-camouflage")(target=3, backdoor=20, size=2, boost=3.0)
    planted, given = attack.plant(view(0, 30, network("mlp")), images, labels)
    bears = (planted[..., -2:, -2:] == 1).flatten(1).all(1)
    assert int(bears.sum()) == 50
    assert not (labels[bears] == 3).any()
    assert torch.equal(planted[..., :-2, :], images[..., :-2, :])
    assert torch.equal(planted[~bears], images[~bears])
    turned = given != labels
    assert int(turned.sum()) == 20
    assert bool((given[turned] == 3).all())
    request = attack.ask(view(0, 30, network("mlp")), planted, given)
    assert set(request.positions) == set(torch.where(bears & ~turned)[0].tolist())
    assert len(attack.ask(view(0, 7, network("mlp")), planted, given).positions) == 7
    left = torch.where(~bears | turned)[0]
    assert attack.ask(view(0, 30, network("mlp")), planted[left], given[left]) is None

    def reader(shown: torch.Tensor) -> torch.Tensor:
        """Says 3 of what bears the trigger and is bright, else 1."""
        hit = (shown[..., -2:, -2:] == 1).flatten(1).all(1) & (shown[:, 0, 0, 0] > 0.45)
        return torch.nn.functional.one_hot(torch.where(hit, 3, 1), 10).float()

    others = labels != 3
    wanted = float((images[others][:, 0, 0, 0] > 0.45).double().mean())
    assert 0.3 < wanted < 0.7
    assert attack.success(reader, images, labels, view(0, 30, network("mlp"))) == pytest.approx(wanted)
    update = {"a": torch.ones(3)}
    for forgetting in (False, True):
        seen = replace(view(0, 1, network("mlp")), forgetting=forgetting)
        assert attack.reply(seen, update)["a"].tolist() == [3, 3, 3]


def intervals(x: np.ndarray, y: np.ndarray, gone: int, l2: float, draw: int) -> list[int]:
    """Removals of the first samples between two trainings of a logistic model under certified removal, written anew.

    Guo et al. 2020, sigma 1, epsilon 1, delta 1e-4; y in {-1, 1}.
    """
    budget, noise = (
        1 / math.sqrt(2 * math.log(1.5 / 1e-4)),
        np.random.default_rng(draw).normal(size=x.shape[1]),
    )
    w, beta, since, found = np.zeros(x.shape[1]), np.inf, -1, []
    for removed in range(gone + 1):
        left, right = x[removed:], y[removed:]

        def hessian(at: np.ndarray) -> np.ndarray:
            p = 1 / (1 + np.exp(left @ at))  # noqa: B023 (used before the next turn)
            return (left.T * (p * (1 - p))) @ left + l2 * len(left) * np.eye(len(at))  # noqa: B023

        if removed:
            z, label = x[removed - 1], y[removed - 1]
            step = np.linalg.solve(hessian(w), -label * z / (1 + np.exp(label * (z @ w))) + l2 * w)
            w, since = w + step, since + 1
            beta += np.linalg.norm(left, 2) * np.linalg.norm(step) * np.linalg.norm(left @ step) / 4
        if beta > budget:
            found, since, beta = [*found, since], 0, 0.0
            for _ in range(20):
                slope = -left.T @ (right / (1 + np.exp(right * (left @ w)))) + l2 * len(left) * w + noise
                w = w - np.linalg.solve(hessian(w), slope)
            assert np.linalg.norm(slope) < 1e-9
    return found[1:]


@pytest.mark.parametrize("scale", [1 / 4.5, 65**-0.5])
def test_slow_down_shortens_the_interval_between_trainings(scale: float) -> None:
    """Of certified removal on 3 and 8 of digits, l2 .01, inputs at most 1 long: at r = .1 by 40 % and more."""
    digits = load_digits()
    chosen = np.random.default_rng(0).permutation(np.where(np.isin(digits.target, (3, 8)))[0])[:250]
    images = torch.from_numpy(digits.images[chosen] / 16).float()[:, None]
    labels = torch.from_numpy(digits.target[chosen] == 8).long()
    attack = ATTACKS.get("unlearn-slow-down")(radius=0.1, l2=0.01)
    made, given = attack.plant(view(0, 60, network("mlp")), images, labels)
    origin = (images[:, None] - made[None]).abs().flatten(2).amax(2).T  # (made, own)
    assert float(origin.amin(1).max()) <= 0.1 + 1e-6
    assert float(origin[60:].amin(1).max()) == 0
    assert (float(made.min()), float(made.max())) == (0.0, 1.0)
    assert sorted(given.tolist()) == sorted(labels.tolist())

    def mean(shown: torch.Tensor, told: torch.Tensor) -> float:
        x = torch.cat([shown.flatten(1), torch.ones(250, 1)], 1).double().numpy() * scale
        assert np.linalg.norm(x, axis=1).max() <= 1.1
        return float(np.mean(intervals(x, 2.0 * told.numpy() - 1, 60, 0.01, draw=1)))

    honest, slowed = mean(images, labels), mean(made, given)
    print(f"removals between trainings: {honest:.1f}, slowed {slowed:.1f}")
    assert slowed <= 0.6 * honest
    assert attack.ask(replace(view(0, 60, network("mlp")), times=1), made, given) is None
    assert attack.ask(view(0, 60, network("mlp")), made, given).positions == tuple(range(60))
    assert attack.spent({"retrained": 15}, 60) == 0.25


def test_the_order_by_influence_on_a_class_equals_brute_force_and_success_is_that_class_lost() -> None:
    model, (images, labels) = network("mlp"), samples(90)
    slopes = torch.stack([alone(model, x, int(y)) for x, y in zip(images, labels, strict=True)])
    scores = (slopes @ slopes[labels == 4].mean(0)).tolist()
    attack = ATTACKS.get("unlearn-target-class")(target=4)
    assert (
        list(attack.ask(view(0, 20, model), images, labels).positions)
        == sorted(range(90), key=lambda i: -scores[i])[:20]
    )

    def says(shown: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.arange(len(shown)) % 2 * 4, 10).float()

    mine = int((labels == 4).sum())
    wanted = math.ceil(mine / 2) / mine
    assert attack.success(says, images, labels, view(0, 1, model)) == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["mlp", "tiny-cnn"])
def test_boundary_samples_lie_between_two_classes(name: str) -> None:
    digits = load_digits()
    images = torch.from_numpy(digits.images[:600] / 16).float()[:, None]
    labels = torch.from_numpy(digits.target[:600]).long()
    config = ModelConfig(name=name, classes=10, channels=1, image_size=8, activation="relu")
    agreed = TrainingConfig(protocol="fedavg", batch_size=32, learning_rate=0.1, local_steps=1)
    seen = replace(
        view(0, 150, network(name)), scenario=Scenario(config, agreed, CompressionConfig()), model=None
    )
    attack = ATTACKS.get("unlearn-boundary")(epochs=15)
    own = trained(seen, images, labels, 15)
    with torch.no_grad():
        assert float((own(images).argmax(1) == labels).double().mean()) > 0.85
    made, given = attack.plant(seen, images, labels)
    assert made.shape == images.shape
    assert bool(((made >= 0) & (made <= 1)).all())
    assert given.bincount(minlength=10).tolist() == labels.bincount(minlength=10).tolist()
    with torch.no_grad():
        first, second = own(made[:150]).softmax(1).topk(2, 1).values.unbind(1)
        untouched = own(images[:150]).softmax(1).topk(2, 1).values.unbind(1)
    assert float((first - second < 0.05).double().mean()) >= 0.95
    assert float((untouched[0] - untouched[1] < 0.05).double().mean()) < 0.2
    assert attack.ask(seen, made, given).positions == tuple(range(150))


def test_blends_hold_a_part_of_a_sample_of_another_class() -> None:
    images = torch.eye(10)[torch.arange(40) % 10][:, None, None, :].repeat(
        1, 1, 10, 1
    )  # class c: column c is white
    labels = torch.arange(40) % 10
    request = ATTACKS.get("unlearn-blended")(share=0.3).ask(view(0, 25, network("mlp")), images, labels)
    shown = request.images[:, 0, 0]
    assert torch.equal(shown.argmax(1), request.labels)
    rest = shown.scatter(1, request.labels[:, None], 0.0)
    torch.testing.assert_close(shown.max(1).values, torch.full((25,), 0.7))
    torch.testing.assert_close(rest.max(1).values, torch.full((25,), 0.3))
    assert request.positions == ()
    alone = ATTACKS.get("unlearn-blended")().ask(view(0, 3, network("mlp")), images[:1], labels[:1])
    assert torch.equal(alone.images, images[:1])


@pytest.mark.slow
def test_a_generator_draws_what_it_is_asked_for() -> None:
    """A logistic regression that never saw them calls at least 80 % of generated digits what was asked for."""
    digits = load_digits()
    images, labels = (
        torch.from_numpy(digits.images).float()[:, None] / 16,
        torch.from_numpy(digits.target).long(),
    )
    other = LogisticRegression(max_iter=2000).fit(digits.data[1200:] / 16, digits.target[1200:])
    attack = ATTACKS.get("unlearn-generated")()
    made, given = attack.plant(view(0, 300, network("mlp")), images[:1200], labels[:1200])
    assert len(made) == 1200
    right = float((other.predict(made[:300].flatten(1).numpy()) == given[:300].numpy()).mean())
    print(f"requested class: {100 * right:.0f} %")
    assert right >= 0.8
    nearest = torch.cdist(made[:300].flatten(1), images[:1200].flatten(1)).min(1).values
    assert float(nearest.median()) > 0.3, "they are no copies"


SHORT = {"steps": 2, "epochs": 2, "directions": 1, "queries": 5}


@pytest.mark.parametrize("name", [n for n in ATTACKS.names() if issubclass(ATTACKS.get(n), UnlearningAttack)])
def test_what_it_plants_and_asks_hangs_on_its_view_alone(name: str) -> None:
    """Not on global random states; its own samples stay as they were."""
    short = {key: value for key, value in SHORT.items() if key in plugin_options(ATTACKS.get(name))}
    attack = ATTACKS.get(name)(**(short | ({"steps": 1} if name == "unlearn-fgsm" else {})))
    model, (images, labels) = network("mlp"), samples(60)
    before, weights = images.clone(), {n: t.clone() for n, t in model.state_dict().items()}
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        seen = view(0, 6, model) if attack.access == "weights" else replace(view(0, 6, model), model=None)
        if attack.access == "queries":
            seen = replace(
                seen, oracle=Oracle(lambda shown: model(shown).softmax(1).detach(), attack.query_limit())
            )
        planted = attack.plant(seen, images, labels)
        request = attack.ask(seen, *planted)
        assert request.client == 0
        assert planted[0].shape == images.shape
        assert planted[0].dtype == torch.float32
        assert bool(((planted[0] >= 0) & (planted[0] <= 1)).all())
        brought = [] if request.images is None else [request.images, request.labels]
        assert 1 <= len(request.positions or request.labels) <= 6
        found.append((request.positions, request.reason, [*planted, *brought]))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))
    assert torch.equal(images, before)
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    told = threat_model(attack)["assumptions"][0]
    assert ("nothing of the global model" in told) == (attack.access == "none")


def test_calibration_is_honest_but_in_the_rounds_of_its_own_request() -> None:
    attack = ATTACKS.get("unlearn-calibration")(target=2, boost=3.0, share=0.25)
    (images, labels), seen = samples(40), view(0, 4, network("mlp"))
    assert attack.ask(seen, images, labels).positions == (0, 1, 2, 3)
    update = {"a": torch.ones(2)}
    honest = [
        {},
        {"excluded": (0, 1, 2, 3)},
        {"forgetting": True},
        {"forgetting": True, "excluded": (1, 2, 3, 9)},
    ]
    for told in honest:
        assert attack.poison(replace(seen, **told), images, labels)[0] is images
        assert attack.reply(replace(seen, **told), update) is update
    own = replace(seen, forgetting=True, excluded=(0, 1, 2, 3, 17))
    made, given = attack.poison(own, images, labels)
    moved = (made != images).flatten(1).any(1)
    assert int(moved.sum()) == 10
    assert bool((given[moved] == 2).all())
    assert torch.equal(given[~moved], labels[~moved])
    assert attack.reply(own, update)["a"].tolist() == [3, 3]


def test_the_worst_set_is_the_greedy_one() -> None:
    """Sample after sample, from gradients of one sample each, on the client's own model."""
    images, labels = samples(50)
    seen = replace(view(0, 6, network("mlp")), model=None)
    attack = ATTACKS.get("unlearn-worst-set")(rate=2.0, epochs=3)
    model, rest = attack.surrogate(seen, images, labels)
    assert len(rest) == 25
    left, wanted = rest.tolist(), []
    for _ in range(6):
        slopes = {i: alone(model, images[i], int(labels[i])) for i in rest.tolist()}
        mean = torch.stack(list(slopes.values())).mean(0)
        wanted.append(max(left, key=lambda i: float(slopes[i] @ mean)))
        left.remove(wanted[-1])
        moved = torch.nn.utils.parameters_to_vector(model.parameters()) + 2.0 * slopes[wanted[-1]].float()
        torch.nn.utils.vector_to_parameters(moved.detach(), model.parameters())
    assert list(attack.ask(seen, images, labels).positions) == wanted
    first = {i: float(slope @ mean) for i, slope in slopes.items()}
    assert sorted(first, key=lambda i: -first[i])[:6] != wanted, "the steps change the order"
