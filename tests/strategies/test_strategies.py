"""Flower's strategies by name, and their options."""

from __future__ import annotations

import pytest
from flwr.serverapp import strategy as flower

from fedattack.config import FederationConfig
from fedattack.errors import ConfigError
from strategies import STRATEGIES, averages_buffers, build_strategy, drawn


def federation(name: str, **options: object) -> FederationConfig:
    return FederationConfig(strategy=name, clients=10, participation=0.35, strategy_options=options)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("fedavg", flower.FedAvg),
        ("fedavgm", flower.FedAvgM),
        ("fedadam", flower.FedAdam),
        ("fedadagrad", flower.FedAdagrad),
        ("fedyogi", flower.FedYogi),
        ("fedmedian", flower.FedMedian),
        ("fedtrimmedavg", flower.FedTrimmedAvg),
        ("krum", flower.Krum),
        ("multikrum", flower.MultiKrum),
        ("bulyan", flower.Bulyan),
        ("qfedavg", flower.QFedAvg),
        ("flwr.serverapp.strategy:FedMedian", flower.FedMedian),
    ],
)
def test_strategies_by_name(name: str, cls: type) -> None:
    built = build_strategy(federation(name), 0.1)
    assert type(built) is cls
    assert built.fraction_train == 0.35
    assert built.min_available_nodes == 10
    assert built.fraction_evaluate == 0.0


def test_all_names_are_there() -> None:
    assert {"fedprox", "fedavg", "krum"} <= set(STRATEGIES.names())


@pytest.mark.parametrize(
    ("participation", "clients", "expected"), [(0.29, 100, 29), (0.35, 10, 4), (0.01, 10, 1), (1.0, 7, 7)]
)
def test_the_share_is_rounded_and_never_nobody(participation: float, clients: int, expected: int) -> None:
    config = FederationConfig(clients=clients, participation=participation)
    assert drawn(config) == expected
    built = build_strategy(config, 0.1)
    assert max(int(clients * built.fraction_train), built.min_train_nodes) == expected


def test_options_reach_the_strategy_in_either_case_and_from_a_shell() -> None:
    built = build_strategy(federation("fedadam", **{"beta-1": "0.5", "tau": 0.01}), 0.1)
    assert (built.beta_1, built.tau) == (0.5, 0.01)
    assert build_strategy(federation("krum", num_malicious_nodes="1"), 0.1).num_malicious_nodes == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (federation("fedavgg"), "unknown strategy 'fedavgg'; did you mean 'fedavg'"),
        (federation("json:JSONDecoder"), "'federation.strategy' = 'json:JSONDecoder': not a flwr"),
        (federation("nowhere.at.all:X"), "cannot load strategy 'nowhere.at.all:X'"),
        (
            federation("fedadam", beta_3=1),
            "unknown setting 'federation.strategy_options.beta_3'; did you mean",
        ),
        (federation("fedadam", tau="small"), "'federation.strategy_options.tau' = 'small': Input should be"),
        (
            federation("flwr.serverapp.strategy:DifferentialPrivacyServerSideFixedClipping"),
            "needs 'federation.strategy_options.strategy'",
        ),
        (federation("fedavg", fraction_train=0.5), "decided by setting 'federation.participation'"),
        (federation("fedavg", **{"weighted-by-key": "x"}), "decided by fedattack and cannot be changed"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(config: FederationConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_strategy(config, 0.1)
    assert message in str(caught.value)


def test_server_optimisers_do_not_step_on_buffers() -> None:
    assert averages_buffers(federation("fedadam"))
    assert averages_buffers(federation("flwr.serverapp.strategy:FedYogi"))
    assert not averages_buffers(federation("krum"))
    assert not averages_buffers(federation("fedprox"))
