"""The server's passive statistics: against recorded figures, and against computations sample by sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from adversaries import ATTACKS
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.view import RoundView
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.observation import Auxiliary, Candidates, Observation, Scenario, Update

CPU = torch.device("cpu")
SPEC = {"dense": None, "top 10 %": 0.1, "top 1 %": 0.01}
NAMES = ("1.weight", "1.bias", "3.weight", "3.bias")
SHAPES = ((48, 64), (48,), (10, 48), (10,))


def recorded(file: Path, share: float | None, public: np.ndarray) -> list[Observation]:
    """The recorded run as the server saw it, each update cut to its largest entries."""
    stored = np.load(file, allow_pickle=False)
    scenario = Scenario(
        ModelConfig(name="mlp", classes=10, channels=1, image_size=8, activation="relu", width=48),
        TrainingConfig(protocol="fedavg"),
        CompressionConfig(name="none"),
    )
    auxiliary = Auxiliary(images(stored["x"][public]), torch.tensor(stored["y"][public]))
    seen = []
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    for number, (weights, deltas) in enumerate(
        zip(stored["global_weights"], stored["client_deltas"], strict=True), 1
    ):
        parts = torch.tensor(weights).split(sizes)
        state = {n: p.reshape(s) for n, s, p in zip(NAMES, SHAPES, parts, strict=True)}
        for client, delta in enumerate(deltas):
            indices, values = None, torch.tensor(delta)
            if share is not None:
                kept = np.sort(np.argsort(-np.abs(delta), kind="stable")[: int(share * len(delta))])
                indices, values = torch.tensor(kept), values[kept]
            update = Update(NAMES, SHAPES, indices, values, "delta")
            seen.append(Observation(number, client, scenario, state, update, 1, auxiliary=auxiliary))
    return seen


def images(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)


@pytest.mark.parametrize("sent", SPEC)
def test_the_recorded_run(shared_dir: Path, sent: str) -> None:
    folder = shared_dir / "checks" / "membership"
    stored = np.load(folder / "fl_unmix.npz", allow_pickle=False)
    wanted = np.load(folder / "fl_unmix_scores.npz", allow_pickle=False)
    expected = json.loads((folder / "fl_unmix_expected.json").read_text())[sent]
    owner = stored["owner"]
    public = np.flatnonzero(owner == -2)
    own = np.flatnonzero(owner != -2)
    asked = Candidates(images(stored["x"][own]), torch.tensor(stored["y"][own]))
    seen = recorded(folder / "fl_unmix.npz", SPEC[sent], public)
    assert SPEC[sent] is None or seen[0].update.kept == expected["kept"]
    knowledge = Knowledge.of(asked, seen[0].auxiliary)
    views = [RoundView([o for o in seen if o.round == r], knowledge, CPU) for r in range(1, 6)]
    prefix = {"dense": "dense", "top 10 %": "top10pc", "top 1 %": "top1pc"}[sent]
    for name, attack in {"unmix": "unmix", "whitened": "whitened", "cosine": "avg-cosine"}.items():
        one, figures, truths = ATTACKS.get(attack)(), [], []
        rounds = {view.round: one.watch(view, 0) for view in views}
        for client in range(6):
            scores = one.scores(rounds, client, knowledge).scores.numpy()
            np.testing.assert_allclose(scores, wanted[f"{prefix}_{name}"][client, own], atol=1e-6, rtol=0)
            counted = np.isin(owner[own], (client, -1))
            figures.append(scores[counted])
            truths.append(owner[own][counted] == client)
        values, truth = np.concatenate(figures), np.concatenate(truths)
        assert roc_auc_score(truth, values) == pytest.approx(expected[name]["auc"], abs=1e-6)
        false, true, _ = roc_curve(truth, values)
        assert true[false <= 0.01][-1] == pytest.approx(expected[name]["tpr_at_1_percent"], abs=1e-9)
