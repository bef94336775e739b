"""The membership and unlearning seats, on federations that really run (inline engine)."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adversaries import ATTACKS
from adversaries.base import no_progress
from adversaries.membership.base import MembershipAttack
from adversaries.membership.fedmia import FedMIA
from adversaries.reconstruction.base import ReconstructionAttack
from adversaries.refusals import applicable
from fedattack.audit.membership import audit_membership
from fedattack.audit.unlearning import audit_unlearning
from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import DataError, NotApplicable
from fedattack.metrics.membership import auc_interval
from fedattack.models import build_model, initial_weights
from fedattack.observation import Candidates, MembershipScores, Observation
from fedattack.registry import build_plugin
from simulations.engine.federation import FederationResult, Judge, run_federation
from simulations.experiments import membership, unlearning
from simulations.experiments.choose import known_facts
from simulations.experiments.membership import choose_candidates, membership_experiment
from simulations.experiments.unlearning import unlearning_experiment

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
    "requests": 12,
    "candidates": 200,
    "data.auxiliary_size": 0,
    "data.nonmembers": 600,
}


def ran(**settings: object) -> tuple[Config, World, list[Observation], FederationResult]:
    config = Config.from_mapping(BASE | {name.replace("__", "."): value for name, value in settings.items()})
    world = build_world(config)
    observations: list[Observation] = []
    result = run_federation(config, world, on_observation=observations.append)
    return config, world, observations, result


@pytest.fixture(scope="module")
def federation() -> tuple[Config, World, list[Observation], FederationResult]:
    return ran(rounds=12)


def test_candidates_are_what_they_are_said_to_be() -> None:
    """One round of two batches of 16: only those samples are members, not the rest of the partition."""
    config, world, observations, _ = ran(**{"local-steps": 2, "rounds": 1})
    ids, is_member, details = choose_candidates(config, world, 3, [1])
    assert details["members_used"] == 32
    assert is_member.sum() == 32
    assert len(ids) == len(set(ids.tolist())) == 64
    assert set(ids[is_member]) <= set(world.partitions[3])
    assert set(ids[~is_member]) <= set(world.pools.nonmembers)
    assert 5 < np.flatnonzero(is_member).mean() < 59  # shuffled
    assert is_member[:32].any()
    assert not is_member[:32].all()
    assert details["matched_label"] == 1.0
    assert sorted(world.dataset.labels[ids[is_member]]) == sorted(world.dataset.labels[ids[~is_member]])
    again, _, _ = choose_candidates(config, world, 3, [1])
    assert np.array_equal(ids, again)

    # The samples said to be used are those behind the update: they alone explain it, to rounding.
    o = next(o for o in observations if o.client == 3)
    weights = {n: t.clone() for n, t in o.weights.items()}
    model = build_model(world.scenario.model)
    for batch in membership.round_batches(config, len(world.partitions[3]), 1, 3):
        assert set(world.partitions[3][batch]) <= set(ids[is_member])
        model.load_state_dict(weights)
        images, labels = world.dataset.tensors(world.partitions[3][batch])
        functional.cross_entropy(model(images), labels).backward()
        weights = {n: (p - 0.3 * p.grad).detach() for n, p in model.named_parameters()}
        model.zero_grad()
    for name, delta in o.update.dense().items():
        torch.testing.assert_close(o.weights[name] + delta, weights[name], atol=1e-6, rtol=0)


def test_unequal_clients_get_non_members_of_their_own_classes() -> None:
    """Under shards a client has few classes; non-members of all classes would give it away without any attack."""
    config, world, _, _ = ran(partition="shards", rounds=1)
    ids, is_member, details = choose_candidates(config, world, 0, [1])
    labels = world.dataset.labels[ids]
    assert len(set(labels[is_member])) <= 4
    assert 20 <= is_member.sum() == (~is_member).sum()
    assert sorted(labels[is_member]) == sorted(labels[~is_member])
    assert details["matched_label"] == 1.0


def test_too_few_of_a_class_are_filled_up_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config, world, _, _ = ran(partition="shards", rounds=1)
    labels = world.dataset.labels
    mine = set(labels[world.partitions[0]])
    of_others = np.array([i for i in world.pools.nonmembers if labels[i] not in mine])
    poorer = replace(world, pools=replace(world.pools, nonmembers=of_others))
    with caplog.at_level(logging.WARNING, logger="fedattack.seats"):
        _, is_member, details = choose_candidates(config, poorer, 0, [1])
    assert is_member.sum() == 20
    assert details["matched_label"] == 0
    assert "0 % of the non-members have the label of a member" in caplog.text


def test_fedmia_finds_members_of_a_real_federation(federation) -> None:
    config, world, observations, _ = federation
    outcomes = [
        membership_experiment(config, world, observations, FedMIA(statistic), target=target)
        for target in range(6)
        for statistic in ("cosine",)
    ]
    assert [o.target for o in outcomes] == list(range(6))
    scores = np.concatenate([o.scores.scores.numpy() for o in outcomes])
    truth = np.concatenate([o.is_member for o in outcomes])
    found = auc_interval(scores, truth, 0)
    print(f"FedMIA-II, digits, 6 clients: AUC {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]")
    assert found.low > 0.52
    audited = audit_membership("fedmia", [o.scores for o in outcomes], [o.is_member for o in outcomes])
    assert audited.summary["metrics"]["auc"]["mean"] > 0.5

    # Control: the same candidates, answers of the clients that never had them.
    control = []
    for outcome in outcomes:
        images, labels = world.dataset.tensors(outcome.sample_ids)
        others = [o for o in observations if o.client != outcome.target]
        target = (outcome.target + 1) % 6
        control.append(
            FedMIA().run(others, target, Candidates(images, labels), 0, torch.device("cpu")).scores
        )
    chance = auc_interval(np.concatenate(control), truth, 0)
    print(f"control: AUC {chance.mean:.3f} [{chance.low:.3f}, {chance.high:.3f}]")
    assert chance.low < 0.5 < chance.high
    assert abs(chance.mean - 0.5) < 0.035


class Nosy(MembershipAttack):
    """Records what it was given."""

    def run(self, observations, target, candidates, seed, device, progress=no_progress) -> MembershipScores:
        self.given = (list(observations), target, candidates)
        return MembershipScores(torch.zeros(len(candidates.labels), dtype=torch.float64), "none")


def test_the_attack_is_given_candidates_without_the_truth(federation) -> None:
    config, world, observations, _ = federation
    attack = Nosy()
    outcome = membership_experiment(config, world, observations, attack)
    given, target, candidates = attack.given
    assert target == outcome.target == 0
    assert given == observations
    assert set(vars(candidates)) == {"images", "labels"}
    images, labels = world.dataset.tensors(outcome.sample_ids)
    assert torch.equal(candidates.images, images)
    assert torch.equal(candidates.labels, labels)


def test_the_target_is_the_most_observed(federation, caplog: pytest.LogCaptureFixture) -> None:
    config, world, observations, _ = federation
    fewer = [o for o in observations if not (o.client < 2 and o.round == 3)]
    assert membership_experiment(config, world, fewer, Nosy()).target == 2
    assert not caplog.records
    with pytest.raises(NotApplicable, match="no update was observed"):
        membership_experiment(config, world, [], Nosy())
    with pytest.raises(NotApplicable, match="client 9, the target"):
        membership_experiment(config, world, observations, Nosy(), target=9)
    two = [o for o in observations if o.client < 2]
    with pytest.raises(NotApplicable, match="at least 3 are needed"):
        membership_experiment(config, world, two, FedMIA())


def test_few_members_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config, world, observations, _ = ran(protocol="fedsgd", rounds=1, **{"batch-size": 4, "local-steps": 1})
    with caplog.at_level(logging.WARNING, logger="fedattack.seats"):
        outcome = membership_experiment(config, world, observations, FedMIA())
    assert outcome.is_member.sum() == 4
    assert "only 4 members to ask about" in caplog.text


def test_no_non_members_is_an_error() -> None:
    config, world, observations, _ = ran(data__nonmembers=0, rounds=1)
    with pytest.raises(DataError, match=r"data\.nonmembers"):
        membership_experiment(config, world, observations, FedMIA())


# ---------------------------------------------------------------------- unlearning


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_request_is_asked_granted_and_measured() -> None:
    config, world, _, result = ran()
    outcome = unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=2)

    # What client 0 asks for: its largest losses under the final model, as anybody can sort them.
    model = build_model(world.scenario.model)
    model.load_state_dict(result.weights)
    images, labels = world.dataset.tensors(world.partitions[0])
    with torch.no_grad():
        losses = functional.cross_entropy(model(images), labels, reduction="none")
    assert outcome.request.client == 0
    assert list(outcome.request.positions) == sorted(range(len(labels)), key=lambda i: -float(losses[i]))[:12]

    # What the server does: trains again without them, from the start since client 0 was in round 1.
    assert (outcome.mechanism, outcome.resumed_after, outcome.rounds_trained) == ("retrain", 0, 6)
    judge = Judge(config, world)
    retrained = run_federation(config, world, excluded={0: outcome.request.positions}).weights
    floor = run_federation(config, world, excluded={0: outcome.details["random_positions"][0]}).weights
    assert outcome.before[0] == judge(result.weights)["accuracy"] == pytest.approx(result.rounds[-1].accuracy)
    assert outcome.after[0] == judge(retrained)["accuracy"]
    assert outcome.losses["after"][0] == judge(retrained)["loss"]
    assert outcome.random[0] == judge(floor)["accuracy"]
    assert not equal(retrained, result.weights)
    requested = world.partitions[0][sorted(outcome.request.positions)]
    assert outcome.details["requested_loss"]["after"] == judge(retrained, requested)["loss"]

    # Random floors are of the same size, differ between repeats, and the second repeat draws other batches.
    first, second = outcome.details["random_positions"]
    assert len(set(first)) == len(set(second)) == 12
    assert first != second
    assert outcome.losses["before"][0] != outcome.losses["before"][1]
    assert outcome.test_samples == len(world.pools.nonmembers)

    audited = audit_unlearning(
        "unlearn-max-loss",
        outcome.before,
        outcome.after,
        outcome.random,
        requests=len(outcome.request.positions),
        mechanism=outcome.mechanism,
        test_samples=outcome.test_samples,
    )
    assert audited.summary["seeds"] == 2
    assert outcome == unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=2)


def test_resumes_from_the_checkpoint_before_a_late_client() -> None:
    config, world, _, result = ran(participation=0.34, seed=7, rounds=9, unlearning__checkpoint_every=2)
    entry = next(r.round for r in result.rounds if 0 in r.clients)
    assert entry > 3, "choose a seed under which client 0 comes late"
    outcome = unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=1)
    start = (entry - 1) // 2 * 2
    assert (outcome.resumed_after, outcome.rounds_trained) == (start, 9 - start)
    # Plain FedAvg without error feedback carries nothing but the weights, so this is a training from the start.
    whole = run_federation(config, world, excluded={0: outcome.request.positions}).weights
    assert outcome.losses["after"][0] == Judge(config, world)(whole)["loss"]


def test_all_samples_of_a_client_may_go() -> None:
    config, world, _, result = ran(requests=10_000, rounds=2)
    outcome = unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=1)
    assert outcome.drops_out
    assert len(outcome.request.positions) == len(world.partitions[0])
    assert outcome.after == outcome.random


def test_nothing_to_forget_of_a_client_that_never_took_part() -> None:
    config, world, _, result = ran(rounds=1, participation=0.17, seed=1)
    assert result.rounds[0].clients != (0,), "choose a seed under which client 0 is not drawn"
    with pytest.raises(NotApplicable, match="client 0 took part in none of 1 rounds"):
        unlearning_experiment(config, world, result, "unlearn-max-loss")


def test_initial_weights_are_the_checkpoint_of_round_zero() -> None:
    config, world, _, _ = ran(rounds=1)
    kept = unlearning._checkpoint(config, world, 1, None)  # type: ignore[arg-type]
    assert list(kept) == [0]
    assert equal(kept[0], initial_weights(world.scenario.model, config.seed))


class Rebuilder(ReconstructionAttack):
    """Of another family."""

    def run(self, observations, seed, device, progress=no_progress):
        raise AssertionError("not to be run")


def test_refuses_before_the_first_round() -> None:
    def check(name: str, **settings: object) -> None:
        config = Config.from_mapping(BASE | settings)
        attack = Rebuilder() if name == "rebuilder" else build_plugin(ATTACKS.get(name), name, {}, {})
        world = build_world(config)
        applicable({name: attack}, world.scenario, known_facts(config, world))

    check("fedmia")
    check("unlearn-max-loss", clients=1)
    check("rebuilder", clients=1, **{"data.nonmembers": 0})
    with pytest.raises(NotApplicable, match="'fedmia': 3 clients must answer in one round, and 2 of 6"):
        check("fedmia", participation=0.34)
    for name in ("fedmia", "unlearn-max-loss"):
        with pytest.raises(NotApplicable, match=f"{name}.*'data.nonmembers': 0 held-out samples"):
            check(name, **{"data.nonmembers": 0})


def test_an_outcome_can_be_written_down() -> None:
    config, world, _, result = ran(rounds=1)
    outcome = unlearning_experiment(config, world, result, "unlearn-max-loss", repeats=1)
    assert json.loads(json.dumps(asdict(outcome)))["request"]["client"] == 0
