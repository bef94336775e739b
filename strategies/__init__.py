"""Server strategies: any of Flower's by name, and the wrapper that makes any of them curious."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from fedattack.config import FederationConfig
from fedattack.errors import ConfigError, unknown_name
from fedattack.registry import Registry
from strategies.eavesdropper import Eavesdropper, RoundReport
from strategies.malicious import MaliciousServer

_FLOWER = "flwr.serverapp.strategy"

STRATEGIES: Registry[type[Any]] = Registry(
    "strategy",
    {
        "fedavg": f"{_FLOWER}:FedAvg",
        "fedavgm": f"{_FLOWER}:FedAvgM",
        "fedadam": f"{_FLOWER}:FedAdam",
        "fedadagrad": f"{_FLOWER}:FedAdagrad",
        "fedyogi": f"{_FLOWER}:FedYogi",
        "fedprox": f"{_FLOWER}:FedProx",
        "fedmedian": f"{_FLOWER}:FedMedian",
        "fedtrimmedavg": f"{_FLOWER}:FedTrimmedAvg",
        "krum": f"{_FLOWER}:Krum",
        "multikrum": f"{_FLOWER}:MultiKrum",
        "bulyan": f"{_FLOWER}:Bulyan",
        "qfedavg": f"{_FLOWER}:QFedAvg",
    },
    group="fedattack.strategies",
)

_SERVER_OPTIMISERS = {"fedavgm", "fedadam", "fedadagrad", "fedyogi", "qfedavg"}

NEED_SINGLE_UPDATES = {"fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "qfedavg"}
"""Strategies that the sum of a round's updates is not enough for."""

_OURS = {
    "fraction_train": "federation.participation",
    "fraction_evaluate": "federation.evaluate",
    "min_train_nodes": "federation.participation",
    "min_evaluate_nodes": "federation.evaluate",
    "min_available_nodes": "federation.clients",
    "client_learning_rate": "training.learning_rate",
    "arrayrecord_key": None,
    "configrecord_key": None,
    "weighted_by_key": None,
    "train_loss_key": None,
    "train_metrics_aggr_fn": None,
    "evaluate_metrics_aggr_fn": None,
    "selection_rule": None,
}
"""Parameters of Flower's strategies that are set here, and the setting that decides each."""


def drawn(federation: FederationConfig) -> int:
    """How many clients are drawn each round."""
    return max(1, round(federation.participation * federation.clients))


def build_strategy(federation: FederationConfig, learning_rate: float) -> Any:
    """The Flower strategy of a configuration, ready to be wrapped by an :class:`~strategies.Eavesdropper`.

    Options come in kebab or snake case; q-FedAvg estimates a Lipschitz constant from the clients' `learning_rate`.
    Raises ConfigError where the strategy is unknown or is not one, or an option is unknown, reserved or of the
    wrong type.
    """
    from flwr.serverapp.strategy import Strategy

    name = federation.strategy
    cls = STRATEGIES.get(name)
    if not (inspect.isclass(cls) and issubclass(cls, Strategy)):
        raise ConfigError(f"setting 'federation.strategy' = {name!r}: not a flwr.serverapp.strategy.Strategy")
    accepted = {
        key: parameter
        for key, parameter in inspect.signature(cls.__init__).parameters.items()
        if key != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    ours = {
        "fraction_train": federation.participation,
        "min_train_nodes": drawn(federation),
        "min_available_nodes": federation.clients,
        "fraction_evaluate": 0.0,
        "min_evaluate_nodes": 0,
        "client_learning_rate": learning_rate,
    }
    arguments: dict[str, Any] = {key: value for key, value in ours.items() if key in accepted}
    free = [key for key in accepted if key not in _OURS]
    for option, value in federation.strategy_options.items():
        key = option.replace("-", "_")
        setting = f"federation.strategy_options.{option}"
        if key in _OURS:
            decided = f"by setting {_OURS[key]!r}" if _OURS[key] else "by fedattack and cannot be changed"
            raise ConfigError(f"setting {setting!r}: decided {decided}")
        if key not in free:
            raise unknown_name("setting", setting, [f"federation.strategy_options.{k}" for k in free])
        arguments[key] = _checked(setting, value, accepted[key].annotation)
    lacking = [k for k in free if accepted[k].default is inspect.Parameter.empty and k not in arguments]
    if lacking:
        needed = f"federation.strategy_options.{lacking[0]}"
        raise ConfigError(f"setting 'federation.strategy' = {name!r} needs {needed!r}")
    _check_robust(name, arguments, drawn(federation))
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        given = "".join(f", {key} = {value!r}" for key, value in federation.strategy_options.items())
        raise ConfigError(f"setting 'federation.strategy' = {name!r}{given}: {error}") from None


_ROBUST = ("krum", "multikrum", "bulyan")
"""Strategies that are told how many clients are malicious."""


def _check_robust(name: str, arguments: Mapping[str, Any], clients: int) -> None:
    """Refuse more malicious clients than a strategy stands, or more to select than there are."""
    malicious, chosen = arguments.get("num_malicious_nodes"), arguments.get("num_nodes_to_select")
    place = "setting 'federation.strategy_options."
    if name in _ROBUST and malicious:
        most = (clients - 3) // 4 if name == "bulyan" else min((clients - 1) // 2, clients - 3)
        if not 0 <= malicious <= most:
            raise ConfigError(
                f"{place}num_malicious_nodes' = {malicious}: of {clients} clients a round {name!r} stands "
                f"{max(0, most)}; accepted: 0 to {max(0, most)}, or more clients"
            )
    if name in _ROBUST and chosen is not None and not 1 <= chosen <= clients:
        raise ConfigError(
            f"{place}num_nodes_to_select' = {chosen}: accepted: 1 to {clients}, the clients a round"
        )


def averages_buffers(federation: FederationConfig) -> bool:
    """Whether BatchNorm buffers must be kept from this strategy: a server optimiser would step on them."""
    if federation.strategy in _SERVER_OPTIMISERS:
        return True
    cls = STRATEGIES.get(federation.strategy)
    return any(issubclass(cls, STRATEGIES.get(name)) for name in sorted(_SERVER_OPTIMISERS))


def _checked(setting: str, value: Any, annotation: Any) -> Any:
    """`value` as the strategy's annotation wants it; values typed in a shell are strings."""
    from pydantic import TypeAdapter, ValidationError

    kinds = {"float": float, "int": int, "bool": bool, "str": str}
    kind: Any = kinds.get(annotation, annotation) if isinstance(annotation, str) else annotation
    if kind not in kinds.values():
        return value
    try:
        found = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"setting {setting!r} = {value!r}: {error.errors()[0]['msg']}") from None
    if isinstance(found, float) and not math.isfinite(found):
        raise ConfigError(f"setting {setting!r} = {value}: a finite number is accepted")
    return found


__all__ = [
    "NEED_SINGLE_UPDATES",
    "STRATEGIES",
    "Eavesdropper",
    "MaliciousServer",
    "RoundReport",
    "averages_buffers",
    "build_strategy",
    "drawn",
]
