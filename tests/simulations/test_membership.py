"""The experiment on membership, on federations that really run (inline engine)."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adversaries.membership.fedmia import FedMIA, one_tailed, statistics
from torch.nn import functional

from adversaries.membership.base import MembershipAttack
from fedattack.audit.membership import audit_membership
from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import DataError, NotApplicable, RunFailed
from fedattack.metrics.membership import auc_interval
from fedattack.models import build_model
from fedattack.observation import EVERYONE, Candidates, MembershipScores, Observation
from fedattack.storage import RunFolder
from simulations.client_app import round_batches
from simulations.engine.federation import FederationResult, run_federation
from simulations.experiments.base import Plan
from simulations.experiments.membership import MembershipExperiment, choose_question, expected_rounds
from simulations.pipeline import simulate

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "clients": 6,
    "rounds": 6,
    "protocol": "fedavg",
    "local-steps": 8,
    "batch-size": 16,
    "learning-rate": 0.3,
    "compressor": "none",
    "engine": "inline",
    "candidates": 200,
    "data.auxiliary_size": 0,
    "data.nonmembers": 600,
}
CPU = torch.device("cpu")
Run = tuple[Config, World, list[Observation], FederationResult]


def settings(**more: object) -> Config:
    return Config.from_mapping(BASE | {name.replace("__", "."): value for name, value in more.items()})


def ran(**more: object) -> Run:
    config = settings(**more)
    world = build_world(config)
    observations: list[Observation] = []
    result = run_federation(config, world, on_observation=observations.append)
    return config, world, observations, result


@pytest.fixture(scope="module")
def federation() -> Run:
    return ran(rounds=12)


@pytest.fixture(scope="module")
def partial() -> Run:
    return ran(clients=8, participation=0.6, dropout=0.2, seed=7, rounds=5)


def experiment(path: Path, run: Run, **attacks: MembershipAttack) -> MembershipExperiment:
    """The experiment, shown all rounds of a recorded run."""
    config, world, observations, result = run
    plan = Plan(config, world, RunFolder.create(path, config), lambda *_: None)
    found = MembershipExperiment(plan, attacks)
    for record in result.rounds:
        for observation in observations:
            if observation.round == record.round and found.wants(record.round, observation.client):
                found.observe(observation)
        found.after_round(record)
    return found


def test_candidates_are_what_they_are_said_to_be() -> None:
    """One round of two batches of 16: only those samples are members, not the rest of the partition."""
    config, world, observations, _ = ran(**{"local-steps": 2, "rounds": 1})
    question = choose_question(config, world, 3, {3: [1]})
    counts, is_member, details = question.settle(config, world, {3: [1]})
    ids = question.ids
    assert details["members_used"] == 32
    assert counts.all()
    assert is_member.sum() == 32
    assert len(ids) == len(set(ids.tolist())) == 64
    assert set(ids[is_member]) <= set(world.partitions[3])
    assert set(ids[~is_member]) <= set(world.pools.nonmembers)
    assert 5 < np.flatnonzero(is_member).mean() < 59  # shuffled
    assert details["matched_label"] == 1.0
    assert sorted(world.dataset.labels[ids[is_member]]) == sorted(world.dataset.labels[ids[~is_member]])
    assert np.array_equal(ids, choose_question(config, world, 3, {3: [1]}).ids)

    # The samples said to be used are those behind the update: they alone explain it, to rounding.
    o = next(o for o in observations if o.client == 3)
    weights = {n: t.clone() for n, t in o.weights.items()}
    model = build_model(world.scenario.model)
    for batch in round_batches(config, len(world.partitions[3]), 1, 3):
        assert set(world.partitions[3][batch]) <= set(ids[is_member])
        model.load_state_dict(weights)
        images, labels = world.dataset.tensors(world.partitions[3][batch])
        functional.cross_entropy(model(images), labels).backward()
        weights = {n: (p - 0.3 * p.grad).detach() for n, p in model.named_parameters()}
        model.zero_grad()
    for name, delta in o.update.dense().items():
        torch.testing.assert_close(o.weights[name] + delta, weights[name], atol=1e-6, rtol=0)


def test_unequal_clients_get_non_members_of_their_own_classes(caplog: pytest.LogCaptureFixture) -> None:
    """Under shards a client has few classes; non-members of all classes would give it away without any attack."""
    config = settings(partition="shards", rounds=1)
    world = build_world(config)
    question = choose_question(config, world, 0, {0: [1]})
    _, is_member, details = question.settle(config, world, {0: [1]})
    labels = world.dataset.labels[question.ids]
    assert len(set(labels[is_member])) <= 4
    assert 20 <= is_member.sum() == (~is_member).sum()
    assert sorted(labels[is_member]) == sorted(labels[~is_member])
    assert details["matched_label"] == 1.0

    # Where there are none of them, few others fill up, and the log says so.
    labels = world.dataset.labels
    of_others = [i for i in world.pools.nonmembers if labels[i] not in set(labels[world.partitions[0]])]
    poorer = replace(world, pools=replace(world.pools, nonmembers=np.array(of_others)))
    with caplog.at_level(logging.WARNING, logger="fedattack.seats"):
        _, is_member, details = choose_question(config, poorer, 0, {0: [1]}).settle(config, poorer, {0: [1]})
    assert is_member.sum() == 20
    assert details["matched_label"] == 0
    assert "0 % of the non-members have the label of a member" in caplog.text


def test_pairs_whose_member_was_not_trained_on_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    """Chosen for rounds 1 and 2, of which only round 2 was seen."""
    config = settings(rounds=2, **{"local-steps": 2})
    world = build_world(config)
    question = choose_question(config, world, 1, {1: [1, 2]})
    with caplog.at_level(logging.WARNING, logger="fedattack.seats"):
        counts, is_member, details = question.settle(config, world, {1: [2]})
    partition = world.partitions[1]
    used = set(partition[np.concatenate(round_batches(config, len(partition), 2, 1))])
    asked = set(question.ids[is_member])
    assert set(question.ids[counts & is_member]) == asked & used < asked
    assert (counts & ~is_member).sum() == (counts & is_member).sum()
    assert details["matched_label"] == 1.0
    assert details["observed_rounds"] == [2]
    with caplog.at_level(logging.WARNING, logger="fedattack.seats"):
        few = settings(rounds=1, **{"local-steps": 1, "batch-size": 4})
        choose_question(few, world, 1, {1: [1]}).settle(few, world, {1: [1]})
    assert "only 4 members to ask about" in caplog.text


def test_who_answers_when_is_known_before_the_first_round(partial: Run) -> None:
    config, world, observations, _ = partial
    seen = {c: sorted(o.round for o in observations if o.client == c) for c in range(8)}
    assert expected_rounds(config, world) == {c: rounds for c, rounds in seen.items() if rounds}
    assert len({len(rounds) for rounds in seen.values()}) > 1


def test_the_most_observed_client_is_asked_about_round_by_round(partial: Run, tmp_path: Path) -> None:
    """The answer is that of the whole run at once, and no observation outlives its round."""
    _, world, observations, result = partial
    found = experiment(tmp_path / "run", partial, fedmia=FedMIA(), loss=FedMIA("loss"))
    target = found._asked["fedmia"].target
    counts = [sum(o.client == c for o in observations) for c in range(8)]
    assert target == counts.index(max(counts))
    candidates = found.questions()["fedmia"]
    assert set(vars(candidates)) == {"images", "labels"}
    model = build_model(world.scenario.model).eval()
    for name, statistic in (("fedmia", "cosine"), ("loss", "loss")):
        values = []
        for number in {o.round for o in observations if o.client == target}:
            seen = [o for o in observations if o.round == number]
            s = statistics(statistic, model, seen, candidates)
            own = [o.client for o in seen].index(target)
            others = s[torch.arange(len(seen)) != own]
            values.append(one_tailed(s[own], others, torch.ones_like(others, dtype=torch.bool)))
        scores = found.attacks[name].scores(found._figures[name], target).scores
        torch.testing.assert_close(scores, torch.stack(values).mean(0), atol=1e-9, rtol=0)
    audits = found.audit(result)
    assert {record["client"] for record in audits["fedmia"].records} == {target}
    again = experiment(tmp_path / "run", partial, fedmia=Unasked(), loss=Unasked())
    assert again._figures["fedmia"].keys() == found._figures["fedmia"].keys()
    for number, figures in found._figures["fedmia"].items():
        assert torch.equal(figures["statistic"], again._figures["fedmia"][number]["statistic"])


class Unasked(MembershipAttack):
    """Of a run whose figures are all on disk."""

    def watch(self, observations, target, candidates, seed, device):
        raise AssertionError("computed again")

    scores = watch


class Forgetful(MembershipAttack):
    """Keeps weak references to what it was shown."""

    shown: list[weakref.ref]

    def watch(self, observations, target, candidates, seed, device):
        self.shown = [*getattr(self, "shown", []), *(weakref.ref(o) for o in observations)]
        return {"clients": torch.tensor([o.client for o in observations])}

    def scores(self, rounds, target) -> MembershipScores:
        raise NotApplicable("forgetful: kept nothing")


def test_no_update_outlives_its_round(tmp_path: Path) -> None:
    config = settings(rounds=3)
    world = build_world(config)
    attack = Forgetful()
    plan = Plan(config, world, RunFolder.create(tmp_path / "run", config), lambda *_: None)
    found = MembershipExperiment(plan, {"forgetful": attack})
    alive = []

    def after_round(record) -> None:
        found.after_round(record)
        gc.collect()
        alive.append(sum(reference() is not None for reference in attack.shown))

    run_federation(config, world, on_observation=found.observe, on_round=after_round)
    assert len(attack.shown) == 18
    assert max(alive) <= 1  # the strategy's last one


def test_fedmia_finds_members_of_a_real_federation(federation: Run) -> None:
    config, world, observations, _ = federation
    every = list(range(1, 13))
    asked = [choose_question(config, world, target, {target: every}) for target in range(6)]
    truths = [q.settle(config, world, {q.target: every})[1] for q in asked]
    candidates = [Candidates(*world.dataset.tensors(q.ids)) for q in asked]
    answers = [
        FedMIA().run(observations, q.target, c, 0, CPU) for q, c in zip(asked, candidates, strict=True)
    ]
    truth = np.concatenate(truths)
    found = auc_interval(np.concatenate([a.scores.numpy() for a in answers]), truth, 0)
    print(f"FedMIA-II, digits, 6 clients: AUC {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]")
    assert found.low > 0.52
    assert audit_membership("fedmia", answers, truths).summary["metrics"]["auc"]["mean"] > 0.5

    # Control: the same candidates, answers of the clients that never had them.
    control = [
        FedMIA().run([o for o in observations if o.client != q.target], (q.target + 1) % 6, c, 0, CPU).scores
        for q, c in zip(asked, candidates, strict=True)
    ]
    chance = auc_interval(np.concatenate(control), truth, 0)
    print(f"control: AUC {chance.mean:.3f} [{chance.low:.3f}, {chance.high:.3f}]")
    assert chance.low < 0.5 < chance.high
    assert abs(chance.mean - 0.5) < 0.035


def test_a_client_is_asked_about_all_others(tmp_path: Path) -> None:
    """Labels without meaning, learnt by heart: the fall of the loss tells who learnt them."""
    more = {"attack": "client-loss", "labels": "random", "limit": 500, "data.nonmembers": 200, "width": 256}
    config = settings(clients=3, rounds=40, **more, **{"local-steps": 20, "run-dir": str(tmp_path / "run")})
    result = simulate(config)
    audit = result.audits["client-loss"]
    print(audit.verdict)
    assert {record["client"] for record in audit.records} == {EVERYONE}
    assert audit.summary["metrics"]["auc"]["low"] > 0.7
    world = build_world(config)
    ids = choose_question(config, world, EVERYONE, {1: [*range(1, 41)], 2: [*range(1, 41)]}).ids
    assert not set(ids) & set(world.partitions[0])


def test_an_attack_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    names = ("rigged_attacks:Failing", "rigged_attacks:Silent", "fedmia")
    config = settings(rounds=2, attack=names, **{"run-dir": str(tmp_path / "run")})
    result = simulate(config)
    assert list(result.audits) == ["fedmia"]
    log = (tmp_path / "run/log.txt").read_text()
    assert "rigged_attacks:Failing failed: ValueError: too odd to read" in log
    assert "client 0 could not answer 'query.answer' of attack 'rigged_attacks:Silent': KeyError" in log
    alone = settings(rounds=1, attack=names[:1], **{"run-dir": str(tmp_path / "alone")})
    with pytest.raises(RunFailed, match="too odd to read"):
        simulate(alone)


def test_refusals(federation: Run, tmp_path: Path) -> None:
    config, world, observations, result = federation
    with pytest.raises(NotApplicable, match="client 9, the target"):
        FedMIA().run(observations, 9, Candidates(*world.dataset.tensors(np.arange(3))), 0, CPU)
    two = [o for o in observations if o.client < 2]
    with pytest.raises(NotApplicable, match="at least 3 are needed"):
        FedMIA().run(two, 0, Candidates(*world.dataset.tensors(np.arange(3))), 0, CPU)
    nobody = replace(result, rounds=[replace(record, clients=()) for record in result.rounds])
    found = experiment(tmp_path / "run", (config, world, [], nobody), fedmia=FedMIA())
    assert found.audit(nobody) == {}
    assert "no update of a client that it is asked about was observed" in str(found.failed["fedmia"])
    bare = settings(data__nonmembers=0, rounds=1)
    bare_world = build_world(bare)
    with pytest.raises(DataError, match=r"data\.nonmembers"):
        choose_question(bare, bare_world, 0, {0: [1]})
    with pytest.raises(NotApplicable, match="all clients are malicious"):
        simulate(settings(clients=1, attack="client-loss", **{"run-dir": str(tmp_path / "other")}))
