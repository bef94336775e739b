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
from sklearn.metrics import roc_auc_score
from torch import Tensor

from adversaries import ATTACKS
from adversaries.membership.base import Figures
from adversaries.membership.knowledge import Knowledge, References
from adversaries.membership.logits.base import BlackBox, centres, scaled_confidence
from adversaries.membership.logits.bavaria import predicted, predicted_pair
from adversaries.membership.logits.quantile import Quantile
from adversaries.membership.logits.rmia import fitted_a
from adversaries.membership.view import RoundView, client_model
from adversaries.needs import Facts
from adversaries.refusals import attack_refusals
from fedattack.config import CompressionConfig, Config, DefenseConfig, ModelConfig, TrainingConfig
from fedattack.data import build_world
from fedattack.errors import DataError, NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import EVERYONE, Candidates, MembershipScores, Observation, Scenario, Update
from simulations.engine.federation import run_federation
from simulations.pipeline import simulate

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
        ("entropy", {"statistic": "max-confidence"}, *2 * ["metric_max_confidence_mlleaks3"]),
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


def fewer(recorded: Recorded, count: int) -> Recorded:
    """With the first references alone."""
    r = recorded.knowledge.references
    assert r is not None
    kept = References(
        r.logits[:count], r.trained_on[:count], r.public_logits[:count], r.public_trained_on[:count]
    )
    return replace(recorded, knowledge=replace(recorded.knowledge, references=kept))


def of_references(recorded: Recorded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """phi of the target (N,), of the references (R, N), and who trained on what, in numpy."""
    r, labels = recorded.knowledge.references, recorded.knowledge.candidates.labels
    assert r is not None
    own = scaled_confidence(recorded.figures[7]["logits"][0], labels)
    return own.numpy(), scaled_confidence(r.logits, labels).numpy(), r.trained_on.numpy()


def test_scaled_confidence_as_published(recorded: Recorded) -> None:
    own, shadows, _ = of_references(recorded)
    assert np.abs(own - recorded.scores["lira_logit_scores"][0]).max() < 1e-4
    assert np.abs(shadows - recorded.scores["lira_logit_scores"][REFERENCES]).max() < 1e-4


def test_rungs_of_the_ladder(recorded: Recorded) -> None:
    own, shadows, inside = of_references(recorded)
    means = [np.array([c[k].mean() for c, k in zip(shadows.T, m.T, strict=True)]) for m in (inside, ~inside)]
    spreads = [np.array([c[k].std() for c, k in zip(shadows.T, m.T, strict=True)]) for m in (inside, ~inside)]
    ratio = stats.norm.logpdf(own, means[0], spreads[0]) - stats.norm.logpdf(own, means[1], spreads[1])
    assert np.allclose(recorded.ask("exponential-family", parameters=4).scores, ratio, atol=1e-9)
    shared = np.sqrt((spreads[0] ** 2 + spreads[1] ** 2) / 2)  # as many inside as outside
    for parameters, spread in ((3, shared), (2, np.sqrt((shared**2).mean()))):
        ratio = stats.norm.logpdf(own, means[0], spread) - stats.norm.logpdf(own, means[1], spread)
        assert np.allclose(recorded.ask("exponential-family", parameters=parameters).scores, ratio, atol=1e-9)
    base, rmia = recorded.ask("exponential-family").scores, recorded.ask("rmia").scores
    assert stats.spearmanr(base, rmia).statistic == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_ties_are_broken_within_a_step(recorded: Recorded, mode: str) -> None:
    tied = recorded.ask("rmia", mode=mode, gamma=1.0, break_ties=False).scores
    broken = recorded.ask("rmia", mode=mode, gamma=1.0).scores
    assert len(tied.unique()) < 0.6 * len(tied)
    assert len(broken.unique()) > 0.99 * len(broken)
    higher = tied[:, None] > tied
    assert (broken[:, None] > broken)[higher].all()


def test_a_is_fitted_to_the_references_alone(recorded: Recorded) -> None:
    _, phi, inside = of_references(fewer(recorded, 3))
    p = 1 / (1 + np.exp(-phi))
    areas = np.zeros(11)
    for one in range(3):
        outside = np.where(np.delete(inside, one, 0), np.nan, np.delete(p, one, 0))
        usable = ~np.isnan(outside).all(0)
        usual = np.nanmean(outside[:, usable], 0)
        for a in range(11):
            ratio = p[one, usable] / (((1 + a / 10) * usual + 1 - a / 10) / 2)
            areas[a] += roc_auc_score(inside[one, usable], ratio)
    assert fitted_a(torch.from_numpy(p), torch.from_numpy(inside)) == areas.argmax() / 10
    assert fitted_a(torch.from_numpy(p[:1]), torch.from_numpy(inside[:1])) == 0.3
    assert recorded.area("rmia", mode="offline") > recorded.area("rmia", mode="offline", a=0.3) + 0.05


def gamma_world(rng: np.random.Generator, columns: int, nu: float, within: float) -> np.ndarray:
    """Variances of columns, inverse gamma with this mean."""
    return within * (nu - 2) / rng.chisquare(nu, columns)


def test_predictive_is_calibrated_on_the_model_that_it_assumes() -> None:
    """Columns of none to four values of a normal-inverse-gamma world: a fresh value's probability is uniform."""
    rng = np.random.default_rng(3)
    columns, nu, kappa = 4000, 8.0, 0.5
    variance = gamma_world(rng, columns, nu, 3.0)
    mean = 2.0 + np.sqrt(variance / kappa) * rng.standard_normal(columns)
    values = mean + np.sqrt(variance) * rng.standard_normal((5, columns))
    chosen = np.arange(4)[:, None] < rng.integers(0, 5, columns)
    freedom, location, squared = (
        part.numpy() for part in predicted(torch.from_numpy(values[:4]), torch.from_numpy(chosen))
    )
    u = stats.t.cdf(values[4], freedom, location, np.sqrt(squared))
    for count in range(5):
        assert stats.kstest(u[chosen.sum(0) == count], "uniform").pvalue > 0.01, count
    # The best that can be said is with the world's own constants: hardly better than with the fitted ones.
    n, centre = chosen.sum(0), np.where(chosen, values[:4], 0).sum(0) / np.maximum(chosen.sum(0), 1)
    squares = (np.where(chosen, values[:4] - centre, 0) ** 2).sum(0)
    total = 3.0 * (nu - 2) + squares + kappa * n * (centre - 2.0) ** 2 / (kappa + n)
    scale = np.sqrt(total / (nu + n) * (1 + 1 / (kappa + n)))
    best = stats.t.logpdf(values[4], nu + n, (kappa * 2.0 + n * centre) / (kappa + n), scale).mean()
    ours = stats.t.logpdf(values[4], freedom, location, np.sqrt(squared)).mean()
    assert best - 0.01 < ours < best + 0.01


def test_predictive_pair_is_calibrated_and_finds_who_was_inside() -> None:
    """Six values a column, inside by chance; half of the fresh ones are inside, and the ratio is Bayes' own."""
    rng = np.random.default_rng(4)
    columns, nu = 6000, 9.0
    variance = gamma_world(rng, columns, nu, 2.0)
    middle = -1.0 + np.sqrt(variance / 0.3) * rng.standard_normal(columns)
    difference = 1.0 + np.sqrt(variance / 4.0) * rng.standard_normal(columns)
    inside = rng.random((7, columns)) < 0.5
    values = middle + difference * (inside - 0.5) + np.sqrt(variance) * rng.standard_normal((7, columns))
    pair = predicted_pair(torch.from_numpy(values[:6]), torch.from_numpy(inside[:6]))
    log_density = []
    for kind, found in zip((True, False), pair, strict=True):
        freedom, location, squared = (part.numpy() for part in found)
        u = stats.t.cdf(values[6], freedom, location, np.sqrt(squared))
        assert stats.kstest(u[inside[6] == kind], "uniform").pvalue > 0.01
        log_density.append(stats.t.logpdf(values[6], freedom, location, np.sqrt(squared)))
    # A ratio of likelihoods: among those with posterior odds of o, a share of o / (1 + o) were inside.
    share = 1 / (1 + np.exp(log_density[1] - log_density[0]))
    for low in np.arange(0.2, 0.8, 0.1):
        group = (share >= low) & (share < low + 0.1)
        expected, count = share[group].mean(), group.sum()
        assert abs(inside[6][group].mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_bavaria_with_many_references_and_with_few(recorded: Recorded) -> None:
    for count, margin in ((2, 0.03), (4, 0.1), (16, 0.01)):
        few = fewer(recorded, count)
        assert few.area("bavaria") > few.area("lira", variance="own") + margin
    own, shadows, inside = of_references(recorded)
    many = [torch.from_numpy(np.tile(one, (100, 1))) for one in (shadows, inside)]
    pair = predicted_pair(*many)
    for found, kind in zip(pair, (inside, ~inside), strict=True):
        assert np.allclose(found.location, np.nanmean(np.where(kind, shadows, np.nan), 0), atol=5e-3)
    ratio = [stats.norm.logpdf(own, t.location.numpy(), np.sqrt(t.squared_scale.numpy())) for t in pair]
    rung = recorded.ask("exponential-family", parameters=3).scores.numpy()
    assert np.corrcoef(ratio[0] - ratio[1], rung)[0, 1] > 0.999
    normal, student = (recorded.area("bavaria", distribution=name) for name in ("normal", "t"))
    assert abs(normal - student) < 0.005


def test_thresholds_of_classes(recorded: Recorded) -> None:
    """The ranking inside a class stays; between classes it is by what public samples, or references, have."""
    labels = recorded.knowledge.candidates.labels
    plain = recorded.ask("modified-entropy").scores
    assert recorded.knowledge.public is not None
    shift = plain - recorded.ask("modified-entropy", thresholds="public").scores
    theirs = recorded.knowledge.public.labels
    p = recorded.figures[7]["public"][0].double().softmax(-1).numpy()
    y = np.eye(10)[theirs.numpy()].astype(bool)
    entropy = np.where(y, -(1 - p) * np.log(p), -p * np.log1p(-p)).sum(1)
    for label in range(10):
        of_class = np.sort(-entropy[theirs.numpy() == label])
        assert np.allclose(shift[labels == label], of_class[(len(of_class) - 1) // 2], atol=1e-9)
    shift = plain - recorded.ask("modified-entropy", thresholds="references").scores
    _, shadows, inside = of_references(recorded)
    r = recorded.knowledge.references
    assert r is not None
    p = r.logits.double().softmax(-1).numpy()
    y = np.eye(10)[labels.numpy()].astype(bool)
    shadows = np.where(y, (1 - p) * np.log(p + 1e-45), p * np.log1p(-p.clip(max=1 - 1e-16))).sum(-1)
    for label in (0, 7):
        chosen = labels.numpy() == label
        threshold = shift[chosen].unique()
        assert np.ptp(threshold.numpy()) < 1e-9
        of_class, member = shadows[:, chosen].ravel(), inside[:, chosen].ravel()
        tried = np.quantile(of_class, np.linspace(0, 1, 400))
        advantage = [(of_class >= at)[member].mean() - (of_class >= at)[~member].mean() for at in tried]
        at = float(threshold[0]) - 1e-9
        found = (of_class >= at)[member].mean() - (of_class >= at)[~member].mean()
        assert found >= max(advantage)


def test_quantile_holds_its_level_on_who_is_like_the_public_samples() -> None:
    """Classes of unlike confidence: of fresh non-members of each, a tenth lie above the upper quantile."""
    rng = np.random.default_rng(0)
    count = 1500
    labels = torch.from_numpy(rng.integers(0, 3, 2 * count))
    images = torch.from_numpy(rng.random((2 * count, 1, 4, 4), dtype=np.float32))
    height = 3.0 * labels.double() + torch.from_numpy(rng.standard_normal(2 * count)) * (1 + labels.double())
    logits = torch.zeros(2 * count, 3, dtype=torch.float64)
    logits[torch.arange(2 * count), labels] = height
    public = Candidates(images[:count], labels[:count])
    fresh = Candidates(images[count:], labels[count:])
    score = Quantile().signal(logits[count:], Knowledge(fresh, public), logits[:count])
    for label in range(3):
        above = (score[fresh.labels == label] > 1).double().mean()
        assert 0.06 < above < 0.14, label
    assert abs(float((score > 0).double().mean()) - 0.5) < 0.04


def test_shadow_models_learn_from_the_references(recorded: Recorded) -> None:
    four = fewer(recorded, 4)
    assert four.area("shadow-models") > 0.6
    turned = four.knowledge.references
    assert turned is not None
    wrong = replace(turned, trained_on=~turned.trained_on, public_trained_on=~turned.public_trained_on)
    assert replace(four, knowledge=replace(four.knowledge, references=wrong)).area("shadow-models") < 0.5


def test_a_missing_kind_of_reference_is_filled_from_the_other() -> None:
    values = torch.tensor([[1.0, 5.0, 4.0], [0.0, 6.0, 2.0]], dtype=torch.float64)
    trained_on = torch.tensor([[True, True, True], [False, True, False]])
    inside, outside = centres(values, trained_on)
    # Inside: 1, 5.5, 4; outside: 0, none, 2; the mean difference is 3.5 - 1.
    assert torch.allclose(inside, torch.tensor([1.0, 5.5, 4.0], dtype=torch.float64))
    assert torch.allclose(outside, torch.tensor([0.0, 3.0, 2.0], dtype=torch.float64))
    p = torch.tensor([[0.9, 0.8, 0.99]], dtype=torch.float64)
    inside, outside = centres(p, torch.tensor([[True, False, True]]), probability=True)
    assert ((outside > 0) & (outside < 1)).all()
    with pytest.raises(NotApplicable, match="offline"):
        centres(p, torch.zeros(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("name", NAMES)
def test_each_candidate_is_judged_for_itself(recorded: Recorded, name: str) -> None:
    """Few, unevenly trained references; the order in which candidates stand says nothing."""
    r = fewer(recorded, 5).knowledge.references
    assert r is not None
    keep = torch.arange(400)
    r = References(r.logits[:, keep], r.trained_on[:, keep].clone(), r.public_logits, r.public_trained_on)
    r.trained_on[:, :7] = True
    r.trained_on[:, 7:12] = False
    asked = recorded.knowledge.candidates
    asked = Candidates(asked.images[keep], asked.labels[keep])
    figures = {7: {**recorded.figures[7], "logits": recorded.figures[7]["logits"][:, keep]}}
    attack = ATTACKS.get(name)()
    found = attack.scores(figures, EVERYONE, replace(recorded.knowledge, candidates=asked, references=r))
    assert found.scores.shape == (400,)
    assert found.scores.isfinite().all()
    assert found.details["queries"] == 1
    if attack.needs.references:
        assert {k: found.details[k] for k in ("references", "fewest_in", "fewest_out")} == {
            "references": 5, "fewest_in": 0, "fewest_out": 0
        }  # fmt: skip
        assert found.details["pooled"] >= 12
    turn = torch.from_numpy(np.random.default_rng(1).permutation(400))
    turned = References(r.logits[:, turn], r.trained_on[:, turn], r.public_logits, r.public_trained_on)
    asked = Candidates(asked.images[turn], asked.labels[turn])
    figures[7]["logits"] = figures[7]["logits"][:, turn]
    again = attack.scores(figures, EVERYONE, replace(recorded.knowledge, candidates=asked, references=turned))
    assert torch.allclose(again.scores, found.scores[turn], atol=1e-9)


MLP = Scenario(
    ModelConfig(name="mlp", classes=10, channels=1, image_size=8, activation="relu"),
    TrainingConfig(protocol="fedavg", batch_size=4, local_steps=2, learning_rate=0.1),
    CompressionConfig(name="none"),
)


def federation() -> tuple[list[list[Observation]], list[dict[str, Tensor]]]:
    """Two rounds of two clients, client 1 in the first alone, and the global models after them."""
    rng = torch.Generator().manual_seed(0)
    weights = initial_weights(MLP.model, seed=0)
    rounds, after = [], []
    for number, clients in ((1, (0, 1)), (2, (0,))):
        seen = []
        for client in clients:
            change = {n: 0.3 * torch.randn(w.shape, generator=rng) for n, w in weights.items()}
            shapes = tuple(tuple(w.shape) for w in change.values())
            values = torch.cat([w.flatten() for w in change.values()])
            seen.append(
                Observation(
                    number, client, MLP, weights, Update(tuple(change), shapes, None, values, "delta"), 4
                )
            )
        weights = {
            n: w + torch.stack([o.update.dense()[n] for o in seen]).mean(0) for n, w in weights.items()
        }
        rounds.append(seen)
        after.append(weights)
    return rounds, after


@pytest.mark.parametrize(("model", "target"), [("global", EVERYONE), ("rounds", EVERYONE), ("client", 1)])
def test_whose_answers_are_read(model: str, target: int) -> None:
    rounds, after = federation()
    rng = torch.Generator().manual_seed(1)
    asked, public = (
        Candidates(torch.rand(n, 1, 8, 8, generator=rng), torch.randint(0, 10, (n,), generator=rng))
        for n in (6, 20)
    )
    knowledge = Knowledge(asked, public)
    attack = ATTACKS.get("attack-p")(model=model)
    figures = {
        number: attack.watch(RoundView(seen, knowledge, torch.device("cpu"), state), 0)
        for number, (seen, state) in enumerate(zip(rounds, after, strict=True), start=1)
    }
    answer = attack.scores(figures, target, knowledge)
    read = {"global": [after[1]], "rounds": after, "client": [client_model(rounds[0][1])]}[model]
    network, shares = build_model(MLP.model).eval(), []
    for state in read:
        network.load_state_dict(state)
        of_asked, of_public = (
            torch.nn.functional.cross_entropy(network(c.images), c.labels, reduction="none")
            for c in (asked, public)
        )
        shares.append((of_public >= of_asked[:, None]).double().mean(1))
    assert torch.allclose(answer.scores, torch.stack(shares).mean(0))
    assert answer.details["rounds"] == {"global": [2], "rounds": [1, 2], "client": [1]}[model]
    assert answer.details["queries"] == len(read)
    assert answer.details["population"] == 20
    needs = attack.needs_now(MLP)
    assert (needs.about, needs.sums) == (("client", "single") if model == "client" else ("anybody", ""))
    if model == "client":
        with pytest.raises(NotApplicable, match="client 5, the target, answered in none of 2"):
            attack.scores(figures, 5, knowledge)


def test_in_a_federation_behind_secure_aggregation(tmp_path: Path) -> None:
    """Members of anybody, by the last global model, which the same seed trains again."""
    names = ("loss-threshold", "attack-p", "lira")
    config = Config.from_mapping(
        {
            "dataset": "digits", "model": "mlp", "clients": 3, "rounds": 2, "protocol": "fedavg", "local-steps": 10,
            "batch-size": 16, "learning-rate": 0.3, "labels": "random", "compressor": "none", "engine": "inline",
            "limit": 500, "data.nonmembers": 200, "data.auxiliary_size": 50, "defense": "secure-aggregation",
            "attack": names, "attack.lira.model": "client", "run-dir": str(tmp_path / "run"),
        }
    )  # fmt: skip
    result, world = simulate(config), build_world(config)
    assert set(result.audits) == {"loss-threshold", "attack-p"}
    network = build_model(world.scenario.model).eval()
    network.load_state_dict(run_federation(config, world).weights)
    with torch.no_grad():
        images, labels = world.dataset.tensors(np.arange(len(world.dataset)))
        losses = torch.nn.functional.cross_entropy(network(images), labels, reduction="none").double().numpy()
    pools = {True: np.concatenate(world.partitions), False: world.pools.nonmembers}
    public = np.sort(losses[world.pools.auxiliary])
    for name, told in (
        ("loss-threshold", -losses),
        ("attack-p", 1 - np.searchsorted(public, losses) / len(public)),
    ):
        records = result.audits[name].records
        assert {record["client"] for record in records} == {EVERYONE}
        for member, pool in pools.items():
            scores = np.array([record["score"] for record in records if record["is_member"] is member])
            assert len(scores) > 100
            assert np.abs(scores[:, None] - told[pool]).min(1).max() < 1e-5
            assert len(np.unique(scores)) <= len(np.unique(told[pool]))


def test_refused_before_anything_starts() -> None:
    facts = Facts(references=1, auxiliary=0, labelled=True, held_out=10)
    lira, summed = ATTACKS.get("lira"), replace(MLP, defense=DefenseConfig(names=("secure-aggregation",)))
    assert "--references 2" in attack_refusals(lira(), MLP, facts)[0]
    assert not attack_refusals(lira(mode="offline"), MLP, facts)
    assert not attack_refusals(lira(mode="offline"), summed, facts)
    assert "secure-aggregation" in attack_refusals(lira(mode="offline", model="client"), summed, facts)[0]
    for name in ("attack-p", "rmia", "quantile"):
        assert "data.auxiliary_size" in attack_refusals(ATTACKS.get(name)(), MLP, facts)[0]
    thresholds = ATTACKS.get("modified-entropy")
    assert not attack_refusals(thresholds(), MLP, replace(facts, references=0))
    assert (
        "--references 1"
        in attack_refusals(thresholds(thresholds="references"), MLP, replace(facts, references=0))[0]
    )


def test_bad_input_in_one_sentence(recorded: Recorded) -> None:
    bare = replace(recorded, knowledge=replace(recorded.knowledge, public=None, references=None))
    with pytest.raises(
        NotApplicable, match="0 reference models, and at least 2 are needed; use --references 2"
    ):
        bare.ask("lira")
    with pytest.raises(NotApplicable, match="1 reference model, and at least 2"):
        fewer(recorded, 1).ask("bavaria")
    for name in ("attack-p", "rmia", "quantile"):
        with pytest.raises(NotApplicable, match=r"0 labelled public samples, .*'data.auxiliary_size'"):
            bare.ask(name)
    broken = {7: {name: tensor.clone() for name, tensor in recorded.figures[7].items()}}
    broken[7]["logits"][0, 3, 1] = torch.nan
    with pytest.raises(DataError, match="answers of the global model after round 7 are not finite"):
        replace(recorded, figures=broken).ask("loss-threshold")
    references = recorded.knowledge.references
    assert references is not None
    never = replace(references, trained_on=torch.zeros_like(references.trained_on))
    unseen = replace(recorded, knowledge=replace(recorded.knowledge, references=never))
    for name in ("lira", "rmia", "exponential-family", "bavaria"):
        with pytest.raises(NotApplicable, match="offline"):
            unseen.ask(name)
        assert unseen.ask(name, mode="offline").scores.isfinite().all()
    with pytest.raises(NotApplicable, match="teach nothing"):
        unseen.ask("shadow-models")
    with pytest.raises(NotApplicable, match="set no threshold"):
        unseen.ask("modified-entropy", thresholds="references")
    diverged = replace(references, logits=references.logits.clone().fill_(torch.inf))
    with pytest.raises(DataError, match="answers of reference models are not finite"):
        replace(recorded, knowledge=replace(recorded.knowledge, references=diverged)).ask("attack-r")
