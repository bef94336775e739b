"""The settings: three spellings, one model, errors that help."""

from __future__ import annotations

import tomllib

import pytest

from fedattack.config import SHORT_NAMES, Config, field_type
from fedattack.errors import ConfigError


def test_spellings_reach_the_same_setting() -> None:
    short = Config.from_mapping({"compression": "0.01", "attack": "hcgla,fedmia", "attack-rounds": 1})
    dotted = Config.from_mapping(
        {"compression.rate": 0.01, "attack.names": ["hcgla", "fedmia"], "attack.rounds": (1,)}
    )
    nested = Config.from_mapping(
        {}, {"compression": {"rate": 0.01}, "attack": {"names": ["hcgla", "fedmia"]}}
    )
    assert short == dotted == nested
    assert short.compression.rate == 0.01


def test_attack_parameters() -> None:
    config = Config.from_mapping(
        {"hcgla.iterations": "300", "attack.tv": "0.2", "unlearn-max-loss.order": "loss"}
    )
    assert config.attack.options["hcgla"] == {"iterations": "300"}
    assert config.attack.options["unlearn-max-loss"] == {"order": "loss"}
    assert config.attack.shared_options == {"tv": "0.2"}


def test_toml_round_trip(tmp_path) -> None:
    config = Config.from_mapping(
        {"seed": 3, "run-dir": "x", "auxiliary-size": 5, "hcgla.tv": 0.5, "attack": "hcgla"}
    )
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert Config.from_toml(path) == config
    assert Config.from_toml(path, {"seed": 4}).seed == 4
    assert tomllib.loads(config.to_toml())["seed"] == 3


def test_empty_string_is_not_set() -> None:
    assert Config.from_mapping({"data-dir": "", "attack": "", "victims": ""}) == Config()


def test_every_short_name_names_a_setting() -> None:
    for dotted in SHORT_NAMES.values():
        assert field_type(dotted)[0] is not None


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"compresion": 0.1}, "did you mean 'compression'"),
        ({"data.nam": "x"}, "did you mean 'data.name'"),
        ({"compression": 0}, "'compression.rate' = 0: Input should be greater than 0"),
        ({"compression": 1.5}, "less than or equal to 1"),
        ({"compression": "much"}, "valid number"),
        ({"compression": "nan"}, "compression.rate"),
        ({"clients": 0}, "greater than or equal to 1"),
        ({"engine": "spark"}, "'ray' or 'inline'"),
        ({"local-steps": 3}, "use protocol 'fedavg'"),
        ({"clients": 2, "victims": 3}, "the federation has 2 clients"),
        ({"attack-rounds": "1,4", "rounds": 2}, "attack.rounds"),
        ({"a.b.c": 1}, "unknown setting"),
    ],
)
def test_errors_name_setting_value_and_what_is_accepted(settings, part) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping(settings)
    assert part in str(caught.value)
    assert caught.value.exit_code == 2


def test_toml_errors(tmp_path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Config.from_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[data\n")
    with pytest.raises(ConfigError, match="not readable TOML"):
        Config.from_toml(tmp_path / "bad.toml")
    (tmp_path / "unknown.toml").write_text("[data]\nnmae = 'faces'\n")
    with pytest.raises(ConfigError, match=r"did you mean 'data\.name'"):
        Config.from_toml(tmp_path / "unknown.toml")


def test_engine_and_output_do_not_change_a_result() -> None:
    one = Config.from_mapping({"engine": "ray", "run-dir": "a"})
    two = Config.from_mapping({"engine": "inline", "run-dir": "b"})
    assert one.result_settings() == two.result_settings()
    assert one.result_settings() != Config.from_mapping({"seed": 1}).result_settings()
