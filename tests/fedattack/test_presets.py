"""Presets and scenarios fill what is left open, are written down as they were resolved, and repeat the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import ConfigError, NotApplicable
from fedattack.presets import PRESETS
from fedattack.unlearning.retrain import Retrain
from simulations.cli.catalogue import catalogue, described, settings_tables
from simulations.pipeline import simulate
from simulations.server_app import main as serve_under_flower


def again(config: Config, path: Path, **overrides: object) -> Config:
    path.write_text(config.to_toml())
    return Config.from_toml(path, overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_is_listed_and_comes_back(name: str, tmp_path: Path) -> None:
    config = Config.from_mapping({"preset": name})
    assert (config.scenario, config.federation.clients, config.training.protocol) == ("central", 1, "fedavg")
    assert again(config, tmp_path / "config.toml") == config
    shown = {row[0]: row[2] for row in settings_tables(name)[f"Preset {name}"]}
    assert shown["training.learning_rate"] == str(config.training.learning_rate)
    assert shown["compression.name"] == config.compression.name == "none"
    assert dict(catalogue()["Presets"])[name] == described(name)[0][1]


def test_what_a_person_says_wins_even_that_nothing_is_set(tmp_path: Path) -> None:
    given = {"preset": "mnist-logistic-small", "limit": "", "learning-rate": 0.5, "compressor": "topk"}
    config = Config.from_mapping(given)
    assert (config.data.limit, config.training.learning_rate, config.compression.name) == (None, 0.5, "topk")
    assert (config.model.name, config.data.nonmembers) == ("logistic", 1000)
    assert again(config, tmp_path / "config.toml") == config
    assert again(config, tmp_path / "config.toml", rounds=3).federation.rounds == 3
    by_hand = {"scenario": "central", "dataset": "mnist", "model": "logistic", "rounds": 10, "batch-size": 64}
    by_hand |= {"local-steps": 63, "training.weight_decay": 0.001, "limit": 5500, "data.nonmembers": 1000}
    same = (
        Config.from_mapping(by_hand | {"auxiliary-size": 500}),
        Config.from_mapping({"preset": given["preset"]}),
    )
    assert same[0].result_settings() == same[1].result_settings()
    spread = Config.from_mapping({"preset": "mnist-logistic-small", "scenario": "federated", "clients": 4})
    assert (spread.federation.clients, spread.training.local_steps) == (4, 63)
    in_a_file = Config.from_mapping({}, {"preset": "mnist-cnn-small", "model": {"activation": "tanh"}})
    assert (in_a_file.model.name, in_a_file.model.activation) == ("lcodec-cnn", "tanh")


def test_central_is_one_holder() -> None:
    config = Config.from_mapping({"scenario": "central", "local-steps": 3})
    assert (config.federation.clients, config.victims, config.engine.name) == (1, 1, "inline")
    for settings, text in [
        ({"scenario": "central", "clients": 3}, "'federation.clients' = 3: scenario 'central' is one holder"),
        ({"scenario": "centrall"}, "unknown scenario 'centrall'; did you mean 'central'"),
        ({"preset": "mnist-logistics"}, "unknown preset 'mnist-logistics'; did you mean 'mnist-logistic'"),
    ]:
        with pytest.raises(ConfigError, match=text):
            Config.from_mapping(settings)


def test_flower_leaves_nothing_open_for_a_preset() -> None:
    context: Any = SimpleNamespace(run_config={"preset": "mnist-cnn", "clients": 1})
    with pytest.raises(ConfigError, match=r"'preset' = 'mnist-cnn': .* Flower's run-config leaves none open"):
        serve_under_flower(None, context)  # type: ignore[arg-type]


@dataclass
class Centrally(Retrain):
    """Retraining that says it needs the data itself."""

    runs = "central"


def test_a_central_mechanism_is_refused_before_the_first_round_where_others_hold_or_something_is_sent() -> (
    None
):
    for given, text in [
        ({}, None),
        (
            {"compressor": "topk"},
            "'compression.name' = 'topk': mechanism 'x' works on its holder's own training",
        ),
        ({"scenario": "federated", "clients": 3, "protocol": "fedavg"}, "3 clients hold it; use one"),
    ]:
        config = Config.from_mapping({"scenario": "central", "dataset": "digits", "limit": 100} | given)
        world = build_world(config)
        if text is None:
            Centrally().check("x", world.scenario, len(world.partitions))
        else:
            with pytest.raises(NotApplicable, match=text):
                Centrally().check("x", world.scenario, len(world.partitions))


@pytest.mark.slow
def test_the_small_logistic_set_up_is_far_above_chance(tmp_path: Path, shared_dir: Path) -> None:
    given = {"preset": "mnist-logistic-small", "attack": "unlearn-max-loss", "run-dir": str(tmp_path / "run")}
    given |= {"data-dir": str(shared_dir / "data" / "MNIST"), "unlearning.seeds": 2}
    first = simulate(Config.from_mapping(given))
    stored = Config.from_toml(tmp_path / "run" / "config.toml", {"run-dir": str(tmp_path / "again")})
    assert (stored.preset, stored.federation.rounds) == ("mnist-logistic-small", 10)
    again = simulate(stored)
    ends = [one.federation.rounds[-1].accuracy for one in (first, again) if one.federation]
    assert ends[0] == ends[1]
    assert ends[0] is not None
    assert ends[0] > 0.85
    parts = [
        json.loads((one.folder / "parts" / "unlearn-max-loss.json").read_text()) for one in (first, again)
    ]
    assert parts[0]["accuracy"] == parts[1]["accuracy"]
    assert min(parts[0]["accuracy"]["after"]) > 0.85
