"""What forgetting leaks, in runs that really federate, forget and are attacked (inline engine)."""

from __future__ import annotations

import csv
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from fedattack.audit import AuditResult, audit_forgotten
from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import ConfigError, DataError, NotApplicable
from fedattack.observation import Observation
from fedattack.storage import RunFolder
from simulations.client_app import Workplace, round_batches
from simulations.engine.federation import DeletionRequests, run_federation
from simulations.experiments.base import EXPERIMENTS, Plan
from simulations.experiments.choose import choose_attacks
from simulations.experiments.forgotten import ForgottenExperiment, Watching
from simulations.pipeline import RunResult, simulate
from simulations.progress import stages

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "width": 128,
    "clients": 4,
    "rounds": 3,
    "batch-size": 0,
    "learning-rate": 0.5,
    "compressor": "none",
    "engine": "inline",
    "attack": "analytic",
    "requests": 1,
    "victims": 1,
    "limit": 1200,
    "forgotten": True,
    "unlearning.seeds": 1,
    "data.auxiliary_size": 200,
    "data.nonmembers": 300,
}


@dataclass
class Looked:
    """What an experiment found, what the server saw in the run, and what was said."""

    audits: dict[str, AuditResult]
    seen: list[Observation]
    world: World
    requests: DeletionRequests

    def told(self, name: str) -> str:
        """The sentences beside a verdict."""
        return " ".join(self.audits[name].summary["told"])


def looked(folder: Path, **settings: Any) -> Looked:
    """Train, forget and attack as the pipeline does, without its report."""
    changed = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
    config = Config.from_mapping(BASE | changed)
    attacks, world, seen = choose_attacks(config), build_world(config), list[Observation]()
    run_folder = RunFolder.create(folder / "run", config)
    with stages(Console(quiet=True)) as shown:
        plan = Plan(config, world, run_folder, shown)
        asking = [EXPERIMENTS.get("unlearning")(plan, {n: a}) for n, a in attacks.items() if not a.inverts]
        forgotten = ForgottenExperiment.beside(asking, plan, attacks)
        works = [*asking, forgotten]

        def observed(observation: Observation) -> None:
            seen.append(observation)
            for one in works:
                if one.wants(observation.round, observation.client):
                    one.observe(observation)

        result = run_federation(
            config,
            world,
            on_observation=observed,
            on_weights=lambda r, w: [one.global_model(r, w) for one in works],
            on_round=lambda record: [one.after_round(record) for one in works],
            on_requests=lambda asked: [one.requests(asked) for one in works],
        )
        audits = forgotten.audit(result)
        forgotten.close()
        for error in forgotten.failed.values():
            raise error
    return Looked(audits, seen, world, forgotten.deleting.asked)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    settings = BASE | {"run-dir": str(tmp_path_factory.mktemp("honest") / "run")}
    return simulate(Config.from_mapping(settings))


def test_an_honest_deletion_gives_the_forgotten_away(honest: RunResult) -> None:
    """To the server by two updates, to another client by two global models; beside the ordinary attack."""
    assert list(honest.audits) == [
        "analytic",
        "analytic:forgotten",
        "analytic:forgotten-models",
        "losses:forgotten",
    ]
    assert honest.audits["analytic"].level == "failed"  # a batch of 175
    for name, least, seat in (("", 100, "curious server"), ("-models", 60, "another client")):
        audit = honest.audits[f"analytic:forgotten{name}"]
        (record,) = audit.records
        assert record["psnr"] >= least
        assert record["label_right"]
        assert audit.level == "leak"
        assert audit.threat["seat"] == seat
    (told,) = (t for t in honest.audits["losses:forgotten"].summary["told"] if "asks to forget" in t)
    assert told.startswith(
        "no attack asks: honest client 0 asks to forget 1 of its samples, at random; retrain"
    )
    exact = "(175 g - 174 g') / 1, of client 0's updates of round 1 before and after: exactly the gradient"
    assert honest.audits["analytic:forgotten"].summary["told"][0].startswith(exact)
    page = (honest.folder / "report.html").read_text()
    assert "exactly the gradient of the 1 forgotten sample" in page
    assert "finds 1 forgotten by the rank" in page
    with (honest.folder / "records.csv").open() as file:
        attacks = {row["attack"] for row in csv.DictReader(file)}
    assert attacks == set(honest.audits)


def test_members_before_and_after_are_told_of_the_forgotten_and_of_the_retained(honest: RunResult) -> None:
    audit = honest.audits["losses:forgotten"]
    groups = [record["group"] for record in audit.records]
    assert {group: groups.count(group) for group in set(groups)} == {
        "forgotten": 1,
        "retained": 174,
        "unseen": 300,
    }
    assert audit.level == "undecided"  # one sample
    assert set(audit.summary["metrics"]) == {
        "forgotten_before",
        "auc",
        "both",
        "retained_before",
        "retained_after",
    }


def test_the_deletions_of_an_attack_are_looked_at_and_several_at_once(tmp_path: Path) -> None:
    """Its client is 1, its samples those that it asked for."""
    settings = {
        "attack": "spear,unlearn-max-loss",
        "attack.malicious_clients": "1",
        "requests": 4,
        "limit": 600,
    }
    found = looked(tmp_path, **settings)
    records = found.audits["spear:forgotten"].records
    assert [record["client"] for record in records] == [1] * 4
    assert min(record["psnr"] for record in records) >= 100
    ((sender, request),) = found.requests["unlearn-max-loss"]
    asked = found.world.partitions[sender][list(request.positions)]
    assert sorted(record["sample"] for record in records) == sorted(asked.tolist())
    assert found.told("losses:forgotten").startswith(
        "unlearn-max-loss asks to forget 4 samples that it chose"
    )


def test_where_no_attack_asks_an_honest_client_does(tmp_path: Path) -> None:
    """The malicious one, client 0, asks for nothing."""
    found = looked(tmp_path, attack="analytic,asking_clients:Silent", limit=512, requests=2)
    assert not found.requests
    assert found.told("losses:forgotten").startswith("no attack asks: honest client 1 asks to forget 2")


def test_what_gates_refuse_is_not_forgotten(tmp_path: Path) -> None:
    settings = {"attack": "analytic,unlearn-max-loss", "limit": 600, "requests": 8}
    with pytest.raises(NotApplicable, match="gates refuse all that unlearn-max-loss asks for"):
        looked(tmp_path, **settings, gates="rate", gates__rate__share=0.001)


def test_two_minibatches_are_told_of_beforehand_and_answered_by_the_prior(tmp_path: Path) -> None:
    """Four clients ask, one sample each."""
    settings = {"attack": "analytic,unlearn-max-loss", "attack.malicious_clients": "0,1,2,3"}
    found = looked(tmp_path, **settings, batch_size=16)
    config = Config.from_mapping(BASE | {"batch-size": 16})
    (note,) = ForgottenExperiment.notes(config, found.world)
    assert note.startswith(
        "what forgetting leaks is seen only roughly: training.batch_size = 16 of 175 samples"
    )
    audit = found.audits["analytic:forgotten"]
    assert audit.summary["methods"] == ["prior"]
    assert audit.verdict.startswith("no leakage beyond the prior: ")
    assert "only roughly the gradient" in found.told("analytic:forgotten")
    assert "no number of samples makes" in found.told("losses:forgotten")


def test_an_attack_that_applies_to_differences_alone_is_no_refusal(tmp_path: Path) -> None:
    settings = BASE | {"batch-size": 16, "limit": 600, "run-dir": str(tmp_path / "run")}
    with pytest.raises(NotApplicable, match="tells one image"):
        simulate(Config.from_mapping(settings | {"forgotten": False}))
    result = simulate(Config.from_mapping(settings))
    assert list(result.audits) == ["analytic:forgotten", "losses:forgotten"]


def test_a_mechanism_that_goes_on_elsewhere_is_told_of(tmp_path: Path) -> None:
    """FedEraser asks clients at weights that have moved; the 175 samples behind what it takes out are too many."""
    found = looked(tmp_path, mechanism="federaser")
    told = found.told("analytic:forgotten")
    assert "updates of round 2 before and after: only roughly" in told
    assert "at other weights" in told
    assert "analytic:forgotten-models" not in found.audits
    assert "no number of samples makes" in found.told("losses:forgotten")


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_federaser_takes_out_another_client_reads(tmp_path: Path, rounds: int) -> None:
    """All that the client sent in the first round, whatever it asked to forget."""
    found = looked(tmp_path, mechanism="federaser", batch_size=1, rounds=rounds)
    (record,) = found.audits["analytic:forgotten-models"].records
    config = Config.from_mapping(BASE | {"batch-size": 1, "rounds": rounds})
    ((used,),) = round_batches(config, len(found.world.partitions[0]), 1, 0)
    assert record["sample"] == found.world.partitions[0][used]
    assert record["psnr"] >= 60
    assert "federaser takes all out that client 0 sent in round 1" in found.told("analytic:forgotten-models")
    assert ("analytic:forgotten" in found.audits) == (rounds == 3)


def test_sums_over_clients_give_the_forgotten_away_as_well(tmp_path: Path) -> None:
    found = looked(tmp_path, defense="secure-aggregation")
    (record,) = found.audits["analytic:forgotten"].records
    assert record["psnr"] >= 90
    assert record["client"] == -1


def test_a_client_that_leaves_gives_away_what_it_sent_before(tmp_path: Path) -> None:
    """Ten clients with a sample each: its only update is of it."""
    settings = {"attack": "analytic,unlearn-max-loss", "limit": 170, "clients": 10}
    found = looked(tmp_path, **settings, data__auxiliary_size=60, data__nonmembers=100)
    assert found.told("analytic:forgotten").startswith("all that it sent, of client 0's updates of round 1")
    (record,) = found.audits["analytic:forgotten"].records
    assert record["sample"] == found.world.partitions[0][0]
    assert record["psnr"] >= 100


def test_what_the_server_saw_before_is_what_it_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round that is looked at again brings the update that came in the run, to the bit."""
    again: list[Observation] = []
    original = Watching.as_before

    def noting(self: Watching, *asked: Any) -> Observation:
        again.append(original(self, *asked))
        return again[-1]

    monkeypatch.setattr(Watching, "as_before", noting)
    found = looked(tmp_path, limit=600, compressor="randomk", compression=0.3)
    (first,) = (o for o in found.seen if (o.round, o.client) == (1, 0))
    for one, other in zip(again[0].update.layers(), first.update.layers(), strict=True):
        assert torch.equal(one[2], other[2])
        assert torch.equal(one[3], other[3])


RELEASED = {"model": "logistic", "width": "", "clients": 1, "training.weight_decay": 1.0}
CERTIFIED = {"mechanism": "certified", "training.weight_decay": 0.1, "unlearning.sigma": 10.0}


@pytest.mark.parametrize("settings", [{"mechanism": "newton"}, CERTIFIED])
def test_two_releases_of_a_linear_model_give_the_forgotten_away(tmp_path: Path, settings: dict) -> None:
    """As they are released, in float32; a certificate is about the second alone."""
    found = looked(tmp_path, **RELEASED | settings)
    (record,) = found.audits["analytic:forgotten-releases"].records
    assert record["psnr"] >= 30
    assert record["label_right"]
    assert found.audits["analytic:forgotten-releases"].threat["seat"] == "anybody with both models"
    told = found.told("analytic:forgotten-releases")
    assert "1 of 700 samples were forgotten" in told
    assert ("says nothing of who has the one before" in told) == (settings is CERTIFIED)
    told = found.told("losses:forgotten")
    assert "client 0 was asked for no update" in told
    assert "there is no other client" in told
    assert "analytic:forgotten" not in found.audits


@pytest.mark.parametrize("fresh", [True, False])
def test_a_release_with_noise_of_its_own_hides_the_forgotten(tmp_path: Path, fresh: bool) -> None:
    """So small an epsilon that the removal trains anew."""
    settings = RELEASED | CERTIFIED | {"unlearning.epsilon": 1e-9, "unlearning.fresh": fresh}
    (record,) = looked(tmp_path, **settings).audits["analytic:forgotten-releases"].records
    assert (record["method"] == "prior") == fresh
    assert (record["psnr"] < record["floor.auxiliary mean.psnr"] + 1) == fresh


def test_clients_draw_anew_while_the_server_forgets() -> None:
    """Batches, noise and compression; not where damage is measured, and not while they train."""
    settings = BASE | {"batch-size": 8, "unlearning.draws": "anew"}
    for draws in ("anew", "kept"):
        config = Config.from_mapping(settings | {"unlearning.draws": draws})
        place = Workplace.of(config, build_world(config))
        assert place.drawing(False) is config
        again = place.drawing(True)
        assert (again.seed != config.seed) == (draws == "anew")
        first, second = (round_batches(one, 175, 1, 2)[0] for one in (config, again))
        assert np.array_equal(first, second) == (draws == "kept")
        assert again.result_settings() | {"seed": config.seed} == config.result_settings()


def test_what_cannot_be_forgotten_is_refused() -> None:
    config = Config.from_mapping({"task": "wgan-gp", "forgotten": True, "dataset": "digits"})
    world = build_world(config)
    with pytest.raises(ConfigError, match="trains no classifier"):
        ForgottenExperiment.notes(config, world)


# ---------------------------------------------------------------------- the audit


def losses(seed: int, count: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.exponential(1.0, count), rng.exponential(1.0, count) + shift


def test_areas_are_those_of_scikit_learn() -> None:
    forgotten, retained, unseen = losses(0, 40, 0.3), losses(1, 60, -0.2), losses(2, 100, 0.0)
    audit = audit_forgotten("losses", forgotten, retained, unseen, mechanism="retrain")
    asked = {
        "forgotten_before": (-forgotten[0], -unseen[0]),
        "auc": (-forgotten[1], -unseen[1]),
        "both": (forgotten[1] - forgotten[0], unseen[1] - unseen[0]),
        "retained_before": (-retained[0], -unseen[0]),
        "retained_after": (-retained[1], -unseen[1]),
    }
    for key, (ours, others) in asked.items():
        truth = np.repeat([1, 0], [len(ours), len(others)])
        expected = roc_auc_score(truth, np.concatenate([ours, others]))
        found = audit.summary["metrics"][key]
        assert found["mean"] == pytest.approx(expected, abs=1e-12)
        assert found["low"] < expected < found["high"]


def test_the_verdict_is_about_the_forgotten() -> None:
    low, high = losses(0, 400, 0.0), losses(1, 400, 0.0)
    risen = low[0], low[0] + 3.0
    steady = high[0], high[0]
    assert audit_forgotten("a", risen, steady, steady, mechanism="m").level == "leak"  # by both models
    known = low[0] * 1e-3, low[1] * 1e-3
    assert audit_forgotten("b", known, steady, steady, mechanism="m").level == "leak"  # still a member
    again = audit_forgotten("c", losses(5, 4000, 0.0), known, losses(6, 4000, 0.0), mechanism="m")
    assert again.level == "none"
    assert again.verdict.startswith(
        "the forgotten look like samples never seen: AUC of the forgotten before 0."
    )
    few = audit_forgotten("d", losses(5, 3, 0.0), known, losses(6, 40, 0.0), mechanism="m")
    assert few.level == "undecided"
    idle = audit_forgotten("e", known, known, steady, mechanism="m", accuracy=0.1, chance_accuracy=0.12)
    assert idle.level == "undecided"
    assert "at chance" in idle.verdict
    with pytest.raises(DataError, match="0 forgotten"):
        audit_forgotten("f", losses(0, 0, 0.0), known, known, mechanism="m")
    assert dataclasses.asdict(few)["family"] == "forgotten"
