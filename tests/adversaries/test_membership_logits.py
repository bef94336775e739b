"""Black-box attacks: the published statistics on recorded models, against figures and against closed forms."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score
from torch import Tensor

from adversaries import ATTACKS
from adversaries.membership.base import Figures
from adversaries.membership.knowledge import Knowledge, References
from adversaries.membership.logits.base import BlackBox
from adversaries.membership.logits.bavaria import BaVarIA, predictive
from adversaries.membership.logits.entropy import Entropy
from adversaries.membership.logits.lira import LiRA
from adversaries.membership.logits.modified_entropy import ModifiedEntropy
from adversaries.membership.logits.rmia import RMIA
from adversaries.membership.view import RoundView
from adversaries.refusals import attack_refusals
from fedattack.config import CompressionConfig, DefenseConfig, ModelConfig, TrainingConfig
from fedattack.errors import DataError, FedattackError, NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import EVERYONE, Candidates, MembershipScores, Observation, Scenario, Update

NAMES = sorted(name for name in ATTACKS.names() if issubclass(ATTACKS.get(name), BlackBox))
REFERENCES = slice(2, 34)


@dataclass
class Recorded:
    """34 models of digits with 20 % wrong labels: model 0 is the target, models 2 to 33 are the references."""

    figures: dict[int, Figures]
    knowledge: Knowledge
    member: np.ndarray
    expected: dict[str, Any]
    scores: dict[str, np.ndarray]

    def ask(self, name: str, **settings: Any) -> MembershipScores:
        return ATTACKS.get(name)(**settings).scores(self.figures, EVERYONE, self.knowledge)

    def area(self, name: str, **settings: Any) -> float:
        return float(roc_auc_score(self.member, self.ask(name, **settings).scores.numpy()))


def samples(labels: np.ndarray) -> Candidates:
    """The recorded models' answers are all there is: of the images one number stands, which tells nothing."""
    return Candidates(torch.arange(len(labels)).reshape(-1, 1, 1, 1) / len(labels), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def recorded(shared_dir: Path) -> Recorded:
    folder = shared_dir / "checks" / "membership"
    with np.load(folder / "clf_noisy.npz", allow_pickle=False) as file:
        data = {key: file[key] for key in file.files}
    with np.load(folder / "clf_noisy_scores.npz", allow_pickle=False) as file:
        scores = {key: file[key] for key in file.files}
    audit, public = torch.from_numpy(data["logits_audit"]), torch.from_numpy(data["logits_population"])
    trained_on = torch.from_numpy(data["membership"][REFERENCES])
    never = torch.zeros(len(trained_on), public.shape[1], dtype=torch.bool)
    references = References(audit[REFERENCES], trained_on, public[REFERENCES], never)
    knowledge = Knowledge(samples(data["labels_audit"]), samples(data["labels_population"]), references)
    figures = {7: {"clients": torch.tensor([EVERYONE]), "logits": audit[:1], "public": public[:1]}}
    expected = json.loads((folder / "clf_noisy_expected.json").read_text())
    return Recorded(figures, knowledge, data["membership"][0], expected, scores)


@pytest.mark.parametrize(
    ("name", "settings", "figure", "scores"),
    [
        ("loss-threshold", {}, "loss_correct(-cross_entropy)", "minus_ce"),
        ("correctness", {}, "metric_gap_correctness", "metric_gap_correctness"),
        ("entropy", {}, "metric_entropy", "metric_entropy"),
        ("entropy", {"statistic": "max-confidence"}, "metric_max_confidence_mlleaks3", "metric_max_confidence_mlleaks3"),
        ("modified-entropy", {}, "metric_modified_entropy", "metric_modified_entropy"),
        ("attack-p", {}, "attack_P_empirical", "attack_P"),
        ("attack-r", {}, "attack_R_empirical", "attack_R"),
        ("rmia", {"gamma": 1.0}, "rmia_online_paper_gamma1", "rmia_on_g1"),
        ("rmia", {"gamma": 2.0}, "rmia_online_paper_gamma2", "rmia_on_g2"),
        ("rmia", {"mode": "offline", "gamma": 1.0}, "rmia_offline_paper_allrefs_a0.3_gamma1", "rmia_off_g1"),
        ("rmia", {"mode": "offline", "gamma": 2.0}, "rmia_offline_paper_allrefs_a0.3_gamma2", "rmia_off_g2"),
    ],
)  # fmt: skip
def test_scores_as_published(
    recorded: Recorded, name: str, settings: dict[str, Any], figure: str, scores: str
) -> None:
    if name == "rmia":
        settings = settings | {"break_ties": False, "a": 0.3}
    found = recorded.ask(name, **settings)
    assert found.scores.dtype == torch.float64
    assert np.abs(found.scores.numpy() - recorded.scores[scores]).max() < 1e-5
    assert roc_auc_score(recorded.member, found.scores.numpy()) == pytest.approx(
        recorded.expected[figure]["auc"], abs=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "figure"),
    [
        ({"variance": "own"}, "lira_online"),
        ({"variance": "pooled"}, "lira_online_fixed_variance"),
        ({"mode": "offline", "variance": "own"}, "lira_offline_one_sided_paper"),
        ({"mode": "offline", "variance": "pooled"}, "lira_offline_one_sided_paper_fixed_variance"),
    ],
)
def test_lira_as_published(recorded: Recorded, settings: dict[str, Any], figure: str) -> None:
    assert recorded.area("lira", **settings) == pytest.approx(recorded.expected[figure]["auc"], abs=1e-4)
    if settings == {"variance": "own"}:
        found = recorded.ask("lira", **settings).scores.numpy()
        sign = np.sign(np.corrcoef(found, recorded.scores["lira_online"])[0, 1])
        assert np.allclose(found, sign * recorded.scores["lira_online"], rtol=1e-4, atol=1e-4)
