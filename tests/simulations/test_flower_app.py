"""A Flower app as it is, attacked: that of Flower's PyTorch tutorial, and what is refused."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from tutorial_figures import TUTORIAL, check_tutorial

import fedattack
from fedattack.errors import BadRequest, DataError
from fedattack.storage import load_observations
from simulations.flower_app import EavesdroppedApp


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(TUTORIAL))
    from pytorchexample import client_app, server_app

    yield server_app.app, client_app.app
    for name in [name for name in sys.modules if name.startswith("pytorchexample")]:
        del sys.modules[name]


def test_the_tutorials_app_is_attacked(app: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (160, 3, 4, 4), dtype=np.uint8)
    pictures, labels = coarse.repeat(8, 2).repeat(8, 3), rng.choice(10, 160, p=[0.55] + [0.05] * 9)
    np.savez(tmp_path / "images.npz", images=pictures, labels=labels)
    run_dir = tmp_path / "run"
    settings = {"num-server-rounds": 1, "fraction-evaluate": 0.5, "local-epochs": 1, "learning-rate": 0.1,
                "batch-size": 32, "images": str(tmp_path / "images.npz"), "run-dir": str(run_dir), "score": True,
                "iterations": 2, "victims": 1}  # fmt: skip
    fedattack.run_flower_app(*app, clients=4, run_config=settings)
    check_tutorial(
        json.loads((run_dir / "summary.json").read_text(encoding="utf-8")), victims=1, level="undecided"
    )
    assert (run_dir / "report.html").is_file()
    state = torch.load(run_dir / "final_model.pt", weights_only=True)
    assert sum(tensor.numel() for tensor in state.values()) == 62_006
    assert logging.getLogger("flwr").level < logging.WARNING, "an app's own lines are seen"


def test_three_lines_are_all() -> None:
    lines = [
        line for path in TUTORIAL.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(line.partition("# fedattack, ")[2][:6] for line in lines if "# fedattack, " in line) == [
        "1 of 3", "2 of 3", "3 of 3"
    ]  # fmt: skip


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


GIVEN: dict[str, Any] = {"model": Small, "image_shape": (1, 4, 4), "learning_rate": 0.5, "batch_size": 2}
TRUTH = torch.rand(4, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 1])


def small_client(counts: tuple[int, ...]) -> ClientApp:
    """Clients that take one pass over their first images, two at a time, in order, and weight by "samples"."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        model = Small()
        model.load_state_dict(message.content["weights"].to_torch_state_dict())
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        images, labels = TRUTH[0][number][: counts[number]], TRUTH[1][: counts[number]]
        for x, y in zip(images.split(2), labels.split(2), strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
        metrics = MetricRecord({"samples": counts[number], "partition-id": number, "mine": 2.5 * number})
        return Message(
            RecordDict({"weights": ArrayRecord(model.state_dict()), "m": metrics}), reply_to=message
        )

    return app


def small_server(result: dict[str, Any], **options: Any) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        plain = FedAvg(fraction_evaluate=0.0, arrayrecord_key="weights", weighted_by_key="samples")
        strategy = fedattack.eavesdrop(plain, **GIVEN, local_epochs=1, **options) if options else plain
        torch.manual_seed(3)
        found = strategy.start(grid, ArrayRecord(Small().state_dict()), 2)
        result["state"] = found.arrays.to_torch_state_dict()
        result["metrics"] = dict(found.train_metrics_clientapp[1])

    return app


def test_keys_and_metrics_of_an_app_are_its_own_and_steps_each_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        EavesdroppedApp, "report", lambda _: None
    )  # what is trained and seen is asked about here
    alone: dict[str, Any] = {}
    heard: dict[str, Any] = {}
    counts = (3, 2, 3, 2)
    fedattack.run_flower_app(small_server(alone), small_client(counts), clients=4)
    options: dict[str, Any] = {"attack": "ig", "settings": {"ig.iterations": 2}, "rounds": (1, "last")}
    options["run_dir"] = tmp_path / "run"
    options["truth"] = lambda _, client: (TRUTH[0][client][: counts[client]], TRUTH[1][: counts[client]])
    fedattack.run_flower_app(small_server(heard, **options), small_client(counts), clients=4)
    assert heard["metrics"] == alone["metrics"]
    assert heard["metrics"]["mine"] == pytest.approx(2.5 * (3 * 0 + 2 * 1 + 3 * 2 + 2 * 3) / 10)
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(heard["state"][name], tensor, rtol=0, atol=1e-7)
    seen = load_observations(tmp_path / "run" / "observations")
    assert [(o.round, o.client) for o in seen] == [(r, c) for r in (1, 2) for c in range(4)]
    assert [o.scenario.training.local_steps for o in seen] == [2, 1, 2, 1] * 2
    assert {o.scenario.training.local_epochs for o in seen} == {None}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"image_shape": (1, 4, 5)}, r"image_shape = \(1, 4, 5\): accepted: \(channels, side, side\)"),
        ({"image_shape": (3, 4, 4)}, "cannot be run on images of shape"),
        ({"attack": "cah"}, "'cah'"),
        ({"attack": "fedmia"}, "'fedmia'"),
        ({"attack": "igg"}, "did you mean 'ig'"),
        ({"attack": "label-inference-of-nothing"}, "unknown attack"),
        ({"model": 3}, "the model is a int"),
        ({"batch_size": -1}, "training.batch_size"),
        ({"local_epochs": 2, "local_steps": 3}, "say two things"),
        ({"attack": "gauss-newton", "batch_size": 1, "local_epochs": 1, "samples": 8}, "local_steps = 8"),
        ({"auxiliary": torch.full((2, 1, 4, 4), 2.0)}, r"auxiliary: pixels lie outside \[0, 1\]"),
        ({"rounds": "latest"}, "rounds = 'latest': accepted: numbers from 1, and 'last'"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    changed: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=text):
        fedattack.eavesdrop(FedAvg(), **{**GIVEN, "run_dir": tmp_path / "run", **changed})
    assert not (tmp_path / "run").exists()


def test_a_strategy_with_a_start_of_its_own_is_refused() -> None:
    class Mine(FedAvg):
        def start(self, *parts: Any, **named: Any) -> Any:
            return None

    with pytest.raises(BadRequest, match=r"strategy Mine replaces start\(\)"):
        fedattack.eavesdrop(Mine(), **GIVEN)
    with pytest.raises(BadRequest, match=r"a flwr\.serverapp\.strategy\.Strategy is needed"):
        fedattack.eavesdrop(object(), **GIVEN)  # type: ignore[arg-type]


def test_a_truth_that_cannot_be_ends_the_attack_with_a_sentence(tmp_path: Path) -> None:
    def wrong(_: int, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        return TRUTH[0][client], TRUTH[1]

    with pytest.raises(DataError, match=r"truth\(1, 1\): 3 images, and the client declares 2 examples"):
        fedattack.run_flower_app(
            small_server({}, truth=wrong, run_dir=tmp_path / "run"), small_client((3, 2, 3, 2)), clients=4
        )
