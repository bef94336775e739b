"""The Eavesdropper as a library user has it: in front of any Flower strategy, with ordinary Flower clients."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    QFedAvg,
    Strategy,
)
from torch import Tensor

from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, PayloadError, RunFailed
from fedattack.models import initial_weights
from fedattack.observation import Observation, Scenario
from simulations.engine.flower_internals import server_identity
from simulations.engine.local_grid import InlineGrid
from strategies import Eavesdropper, RoundReport
from strategies.eavesdropper import seeded_sampling
from strategies.light_records import HeldArray, LightArrays, LightMetrics, LightRecords, SteppedArray
from strategies.messages import read_dense, to_record, to_tensors

MODEL = ModelConfig(name="mlp", classes=3, channels=1, image_size=4, activation="relu")
SCENARIO = Scenario(MODEL, TrainingConfig(protocol="fedavg", local_steps=2), CompressionConfig(name="none"))
CLIENTS = 7


def ordinary(client: int, round: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The step that an ordinary client takes; any numbers will do."""
    rng = np.random.default_rng([client, round, len(name), *shape])
    return rng.normal(scale=0.1, size=shape).astype(np.float32)


def flower_app() -> ClientApp:
    """A client as in Flower's own examples: new weights, num-examples, a loss under a name of its own."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, round = context.node_config["partition-id"], message.content["config"]["server-round"]
        arrays = ArrayRecord(
            {
                name: Array(array.numpy() + ordinary(client, round, name, array.shape))
                for name, array in message.content["arrays"].items()
            }
        )
        metrics = MetricRecord({"num-examples": 10 * (client + 1), "train_loss": 1.0 + client})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


class Place:
    """The little that an InlineGrid asks of a workplace."""

    partitions = tuple(range(CLIENTS))


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Some of Flower's strategies collect garbage for each client; torch need not be walked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def start(strategy: Strategy, rounds: int = 3) -> dict[str, Tensor]:
    grid = InlineGrid(Place(), flower_app())  # type: ignore[arg-type]
    with server_identity(grid.run_id):
        result = strategy.start(grid, ArrayRecord(initial_weights(MODEL, 0)), num_rounds=rounds)
    grid.close()
    return to_tensors(result.arrays)


STRATEGIES = {
    "FedAvg": lambda: FedAvg(fraction_evaluate=0.0),
    "FedAvgM": lambda: FedAvgM(fraction_evaluate=0.0, server_momentum=0.9),
    "FedAdam": lambda: FedAdam(fraction_evaluate=0.0),
    "FedMedian": lambda: FedMedian(fraction_evaluate=0.0),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(fraction_evaluate=0.0),
    "Krum": lambda: Krum(fraction_evaluate=0.0, num_malicious_nodes=1),
    "Bulyan": lambda: Bulyan(fraction_evaluate=0.0, num_malicious_nodes=1),
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1, fraction_evaluate=0.0),
    "clipped": lambda: DifferentialPrivacyServerSideFixedClipping(
        FedAvg(fraction_evaluate=0.0), noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=CLIENTS
    ),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_listening_does_not_change_the_result(name: str) -> None:
    """The unmodified strategy with and without an eavesdropper in front of it: the same model."""
    alone = start(STRATEGIES[name]())
    seen: list[Observation] = []
    reports: list[RoundReport] = []
    wrapped = Eavesdropper(
        STRATEGIES[name](),
        SCENARIO,
        on_observation=seen.append,
        on_round=reports.append,
        client_of=lambda n: n,
    )
    together = start(wrapped)
    for key, tensor in alone.items():
        # Some leave float64 behind; the eavesdropper gives the model its own types back.
        assert together[key].dtype == torch.float32
        torch.testing.assert_close(together[key], tensor.float(), rtol=1e-5, atol=2e-6)
    assert len(seen) == 3 * CLIENTS
    assert all(report.aggregated and len(report.clients) == CLIENTS for report in reports)
    assert reports[0].train_loss == pytest.approx(
        sum((1.0 + c) * (c + 1) for c in range(CLIENTS)) / sum(c + 1 for c in range(CLIENTS))
    )


def test_observations_hold_the_weights_sent_and_the_step_taken() -> None:
    seen: list[Observation] = []
    start(Eavesdropper(FedAvg(fraction_evaluate=0.0), SCENARIO, on_observation=seen.append), rounds=2)
    first = [o for o in seen if o.round == 1]
    initial = initial_weights(MODEL, 0)
    for number, observation in enumerate(first):
        assert observation.num_examples == 10 * (number + 1)
        assert observation.update.kind == "delta"
        assert observation.update.indices is None
        for name, tensor in observation.update.dense().items():
            assert torch.equal(observation.weights[name], initial[name])
            expected = torch.from_numpy(ordinary(number, 1, name, tuple(tensor.shape)))
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    later = [o for o in seen if o.round == 2]
    assert not torch.equal(later[0].weights["1.weight"], initial["1.weight"])
    # Weights that were handed out stay as they were, whatever the server does next.
    assert torch.equal(first[0].weights["1.weight"], initial["1.weight"])


class Tailor(Eavesdropper):
    """Sends every other client a first bias of its own."""

    def outgoing(self, round: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights

    def tailored(self, weights: dict[str, Tensor], place: int, node: int) -> dict[str, Tensor]:
        return {"1.bias": weights["1.bias"] + place} if place % 2 else {}


def test_steps_are_measured_from_what_each_client_was_sent() -> None:
    seen: list[Observation] = []
    start(Tailor(FedAvg(fraction_evaluate=0.0), SCENARIO, on_observation=seen.append), rounds=1)
    initial = initial_weights(MODEL, 0)
    assert len(seen) == CLIENTS
    for number, observation in enumerate(seen):
        assert torch.equal(observation.weights["1.bias"], initial["1.bias"] + number % 2 * number)
        assert torch.equal(observation.weights["1.weight"], initial["1.weight"])
        for name, tensor in observation.update.dense().items():
            expected = torch.from_numpy(ordinary(number, 1, name, tuple(tensor.shape)))
            torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-6)


def test_only_what_is_selected_is_handed_out() -> None:
    seen: list[Observation] = []
    chosen = Eavesdropper(
        FedAvg(fraction_evaluate=0.0),
        SCENARIO,
        on_observation=seen.append,
        observe=lambda round, client: round == 3 and client % 2 == 0,
        client_of=lambda node: node - 1_000_000,
        first_round=2,
    )
    start(chosen)
    assert [(o.round, o.client) for o in seen] == [(3, 0), (3, 2), (3, 4), (3, 6)]


def test_sampling_is_seeded_and_leaves_the_global_generator_alone() -> None:
    def clients_of(seed: int) -> list[tuple[int, ...]]:
        reports: list[RoundReport] = []
        strategy = FedAvg(fraction_train=0.5, fraction_evaluate=0.0)
        start(Eavesdropper(strategy, SCENARIO, seed=seed, on_round=reports.append))
        return [report.clients for report in reports]

    random.seed(1)
    before = random.getstate()
    first = clients_of(0)
    assert random.getstate() == before
    random.seed(2)
    assert clients_of(0) == first
    assert clients_of(1) != first
    assert len(set(first)) > 1, "another draw each round"
    with pytest.raises(KeyError), seeded_sampling(0, 1):
        raise KeyError
    random.seed(2)
    assert random.getstate() != before


def test_the_wrong_model_is_refused_before_anything_is_sent() -> None:
    other = Scenario(MODEL.model_copy(update={"name": "tiny-cnn"}), SCENARIO.training, SCENARIO.compression)
    with pytest.raises(ConfigError, match=r"lack 'body.0.weight', a parameter of model 'tiny-cnn'"):
        start(Eavesdropper(FedAvg(fraction_evaluate=0.0), other))


def replies(*numbers: tuple[int, int]) -> list[Message]:
    """Replies of (node, the client it claims to be) with a plain step each."""
    from simulations.engine.flower_internals import received

    messages = []
    for node, claim in numbers:
        content = RecordDict(
            {
                "arrays": ArrayRecord(initial_weights(MODEL, 0)),
                "metrics": MetricRecord({"num-examples": 1, "train_loss": 0.0, "partition-id": claim}),
            }
        )
        messages.append(Message(content, reply_to=received(RecordDict(), 1, node, "train", "1")))
    return messages


def test_claims_to_be_somebody_else_are_rejected() -> None:
    """Without a grid that knows better, a node keeps the number that it first went by, and no two share one."""
    reports: list[RoundReport] = []
    server = Eavesdropper(FedAvg(), SCENARIO, on_round=reports.append)
    server._keep(ArrayRecord(initial_weights(MODEL, 0)))
    server.aggregate_train(1, replies((11, 0), (12, 1), (13, 1)))
    assert reports[-1].clients == (0, 1)
    assert reports[-1].rejected == ((13, "claims to be client 1, which another node is"),)
    server.aggregate_train(2, replies((13, 0), (11, 0), (12, -1), (14, 2**40)))
    assert reports[-1].clients == (0,)
    assert [client for client, _ in reports[-1].rejected] == [12, 13, 14]


def test_two_replies_of_one_node_count_once() -> None:
    reports: list[RoundReport] = []
    server = Eavesdropper(FedAvg(), SCENARIO, on_round=reports.append)
    server._keep(ArrayRecord(initial_weights(MODEL, 0)))
    server.aggregate_train(1, replies((11, 0), (11, 0)))
    assert reports[-1].clients == (0,)
    assert reports[-1].rejected == ((11, "client 0 has answered already"),)


class Broken(FedAvg):
    """Aggregates into something it should not."""

    def __init__(self, value: float) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.value = value

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):  # type: ignore[no-untyped-def]
        """All entries one value."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({k: Array(np.full(a.shape, self.value)) for k, a in arrays.items()}), metrics


def test_a_model_that_diverged_ends_the_run_and_types_are_kept() -> None:
    with pytest.raises(RunFailed, match=r"NaN or infinite values in '1.weight' after round 1"):
        start(Eavesdropper(Broken(math.nan), SCENARIO))
    assert start(Eavesdropper(Broken(0.5), SCENARIO))["1.weight"].dtype == torch.float32


def test_a_strategy_that_cannot_aggregate_says_why() -> None:
    strategy = QFedAvg(client_learning_rate=0.1, train_loss_key="absent", fraction_evaluate=0.0)
    with pytest.raises(RunFailed, match="strategy QFedAvg could not aggregate round 1: Missing or invalid"):
        start(Eavesdropper(strategy, SCENARIO))


# ---------------------------------------------------------------------- the arrays and records underneath


def test_held_arrays_are_flower_arrays() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    held, plain = HeldArray(value), Array(value)
    assert (held.dtype, held.shape, held.stype, held.data) == (
        plain.dtype,
        plain.shape,
        plain.stype,
        plain.data,
    )
    taken = held.numpy()
    taken += 1
    assert value[0, 0] == 0, "numpy() gives a copy"
    assert type(pickle.loads(pickle.dumps(held))) is Array
    assert pickle.loads(pickle.dumps(held)) == plain
    assert ArrayRecord({"x": held}) == ArrayRecord({"x": plain})


@pytest.mark.parametrize("sparse", [False, True])
def test_stepped_arrays_compute_base_plus_scaled_step(sparse: bool) -> None:
    base = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    positions = np.array([0, 5, 11]) if sparse else None
    values = np.array([1.0, -2.0, 3.0], np.float32) if sparse else np.arange(12, dtype=np.float32)
    stepped = SteppedArray(base, values, positions, -0.5)
    expected = base.copy().reshape(-1)
    expected[positions if sparse else slice(None)] -= 0.5 * values
    assert np.array_equal(stepped.numpy(), expected.reshape(3, 4))
    assert (stepped.dtype, stepped.shape) == ("float32", (3, 4))
    assert np.array_equal(
        Array(stepped.dtype, stepped.shape, stepped.stype, stepped.data).numpy(), stepped.numpy()
    )
    assert base[0, 0] == 0.0


def test_light_records_behave_as_flowers_do() -> None:
    arrays = {"a": Array(np.zeros(2)), "b": Array(np.ones(3))}
    light, heavy = LightArrays(dict(arrays)), ArrayRecord(dict(arrays))
    assert isinstance(light, ArrayRecord)
    assert light == heavy
    assert list(light) == list(heavy) == ["a", "b"]
    assert len(light) == 2
    assert "a" in light
    assert [a.shape for a in light.to_numpy_ndarrays()] == [(2,), (3,)]
    assert light.count_bytes() == heavy.count_bytes()
    assert light.object_id == heavy.object_id
    copied = light.copy()
    assert light.pop("a").shape == (2,)
    assert "a" not in light
    assert "a" in copied
    records = LightRecords({"arrays": copied, "metrics": LightMetrics({"n": 1})})
    assert list(records.array_records) == ["arrays"]
    assert list(records.metric_records) == ["metrics"]
    assert list(records.config_records) == []
    records.array_records["arrays"] = heavy
    assert records["arrays"] is heavy
    del records.metric_records["metrics"]
    assert "metrics" not in records
    again = pickle.loads(pickle.dumps(LightRecords({"arrays": copied, "metrics": LightMetrics({"n": 1})})))
    assert type(again) is RecordDict
    assert type(again["arrays"]) is ArrayRecord
    assert again["metrics"] == MetricRecord({"n": 1})
    assert copy.copy(records) == records


def test_dense_arrays_are_read_by_their_bytes() -> None:
    for value in (
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.float32(3).reshape(()),
        np.zeros((0, 2), "f4"),
    ):
        value = np.asarray(value)
        assert np.array_equal(read_dense(Array(value), value.shape, "float32"), value)
        assert np.array_equal(read_dense(HeldArray(value), value.shape, "float32"), value)
    fortran = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert np.array_equal(read_dense(Array(fortran), (2, 3), "float32"), fortran)
    with pytest.raises(PayloadError, match="type >f4"):
        read_dense(Array(np.zeros(3, ">f4")), (3,), "float32")


def test_records_of_tensors_share_their_memory_and_give_copies() -> None:
    tensor = torch.zeros(3)
    record = to_record({"x": tensor})
    taken = to_tensors(record)["x"]
    taken += 1
    assert torch.equal(tensor, torch.zeros(3))
    tensor += 2
    assert record["x"].numpy().tolist() == [2, 2, 2]


def test_configs_are_given_the_round() -> None:
    server = Eavesdropper(FedAvg(), SCENARIO, first_round=4)
    grid = InlineGrid(Place(), flower_app())  # type: ignore[arg-type]
    with server_identity(grid.run_id):
        messages = server.configure_train(1, ArrayRecord(initial_weights(MODEL, 0)), ConfigRecord(), grid)
        assert {message.content["config"]["server-round"] for message in messages} == {4}
    grid.close()
