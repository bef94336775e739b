"""What is known before training is refused before training, with exit code 2; plug-ins from outside take settings."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adversaries import ATTACKS
from fedattack.config import Config
from fedattack.errors import BadRequest, ConfigError
from simulations.experiments.choose import choose_attacks
from simulations.pipeline import simulate

BASE: dict[str, Any] = {"engine": "inline", "dataset": "digits", "clients": 3, "rounds": 3}

OUTSIDE = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from adversaries.inversion.evidence.evidence import Labels
from adversaries.inversion.matching.objectives import Objective, masked_l2
from adversaries.needs import Needs
from adversaries.reconstruction.matching.inverting_gradients import InvertingGradients
from fedattack.defenses import Defense

calls = []

def conv_head(config):
    return nn.Sequential(
        nn.Conv2d(config.channels, 8, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(8, config.classes, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )

def last_class(evidence):
    calls.append("labels")
    return Labels(torch.full((evidence.observation.num_examples,), 9), 0.5, "the last")

def distance(layout):
    calls.append("objective")
    return masked_l2(layout)

MINE = Objective(distance)

@dataclass
class Shifted(InvertingGradients):
    """One from outside."""

    by: float = 0.0

    def run(self, *arguments, **options):
        calls.append(self.by)
        return super().run(*arguments, **options)

@dataclass
class Quiet(Defense):
    """A defence from outside."""

    share: float = 0.5
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "outside_plugins.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("outside_plugins")
    sys.modules.pop("outside_plugins")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"attack": "tag", "tag.objective": "cosine"}, "objective 'cosine' is over all layers at once"),
        (
            {"attack": "ig", "attack-rounds": "3", "error-feedback": True, "compression": 0.1},
            "'attack.rounds' = 3 with error feedback",
        ),
        (
            {"attack": "hcgla", "protocol": "fedavg", "local-steps": 20, "compression": 0.1},
            "training.local_steps = 20",
        ),
        (
            {"attack": "ig", "model": "outside_plugins:conv_head", "compressor": "none"},
            "end in a linear layer",
        ),
        ({"attack": "fedmia", "participation": 0.4}, "3 clients must answer in one round"),
        ({"attack": "lti", "auxiliary-size": 5}, "5 auxiliary images"),
        ({"attack": "imprint,tensor"}, "each send weights of their own"),
        ({"attack": "idlg,gauss-newton", "batch-size": 2, "compressor": "sign"}, "attack 'gauss-newton': "),
    ],
)
@pytest.mark.usefixtures("outside")
def test_refused_before_the_federation_trains(settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    trained = []

    def federate(*arguments: Any, **options: Any) -> Any:
        trained.append(arguments)
        raise AssertionError("a federation was trained")

    with pytest.raises(BadRequest) as refusal:
        simulate(Config.from_mapping(BASE | settings | {"run-dir": str(tmp_path / "run")}), federate=federate)
    assert part in str(refusal.value)
    assert refusal.value.exit_code == 2
    assert trained == []
    assert not (tmp_path / "run").exists()


def test_an_attack_that_does_not_apply_is_left_out_of_the_run(tmp_path: Path) -> None:
    console = Console(record=True, width=400, file=io.StringIO())
    settings = {"attack": "ig,idlg", "batch-size": 2, "compressor": "none", "model": "tiny-cnn", "victims": 1}
    short = {"ig.iterations": 2, "rounds": 1, "run-dir": str(tmp_path / "run")}
    result = simulate(Config.from_mapping(BASE | settings | short), console=console)
    assert list(result.audits) == ["ig"]
    assert "idlg is left out: " in console.export_text()


@pytest.mark.parametrize("prefix", ["outside_plugins:Shifted", "Shifted", "attack"])
def test_an_attack_from_outside_takes_its_own_settings(outside: Any, prefix: str, tmp_path: Path) -> None:
    settings = {
        "attack": "outside_plugins:Shifted",
        f"{prefix}.by": "0.25",
        f"{prefix}.iterations": "2",
        f"{prefix}.objective": "outside_plugins:MINE",
        f"{prefix}.labels": "outside_plugins:last_class",
        "rounds": 1, "victims": 1, "compressor": "none", "model": "tiny-cnn", "run-dir": str(tmp_path / "run"),
    }  # fmt: skip
    result = simulate(Config.from_mapping(BASE | settings))
    assert {0.25, "labels", "objective"} <= set(outside.calls)
    (answer,) = result.reconstructions["outside_plugins:Shifted"].values()
    assert answer.labels.tolist() == [9]
    again = Config.from_toml(tmp_path / "run" / "config.toml")
    assert choose_attacks(again)["outside_plugins:Shifted"].by == 0.25  # type: ignore[attr-defined]


def test_a_defence_from_outside_takes_its_own_settings(outside: Any) -> None:
    from fedattack.defenses import build_defenses

    for name in ("outside_plugins:Quiet", "Quiet"):
        config = Config.from_mapping({"defense": "outside_plugins:Quiet", f"defense.{name}.share": "0.125"})
        assert build_defenses(config.defense)["outside_plugins:Quiet"].share == 0.125  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"defence 'outside_plugins:Shifted' is a class 'Shifted'"):
        build_defenses(Config.from_mapping({"defense": "outside_plugins:Shifted"}).defense)


def test_settings_of_plugins_are_told_apart() -> None:
    both = {"attack": "a.b:Same,c.d:Same", "Same.by": "1"}
    with pytest.raises(ConfigError, match=r"a\.b:Same or c\.d:Same; name one in full"):
        Config.from_mapping(both)
    with pytest.raises(ConfigError, match=r"outside\.plugin:Class\.itrations|unknown setting"):
        choose_attacks(Config.from_mapping({"attack": "ig", "ig.itrations": "1"}))
    assert "ig" in ATTACKS
