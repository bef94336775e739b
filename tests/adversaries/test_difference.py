"""What forgetting leaks, from real gradients of real models: before and after, to an observation of the forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from adversaries import ATTACKS
from adversaries.unlearning import difference
from fedattack.audit import audit_reconstruction
from fedattack.config import CompressionConfig, Config, DefenseConfig, ModelConfig, TrainingConfig
from fedattack.data import World, build_world
from fedattack.errors import DataError, NotApplicable
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import match, psnr
from fedattack.models import build_model, initial_weights, resolve
from fedattack.observation import EVERYONE, Auxiliary, Observation, Scenario, Update
from fedattack.training import batch_positions, local_update

CPU = torch.device("cpu")
NONE = CompressionConfig(name="none")
SAMPLES = 113
WHOLE = TrainingConfig(batch_size=0)
STEP = TrainingConfig(batch_size=0, protocol="fedavg", learning_rate=0.1)


def linear(config: ModelConfig) -> nn.Module:
    """A softmax regression on the pixels."""
    channels, size, classes = config.resolved
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))


@pytest.fixture(scope="session")
def digits(shared_dir) -> World:
    settings = {"dataset": "mnist", "data-dir": str(shared_dir / "data" / "MNIST")}
    return build_world(Config.from_mapping(settings))


class Client:
    """One client's images, and what it sends when it trains on some of them."""

    def __init__(self, world: World, name: str, seed: int = 0, samples: int = SAMPLES, **model: Any) -> None:
        ids = np.random.default_rng(seed).permutation(len(world.dataset.labels))
        self.images, self.labels = world.dataset.tensors(ids[:samples])
        self.public = Auxiliary(*world.dataset.tensors(ids[samples : samples + 300]), source="test")
        self.model = resolve(ModelConfig(name=name, classes=10, **model), 1, 28, 10)
        self.weights = initial_weights(self.model, seed)

    def sends(
        self,
        kept: Any,
        training: TrainingConfig = WHOLE,
        batches: list[np.ndarray] | None = None,
        compression: CompressionConfig = NONE,
        weights: dict[str, Tensor] | None = None,
    ) -> Observation:
        """The update of the samples at `kept`, all of them in each step unless told otherwise."""
        images, labels, weights = self.images[kept], self.labels[kept], weights or self.weights
        batches = batches or [np.arange(len(labels))] * training.local_steps
        result = local_update(build_model(self.model), weights, images, labels, batches, training)
        sent, kind = result.update, "delta" if training.protocol == "fedavg" else "gradient"
        values, indices = torch.cat([tensor.flatten() for tensor in sent.values()]), None
        if compression.name == "topk":
            indices = values.abs().topk(int(compression.rate * len(values))).indices.sort().values
            values = values[indices]
        update = Update(tuple(sent), tuple(tuple(t.shape) for t in sent.values()), indices, values, kind)  # type: ignore[arg-type]
        scenario = Scenario(self.model, training, compression)
        return Observation(1, 0, scenario, weights, update, len(labels), auxiliary=self.public)

    def forgets(self, count: int, training: TrainingConfig = WHOLE, **how: Any) -> Observation:
        """Its first `count` samples, from its updates before and after."""
        before, after = (
            self.sends(slice(None), training, **how),
            self.sends(slice(count, None), training, **how),
        )
        return difference.of_updates(before, after, len(self.labels), count)


def attacked(name: str, observation: Observation, images: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """PSNR of each image of an attack's answer, whose labels must be right."""
    attack = ATTACKS.get(name)(**settings)
    attack.check(observation.scenario)  # type: ignore[attr-defined]
    (answer,) = difference.OnDifference(attack).run([observation], 0, CPU)  # type: ignore[arg-type]
    order = list(match(answer.images, images).order)
    assert answer.labels[order].tolist() == labels.tolist()
    return psnr(answer.images[order], images)


@pytest.mark.parametrize(
    ("attack", "model", "count", "least", "settings"),
    [
        ("analytic", {"name": "mlp"}, 1, 100, {}),
        pytest.param("spear", {"name": "mlp", "width": 512}, 8, 100, {}, marks=pytest.mark.slow),
        ("gauss-newton", {"name": "lenet-zhu", "activation": "sigmoid"}, 1, 60, {"products": 1200}),
    ],
)
def test_two_updates_at_the_same_weights_give_the_forgotten(
    digits: World, attack: str, model: dict, count: int, least: float, settings: dict
) -> None:
    client = Client(digits, **model)
    observation = client.forgets(count)
    assert not difference.departures(client.sends(slice(None)).scenario, SAMPLES)
    images, labels = client.images[:count], client.labels[:count]
    assert attacked(attack, observation, images, labels, **settings).min() >= least


@pytest.mark.parametrize(
    "training",
    [
        WHOLE,
        STEP,
        STEP.model_copy(update={"weight_decay": 0.1, "momentum": 0.9}),
        TrainingConfig(batch_size=0, batch_norm="eval"),
    ],
)
def test_the_difference_is_the_gradient_of_the_forgotten(digits: World, training: TrainingConfig) -> None:
    """Against the forgotten's own gradient, computed alone; weight decay belongs to nobody."""
    client = Client(digits, "resnet20" if training.batch_norm == "eval" else "mlp", samples=24)
    found = client.forgets(3, training)
    own = client.sends(slice(0, 3), TrainingConfig(batch_size=3, batch_norm=training.batch_norm)).update
    error = (found.update.values - own.values).norm() / own.values.norm()
    assert error < (1e-5 if training.protocol == "fedsgd" else 1e-4)
    assert (found.num_examples, found.scenario.training.batch_size) == (3, 3)
    assert found.update.kind == "gradient"


def test_departures_are_told_beforehand_and_are_real(digits: World) -> None:
    """Each breaks the identity; the attack still runs on what is left of it."""
    client = Client(digits, "mlp")
    own = client.sends(slice(0, 1), TrainingConfig(batch_size=1)).update.values

    def error(found: Observation) -> float:
        entries = own if found.update.indices is None else own[found.update.indices]
        return float((found.update.values - entries).norm() / entries.norm())

    steps = STEP.model_copy(update={"local_steps": 3})
    halves = TrainingConfig(batch_size=16)
    before = client.sends(slice(None), halves, batch_positions(SAMPLES, halves, 1, 1, 0))
    after = client.sends(slice(1, None), halves, batch_positions(SAMPLES - 1, halves, 1, 1, 0))
    drawn = difference.of_updates(before, after, SAMPLES, 1)
    elsewhere = {name: tensor + 1e-2 for name, tensor in client.weights.items()}
    later = difference.of_updates(
        client.sends(slice(None)), client.sends(slice(1, None), weights=elsewhere), SAMPLES, 1
    )
    found = {
        "local_steps = 3": (steps, client.forgets(1, steps), False),
        "batch_size = 16 of 113": (halves, drawn, False),
        "at other weights": (WHOLE, later, True),
    }
    for part, (training, observation, moved) in found.items():
        sentences = difference.departures(Scenario(client.model, training, NONE), SAMPLES, moved=moved)
        assert len(sentences) == 1
        assert part in sentences[0]
        assert error(observation) > 0.01
        ATTACKS.get("analytic")().run([observation], 0, CPU)  # type: ignore[attr-defined]
    norm = Client(digits, "resnet20", samples=24)
    (sentence,) = difference.departures(Scenario(norm.model, WHOLE, NONE), 24)
    assert "normalises by its batch" in sentence
    alone = norm.sends(slice(0, 3), TrainingConfig(batch_size=3)).update.values
    assert float((norm.forgets(3).update.values - alone).norm() / alone.norm()) > 0.1
    noisy = Scenario(client.model, WHOLE, NONE, DefenseConfig(names=("clip-noise",)))
    assert "clip-noise" in difference.departures(noisy, SAMPLES)[0]
    summed = Scenario(client.model, WHOLE, NONE, DefenseConfig(names=("secure-aggregation",)))
    assert not difference.departures(summed, SAMPLES)


@pytest.mark.slow
def test_two_minibatches_drawn_anew_leak_nothing(digits: World) -> None:
    """Of five clients that forget one of their samples, each; the auditor's words."""
    training, observations, truths = TrainingConfig(batch_size=16), [], []
    for number in range(5):
        client = Client(digits, "lenet-zhu", seed=number, activation="sigmoid")
        before = client.sends(slice(None), training, batch_positions(SAMPLES, training, 1, 1, number))
        after = client.sends(slice(1, None), training, batch_positions(SAMPLES - 1, training, 1, 1, number))
        found = difference.of_updates(before, after, SAMPLES, 1)
        observations.append(dataclasses.replace(found, client=number))
        truths.append(GroundTruth(1, number, client.images[:1], client.labels[:1], (number,)))
    attack = difference.OnDifference(ATTACKS.get("gauss-newton")(products=100))  # type: ignore[arg-type]
    answers = [attack.run([one], 0, CPU)[0] for one in observations]
    assert {answer.method for answer in answers} == {"prior"}
    result = audit_reconstruction("gauss-newton", observations, answers, truths, 0.0)
    assert result.level == "none", result.verdict
    assert result.verdict.startswith("no leakage beyond the prior")


def test_of_compressed_updates_what_was_sent_both_times(digits: World) -> None:
    """Those entries are exact; nothing is said of the others."""
    client = Client(digits, "mlp")
    topk = CompressionConfig(name="topk", rate=0.05)
    found = client.forgets(1, compression=topk)
    (sentence,) = difference.departures(dataclasses.replace(found.scenario, training=WHOLE), SAMPLES)
    assert "'topk' at rate 0.05" in sentence
    before, after = (
        client.sends(kept, compression=topk).update.indices for kept in (slice(None), slice(1, None))
    )
    assert before is not None and after is not None and found.update.indices is not None  # noqa: PT018
    assert set(found.update.indices.tolist()) == set(before.tolist()) & set(after.tolist())
    own = client.sends(slice(0, 1), TrainingConfig(batch_size=1)).update.values[found.update.indices]
    torch.testing.assert_close(found.update.values, own, rtol=1e-3, atol=1e-5)
    few = CompressionConfig(name="topk", rate=1.2e-5)  # one entry
    other = client.sends(slice(50, None), compression=few)
    seen = dataclasses.replace(
        other, update=dataclasses.replace(other.update, indices=other.update.indices + 1)
    )
    with pytest.raises(NotApplicable, match="no entry was sent both times"):
        difference.of_updates(other, seen, SAMPLES, 50)


def test_sums_over_clients_give_the_same(digits: World) -> None:
    """Under secure aggregation, with the number of all samples in the place of the client's."""
    client = Client(digits, "mlp")

    def summed(dropped: int) -> Observation:
        parts = [slice(dropped, 40), slice(40, 100), slice(100, SAMPLES)]
        sent = [client.sends(part) for part in parts]
        total = sum(one.num_examples for one in sent)
        mean = sum(one.num_examples * one.update.values.double() for one in sent) / total
        update = dataclasses.replace(sent[0].update, values=mean.float())  # type: ignore[union-attr]
        return dataclasses.replace(sent[0], client=EVERYONE, update=update, num_examples=total)

    found = difference.of_updates(summed(0), summed(1), SAMPLES, 1)
    assert attacked("analytic", found, client.images[:1], client.labels[:1]).min() >= 100


def test_what_cannot_be_compared_is_refused(digits: World) -> None:
    client = Client(digits, "mlp", samples=8)
    before, after = client.sends(slice(None)), client.sends(slice(1, None))
    with pytest.raises(NotApplicable, match="clients 0 and 1"):
        difference.of_updates(before, dataclasses.replace(after, client=1), 8, 1)
    with pytest.raises(DataError, match="9 of 8"):
        difference.of_updates(before, after, 8, 9)
    everything = difference.of_updates(before, None, 8, 8)
    assert torch.equal(everything.update.values, before.update.values)
    held = CompressionConfig(name="topk", rate=0.1, error_feedback=True)
    late = [
        dataclasses.replace(one, round=2, scenario=Scenario(client.model, WHOLE, held))
        for one in (before, after)
    ]
    with pytest.raises(NotApplicable, match="error feedback"):
        difference.of_updates(*late, 8, 1)


def averaged(client: Client, dropped: int, training: TrainingConfig) -> dict[str, Tensor]:
    """FedAvg's global model after one round of four clients, of which the first drops its first samples."""
    kept = np.split(np.arange(SAMPLES), [30, 55, 90])
    kept[0] = kept[0][dropped:]
    total = sum(map(len, kept))
    moved = {name: tensor.double() for name, tensor in client.weights.items()}
    for part in kept:
        for name, change in client.sends(part, training).update.dense().items():
            moved[name] = moved[name] + len(part) / total * change.double()
    return {name: tensor.float() for name, tensor in moved.items()}


@pytest.mark.parametrize(
    ("attack", "model", "count"),
    [
        ("analytic", {"name": "mlp"}, 1),
        ("spear", {"name": "mlp", "width": 512}, 8),
        ("", {"name": "lenet-zhu"}, 3),
    ],
)
def test_another_client_reads_the_forgotten_in_two_global_models(
    digits: World, attack: str, model: dict, count: int
) -> None:
    """And how many there are, of how many, which nobody told it."""
    client = Client(digits, **model)
    seat = client.sends(slice(0, 1), STEP)
    models = averaged(client, 0, STEP), averaged(client, count, STEP)
    blind = difference.of_models(seat, *models)
    assert blind.num_examples == count
    told = difference.of_models(seat, *models, count, samples=SAMPLES)
    assert torch.equal(blind.update.values, told.update.values)
    own = client.sends(slice(0, count), TrainingConfig(batch_size=count)).update.values
    assert (blind.update.values - own).norm() < 1e-3 * own.norm()
    assert not attack or attacked(attack, blind, client.images[:count], client.labels[:count]).min() >= 100


def test_models_after_several_steps_do_not_name_the_number_of_samples(digits: World) -> None:
    client = Client(digits, "mlp")
    steps = STEP.model_copy(update={"local_steps": 5, "learning_rate": 0.5})
    seat = client.sends(slice(0, 1), steps)
    with pytest.raises(NotApplicable, match="no number of samples"):
        difference.of_models(seat, averaged(client, 0, steps), averaged(client, 1, steps), 1)


# ---------------------------------------------------------------------- released models


def trained(
    inputs: np.ndarray, labels: np.ndarray, decay: float, noise: np.ndarray, start: np.ndarray | None = None
) -> np.ndarray:
    """Minimum of ``sum of cross-entropies + decay n/2 |w|^2 + noise'w``, (classes * d,), by L-BFGS."""
    count, width = inputs.shape
    truth = np.eye(len(noise) // width)[labels]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        answers = inputs @ flat.reshape(-1, width).T
        answers -= answers.max(1, keepdims=True)
        logs = answers - np.log(np.exp(answers).sum(1, keepdims=True))
        slope = ((np.exp(logs) - truth).T @ inputs).ravel() + decay * count * flat + noise
        return float(-(logs * truth).sum() + decay * count / 2 * (flat @ flat) + noise @ flat), slope

    options = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-16, "gtol": 1e-7, "maxcor": 50}
    found = minimize(
        objective,
        np.zeros_like(noise) if start is None else start,
        jac=True,
        method="L-BFGS-B",
        options=options,
    )
    assert np.abs(found.jac).max() < 1e-4
    return found.x


def released(flat: np.ndarray, classes: int, side: int) -> dict[str, Tensor]:
    rows = torch.from_numpy(flat.reshape(classes, -1))
    return {"1.weight": rows[:, :-1].clone(), "1.bias": rows[:, -1].clone()}


def removals(
    world: World, sigma: float, *, fresh: bool, removed: int = 6, decay: float = 0.01
) -> Mapping[str, float]:
    """1,000 threes and eights: what an observer of two releases reads, mean and worst PSNR, and its floor.

    Pixels are divided by the largest norm, so that no input is longer than 1, as certified removal wants it.
    """
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.flatnonzero(np.isin(world.dataset.labels, (3, 8))))[:1500]
    images, labels = world.dataset.tensors(ids)
    norm = float(images[:1000].flatten(1).norm(dim=1).max())
    labels = (labels == 8).long()
    inputs = np.hstack([images[:1000].flatten(1).double().numpy() / norm, np.ones((1000, 1))])
    noise = sigma * rng.standard_normal(2 * inputs.shape[1])
    first = trained(inputs, labels[:1000].numpy(), decay, noise)
    model = ModelConfig(
        name="test_difference:linear", classes=2, channels=1, image_size=28, activation="relu"
    )
    scenario = Scenario(model, TrainingConfig(batch_size=0, weight_decay=decay), NONE)
    public = Auxiliary(images[1000:] / norm, labels[1000:], "test")
    nothing = Update(("1.weight", "1.bias"), ((2, 784), (2,)), None, torch.zeros(2 * 785), "gradient")
    seat = Observation(1, 0, scenario, released(first, 2, 28), nothing, 1, auxiliary=public)
    scores, guesses = [], []
    for index in range(removed):
        kept = np.delete(np.arange(1000), index)
        again = sigma * rng.standard_normal(len(noise)) if fresh else noise
        second = trained(inputs[kept], labels[:1000][kept].numpy(), decay, again, first)
        seen = difference.of_releases(seat, released(second, 2, 28), 1000, 1)
        (answer,) = ATTACKS.get("analytic")().run([seen], 0, CPU)  # type: ignore[attr-defined]
        original = images[index : index + 1]
        scores.append(float(psnr((answer.images * norm).clamp(0, 1), original)))
        guesses.append(float(psnr(images[1000:].mean(0, keepdim=True), original)))
    return {"mean": float(np.mean(scores)), "worst": min(scores), "floor": float(np.mean(guesses))}


@pytest.mark.parametrize("sigma", [0.0, 1.0, 10.0])
def test_noise_that_both_releases_share_hides_nothing(digits: World, sigma: float) -> None:
    found = removals(digits, sigma, fresh=False)
    assert found["worst"] >= 30
    assert found["mean"] > found["floor"] + 15


def test_noise_drawn_anew_for_the_second_release_hides_the_forgotten(digits: World) -> None:
    found = removals(digits, 10.0, fresh=True)
    assert found["mean"] < found["floor"]
