"""The server's passive statistics: against recorded figures, and against computations sample by sample."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from membership_scenes import build_as, gradients, top_k
from sklearn.metrics import roc_auc_score, roc_curve
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from adversaries import ATTACKS
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.view import RoundView
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import EVERYONE, Auxiliary, Candidates, Observation, Scenario, Update

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


@dataclass
class Recorded:
    """A short cut of the recorded run, and per-sample figures by autograd in double precision, (T, K, n)."""

    seen: list[Observation]
    asked: Candidates
    owner: np.ndarray
    gradients: list[np.ndarray]  # of each round, (n, size)
    losses: np.ndarray  # (T + 1, n): at the weights sent out, and (here) after the last round
    own: np.ndarray  # (T, K, n): under the clients' own models


@pytest.fixture(scope="module")
def short(shared_dir: Path) -> Recorded:
    file = shared_dir / "checks" / "membership" / "fl_unmix.npz"
    stored = np.load(file, allow_pickle=False)
    chosen = np.concatenate([np.flatnonzero(stored["owner"] == k)[:8] for k in (-1, 0, 1, 2)])
    public = np.flatnonzero(stored["owner"] == -2)[:20]
    seen = [o for o in recorded(file, None, public) if o.round < 4 and o.client < 3]
    asked = Candidates(images(stored["x"][chosen]), torch.tensor(stored["y"][chosen]))
    both = Candidates(
        torch.cat([asked.images, images(stored["x"][public])]),
        torch.cat([asked.labels, torch.tensor(stored["y"][public])]),
    )
    model = build_as(build_model(seen[0].scenario.model), torch.float64)

    def loss(state: dict[str, torch.Tensor]) -> np.ndarray:
        double = {name: tensor.double() for name, tensor in state.items()}
        logits = functional_call(model, double, (asked.images.double(),))
        return cross_entropy(logits, asked.labels, reduction="none").numpy()

    sent = [next(o.weights for o in seen if o.round == r) for r in (1, 2, 3)]
    with torch.no_grad():
        after = [{n: o.weights[n] + d for n, d in o.update.dense().items()} for o in seen]
        losses = np.stack([loss(state) for state in [*sent, after[-1]]])
        own = np.stack([loss(state) for state in after]).reshape(3, 3, -1)
    rows = [gradients(model, state, both).numpy() for state in sent]
    return Recorded(seen, asked, stored["owner"][chosen], rows, losses, own)


def plainly(name: str, short: Recorded, client: int, share: float | None) -> np.ndarray:
    """The statistic in NumPy, as its docstring has it."""
    n, rounds = len(short.owner), range(3)
    updates = np.stack([o.update.values.double().numpy() for o in short.seen]).reshape(3, 3, -1) * -1
    if share is not None:
        least = np.sort(np.abs(updates), axis=2)[:, :, -int(share * updates.shape[2])][:, :, None]
        updates = np.where(np.abs(updates) >= least, updates, 0)

    def cosines(t: int, k: int) -> np.ndarray:
        g, u = short.gradients[t], updates[t, k]
        return g @ u / np.linalg.norm(g, axis=1) / np.linalg.norm(u)

    def solved(t: int) -> np.ndarray:
        g, u = short.gradients[t], updates[t, client]
        g = g / np.linalg.norm(g, axis=1, keepdims=True) * (1 if share is None else u != 0)
        b, matrix = g @ u / np.linalg.norm(u), g @ g.T
        ridge = 0.01 if share is None else 0.03 * np.median(np.diag(matrix))
        if name == "unmix":
            return np.linalg.solve(matrix + ridge * np.eye(len(b)), b)[:n]
        inverse = np.linalg.inv(matrix[n:, n:] + ridge * np.eye(len(b) - n))
        q = matrix[:n, n:]
        return (b[:n] - q @ inverse @ b[n:]) / np.sqrt(np.diag(matrix)[:n] - ((q @ inverse) * q).sum(1))

    rest = [k for k in range(3) if k != client]
    per_round = {
        "avg-cosine": lambda t: cosines(t, client)[:n],
        "grad-cosine": lambda t: cosines(2, client)[:n],
        "grad-diff": lambda t: (
            (updates[t, client] ** 2).sum() - ((updates[t, client] - short.gradients[t][:n]) ** 2).sum(1)
        ),
        "grad-norm": lambda t: -np.linalg.norm(short.gradients[t][:n], axis=1),
        "loss-series": lambda t: -short.losses.sum(0),
        "loss-drop": lambda t: short.losses[t] - short.own[t, client],
        "source-inference": lambda t: short.own[t, rest].min(0) - short.own[t, client],
        "unmix": solved,
        "whitened": solved,
    }[name]
    return np.mean([per_round(t) for t in rounds], axis=0)


@pytest.mark.parametrize("share", [None, 0.1])
def test_statistics_equal_a_plain_computation(short: Recorded, share: float | None) -> None:
    seen = short.seen
    if share is not None:
        seen = [replace(o, update=top_k(o.update, share)) for o in seen]
    knowledge = Knowledge.of(short.asked, seen[0].auxiliary)
    after = {n: seen[-1].weights[n] + d for n, d in short.seen[-1].update.dense().items()}
    views = [RoundView([o for o in seen if o.round == r], knowledge, CPU, after) for r in (1, 2, 3)]
    losses = {"loss-series", "loss-drop", "source-inference"} if share is None else {"loss-series"}
    for name in ("avg-cosine", "grad-cosine", "grad-diff", "grad-norm", "unmix", "whitened", *sorted(losses)):
        one = ATTACKS.get(name)()
        rounds = {view.round: one.watch(view, 0) for view in views}
        about = one.needs.about == "client"
        for client in range(3) if about else [EVERYONE]:
            scores = one.scores(rounds, client, knowledge).scores.numpy()
            wanted = plainly(name, short, client, share)
            np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
            truth = short.owner == client if about else short.owner >= 0
            assert roc_auc_score(truth, scores) == pytest.approx(roc_auc_score(truth, wanted), abs=1e-6)


def test_a_sum_is_read_as_one_update_of_anybody(short: Recorded) -> None:
    """Three dense updates, and their sum: the equations are linear, so that the coefficients are as well."""
    views = [RoundView([o for o in short.seen if o.round == r], Knowledge(short.asked), CPU) for r in (1, 2)]
    sums = []
    for view in views:
        first = view.observations[0]
        total = torch.stack([o.update.values for o in view.observations]).sum(0)
        sums.append(replace(first, client=EVERYONE, update=replace(first.update, values=total)))
    for name in ("unmix", "avg-cosine", "grad-cosine", "grad-diff", "whitened"):
        assert ATTACKS.get(name).needs.sums == "any"
    found = ATTACKS.get("unmix")().run(sums, EVERYONE, short.asked, 0, CPU)
    assert found.details["rounds"] == [1, 2]
    one = ATTACKS.get("unmix")()
    knowledge = Knowledge.of(short.asked, sums[0].auxiliary)
    wanted = []
    for number, total in enumerate(sums, 1):
        view = RoundView([o for o in short.seen if o.round == number], knowledge, CPU)
        each = one.measure(view) * view.lengths[:, None] / total.update.values.double().norm()
        wanted.append(each.sum(0))
    torch.testing.assert_close(found.scores, torch.stack(wanted).mean(0), rtol=1e-5, atol=1e-7)


def test_nothing_sent_and_nothing_public(short: Recorded) -> None:
    """A silent client's coefficients are 0; without public samples one attack goes on, and one says what it lacks."""
    silent = [
        replace(o, update=replace(o.update, values=0 * o.update.values), auxiliary=None)
        for o in short.seen
        if o.round == 1
    ]
    assert not ATTACKS.get("unmix")().run(silent, 1, short.asked, 0, CPU).scores.any()
    empty = silent[0].update
    nothing = replace(empty, indices=torch.zeros(0, dtype=torch.int64), values=empty.values[:0])
    sent_nothing = [replace(silent[0], update=nothing)]
    assert not ATTACKS.get("unmix")().run(sent_nothing, 0, short.asked, 0, CPU).scores.any()
    with pytest.raises(NotApplicable, match="no labelled public samples are granted"):
        ATTACKS.get("whitened")().run(silent, 1, short.asked, 0, CPU)
