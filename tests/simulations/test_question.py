"""What the attacks of a run are asked: who is a member, who stands beside whom, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import BadRequest, DataError, NotApplicable
from fedattack.models import build_model
from fedattack.observation import EVERYONE, Auxiliary, MembershipScores, Observation
from simulations.client_app import round_batches
from simulations.engine.federation import run_federation
from simulations.experiments.question import (
    HELD_OUT,
    Question,
    check_question,
    choose_question,
    expected_rounds,
    per_unit,
)
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
PEOPLE = {
    "dataset": "rigged_people:hands",
    "attack.unit": "group",
    "data.nonmember_unit": "group",
    "data.nonmembers": 20,
    "data.withheld": 0.4,
    "data.auxiliary_size": 300,
    "partition": "natural",
    "partition.groups_per_client": 2,
    "clients": 10,
    "candidates": 10,
}


def settings(**more: object) -> Config:
    return Config.from_mapping(BASE | {name.replace("__", "."): value for name, value in more.items()})


def of_people(**more: object) -> Config:
    return settings(**(PEOPLE | {name.replace("__", "."): value for name, value in more.items()}))


def kept(question: Question, config: Config, world: World, rounds: dict[int, list[int]], target: int) -> Any:
    """Keys of members, of non-members, and of those of them that are others' members, as sets."""
    asked, _ = question.settle(config, world, rounds, target)
    keys = question.key[asked.places]
    assert len(set(keys.tolist())) == len(keys)
    sides = keys[asked.is_member], keys[~asked.is_member], keys[asked.others]
    return [set(side.tolist()) for side in sides]


def test_candidates_are_what_they_are_said_to_be() -> None:
    """One round of two batches of 16: only those samples are members, not the rest of the partition."""
    config = settings(**{"local-steps": 2, "rounds": 1})
    world = build_world(config)
    observations: list[Observation] = []
    run_federation(config, world, on_observation=observations.append)
    question = choose_question(config, world, [3], {3: [1]})
    asked, details = question.settle(config, world, {3: [1]}, 3)
    ids = question.ids
    assert details["members_used"] == asked.is_member.sum() == 32
    assert asked.places.tolist() == list(range(64))
    assert len(set(ids.tolist())) == len(ids) == 64
    members = set(ids[asked.is_member])
    assert members <= set(world.partitions[3])
    assert set(ids[~asked.is_member]) <= set(world.pools.nonmembers)
    assert 20 < np.flatnonzero(asked.is_member).mean() < 43  # shuffled
    assert details["matched_label"] == 1.0
    labels = world.dataset.labels[ids]
    assert sorted(labels[asked.is_member]) == sorted(labels[~asked.is_member])
    assert np.array_equal(ids, choose_question(config, world, [3], {3: [1]}).ids)
    assert question.candidates(world).groups is None

    # The samples said to be used are those behind the update: they alone explain it, to rounding.
    o = next(o for o in observations if o.client == 3)
    weights = {n: t.clone() for n, t in o.weights.items()}
    model = build_model(world.scenario.model)
    for batch in round_batches(config, len(world.partitions[3]), 1, 3):
        assert set(world.partitions[3][batch]) <= members
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
    asked, details = choose_question(config, world, [0], {0: [1]}).settle(config, world, {0: [1]}, 0)
    assert 20 <= asked.is_member.sum() == (~asked.is_member).sum()
    assert details["matched_label"] == 1.0

    # Where there are none of them, few others fill up, and the log says so.
    labels = world.dataset.labels
    of_others = [i for i in world.pools.nonmembers if labels[i] not in set(labels[world.partitions[0]])]
    poorer = replace(world, pools=replace(world.pools, nonmembers=np.array(of_others)))
    question = choose_question(config, poorer, [0], {0: [1]})
    asked, details = question.settle(config, poorer, {0: [1]}, 0)
    assert asked.is_member.sum() == 20
    assert (question.owner == 0).sum() > 20  # those without a partner stay in the list
    assert details["matched_label"] == 0
    assert "of anybody only 0.0 % of the non-members have the label of a member" in caplog.text


def test_pairs_whose_member_was_not_trained_on_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    """Chosen for rounds 1 and 2, of which only round 2 was seen."""
    config = settings(rounds=2, **{"local-steps": 2})
    world = build_world(config)
    question = choose_question(config, world, [1], {1: [1, 2]})
    members, nonmembers, _ = kept(question, config, world, {1: [2]}, 1)
    partition = world.partitions[1]
    used = set(partition[np.concatenate(round_batches(config, len(partition), 2, 1))])
    everybody = set(question.key[question.owner == 1].tolist())
    assert members == everybody & used < everybody
    assert len(nonmembers) == len(members)
    with pytest.raises(NotApplicable, match="client 1 has no member in the list that was trained on"):
        question.settle(config, world, {1: []}, 1)
    few = settings(rounds=1, **{"local-steps": 1, "batch-size": 4})
    choose_question(few, world, [1], {1: [1]})
    assert "only 4 members to ask about" in caplog.text


def test_who_answers_when_is_known_before_the_first_round(caplog: pytest.LogCaptureFixture) -> None:
    config = settings(clients=8, participation=0.4, dropout=0.3, seed=7, rounds=3)
    world = build_world(config)
    observations: list[Observation] = []
    run_federation(config, world, on_observation=observations.append)
    seen = {c: sorted(o.round for o in observations if o.client == c) for c in range(8)}
    expected = expected_rounds(config, world)
    assert expected == {c: rounds for c, rounds in seen.items() if rounds}
    absent = [c for c in range(8) if not seen[c]]
    assert absent
    question = choose_question(config, world, range(8), expected)
    assert question.targets == tuple(sorted(expected))
    assert f"no target, for they answer in no round: clients {absent}" in caplog.text
    with pytest.raises(NotApplicable, match="takes part in the rounds asked about"):
        choose_question(config, world, absent, expected)


@pytest.mark.parametrize("negatives", ["held-out", "others", "both"])
def test_members_stand_beside_held_out_samples_or_other_clients_members(negatives: str) -> None:
    config = settings(attack__negatives=negatives, attack__others=30, candidates=40, data__nonmembers=200)
    world = build_world(config)
    every = {c: [*range(1, 7)] for c in range(6)}
    question = choose_question(config, world, [0, 1, 4], every, others=[2, 3, 5])
    owners = Counter(question.owner.tolist())
    assert {c: owners[c] for c in range(6)} == {0: 40, 1: 40, 2: 30, 3: 30, 4: 40, 5: 30}
    held_out = set(world.pools.nonmembers.tolist())
    for target in (0, 1, 4):
        members, nonmembers, others = kept(question, config, world, {target: every[target]}, target)
        mine = set(world.partitions[target].tolist())
        assert members <= mine
        assert not nonmembers & mine
        assert nonmembers - others <= held_out
        assert not others & held_out
        assert bool(others) == (negatives != "held-out")
        assert bool(nonmembers - others) == (negatives != "others")
        labels = world.dataset.labels
        for side in filter(len, (others, nonmembers - others)):
            # As many of a label as there are members of it, while they last.
            least = Counter(labels[list(side)].tolist()) & Counter(labels[list(members)].tolist())
            assert least.total() == len(side) >= 30
    _, nonmembers, others = kept(question, config, world, {c: every[c] for c in (0, 1, 4)}, EVERYONE)
    assert not others
    assert nonmembers <= held_out


def test_a_held_out_sample_serves_several_targets_and_once_each() -> None:
    config = settings(candidates=60, data__nonmembers=80)
    world = build_world(config)
    every = {c: [*range(1, 7)] for c in range(6)}
    question = choose_question(config, world, range(6), every)
    sides = [kept(question, config, world, {c: every[c]}, c)[1] for c in range(6)]
    assert all(len(side) > 45 for side in sides)
    assert len(set().union(*sides)) <= 80 < sum(map(len, sides))
    assert sum(question.owner == HELD_OUT) <= 80


def test_members_of_armed_rounds_come_first() -> None:
    """One attack reads round 2 alone, the others all: each has members that count."""
    config = settings(rounds=4, candidates=24, **{"local-steps": 1})
    world = build_world(config)
    every, armed = (dict.fromkeys(range(6), rounds) for rounds in ([1, 2, 3, 4], [2]))
    question = choose_question(config, world, range(6), every, armed)
    for client in range(6):
        assert len(kept(question, config, world, {client: [2]}, client)[0]) == 16
        assert len(kept(question, config, world, {client: [1, 2, 3, 4]}, client)[0]) == 24
    # Client 5 is away in the armed round, and is asked about by the others.
    question = choose_question(config, world, range(6), every, {c: [2] for c in range(5)})
    assert len(kept(question, config, world, {5: [1, 2, 3, 4]}, 5)[0]) == 24


def test_a_picture_that_two_have_is_not_asked_about() -> None:
    config = settings(rounds=1, attack__negatives="both")
    world = build_world(config)
    images = world.dataset.images.copy()
    images[world.partitions[0]] = images[world.partitions[1][: len(world.partitions[0])]]
    twins = replace(world, dataset=replace(world.dataset, images=images))
    question = choose_question(config, twins, range(3), {c: [1] for c in range(3)})
    assert set(question.owner.tolist()) <= {1, 2, HELD_OUT}
    assert (question.owner == 1).sum() <= len(world.partitions[1]) - len(world.partitions[0])


def test_people_are_asked_about_by_samples_that_nobody_trained_on() -> None:
    config = of_people()
    world = build_world(config)
    every = {c: [*range(1, 7)] for c in range(10)}
    question = choose_question(config, world, range(10), every)
    check_question(config, world)
    groups = world.dataset.groups
    candidates = question.candidates(world)
    dealt = np.concatenate(world.partitions)
    assert not set(question.ids) & set(dealt)
    assert not set(groups[question.ids]) & set(world.auxiliary.groups.tolist())
    assert np.array_equal(groups[question.ids], question.key[question.unit])
    assert np.array_equal(groups[question.samples], question.key)
    assert torch.equal(candidates.groups, torch.from_numpy(question.unit))
    for client, ids in enumerate(world.partitions):
        members, nonmembers, others = kept(question, config, world, {client: every[client]}, client)
        assert members == set(groups[ids].tolist())
        assert len(members) == len(nonmembers) == 2
        assert not others
        assert not nonmembers & set(groups[dealt].tolist())
    assert len(question.key) == 40
    assert kept(question, config, world, every, EVERYONE)[0] == set(groups[dealt].tolist())
    # The same share of everybody's samples, so that no mean is over more of them.
    counts = np.bincount(question.unit)
    whole = np.array([(groups == key).sum() for key in question.key])
    np.testing.assert_array_equal(counts, np.round(0.4 * whole))
    scores = np.random.default_rng(0).normal(size=len(question.ids))
    means = [scores[groups[question.ids] == key].mean() for key in question.key]
    answer = MembershipScores(torch.from_numpy(scores), "any", {"rounds": [1]})
    np.testing.assert_allclose(per_unit(answer, question.groups).scores, means, atol=1e-12)
    assert per_unit(answer, None) is answer

    both = choose_question(of_people(attack__negatives="both"), world, range(10), every)
    for client, ids in enumerate(world.partitions):
        _, nonmembers, others = kept(both, config, world, {client: every[client]}, client)
        assert len(nonmembers) == 4
        assert len(others) == 2
        assert others <= set(groups[dealt].tolist()) - set(groups[ids].tolist())


def test_people_stand_beside_people_whose_labels_are_distributed_alike() -> None:
    """Held out are one who writes no 0, and, of the client's person's kind, one who writes nothing else."""
    config = of_people(data__nonmembers=2, clients=1, partition__groups_per_client=1, rounds=1)
    world = build_world(config)
    one, other = np.unique(world.dataset.groups[world.pools.nonmembers])
    labels = world.dataset.labels.copy()
    labels[world.dataset.groups == one] = 1 + np.arange((world.dataset.groups == one).sum()) % 9
    labels[world.dataset.groups == other] = 0
    labels[world.pools.withheld] = 0
    skewed = replace(world, dataset=replace(world.dataset, labels=labels))
    question = choose_question(config, skewed, [0], {0: [1]})
    _, nonmembers, _ = kept(question, config, skewed, {0: [1]}, 0)
    assert nonmembers == {other}


@pytest.mark.parametrize("name", ["hands", "alike"])
def test_people_are_recognised_by_their_hand_and_by_nothing_else(name: str, tmp_path: Any) -> None:
    """The same federation where everybody has a stroke of their own, and where nobody has."""
    config = of_people(
        dataset=f"rigged_people:{name}",
        attack="person-client",
        clients=20,
        partition__groups_per_client=1,
        candidates=1,
        rounds=5,
        training__learning_rate=0.2,
        **{"run-dir": str(tmp_path / "run")},
    )
    records = simulate(config).audits["person-client"].records
    scores = np.array([record["score"] for record in records])
    truth = np.array([record["is_member"] for record in records])
    assert truth.sum() == 20
    # Each client's own person beside one stranger: how often the own one stands above.
    above = [
        scores[k][truth[k]][0] > scores[k][~truth[k]][0]
        for k in (np.array([r["client"] == c for r in records]) for c in range(20))
    ]
    assert (sum(above) >= 18) if name == "hands" else (4 <= sum(above) <= 16)


REFUSED: tuple[tuple[dict[str, object], str], ...] = (
    ({"attack.targets": "0,6"}, "'attack.targets' names client 6; accepted: 0 to 5, each once"),
    ({"attack.targets": "3,3"}, "'attack.targets' names client 3 twice"),
    ({"attack.targets": ()}, "'attack.targets' names no client"),
    ({"attack.unit": "group"}, "'attack.unit' = 'group': this data set does not say whose a sample is"),
    (PEOPLE | {"data.nonmember_unit": "sample"}, "'data.nonmember_unit' = 'sample': people are asked about"),
    (PEOPLE | {"data.withheld": 0}, "'data.withheld' = 0: people are asked about"),
    (PEOPLE | {"partition": "iid"}, "'partition.name' = 'iid' spreads 30 of 30 people over several clients"),
)


@pytest.mark.parametrize(("more", "sentence"), REFUSED)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(
    more: dict[str, object], sentence: str, tmp_path: Any
) -> None:
    config = Config.from_mapping(BASE | more | {"attack": "fedmia", "run-dir": str(tmp_path / "run")})
    with pytest.raises(BadRequest) as refusal:
        simulate(config)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_overlaps_are_refused() -> None:
    config = settings(rounds=1)
    world = build_world(config)
    pools, parts, images = world.pools, world.partitions, world.dataset.images.copy()

    def chosen(**changed: object) -> Question:
        return choose_question(config, replace(world, **changed), [0], {0: [1]})

    with pytest.raises(DataError, match=r"no non-member is held out; raise setting 'data\.nonmembers'"):
        chosen(pools=replace(pools, nonmembers=pools.nonmembers[:0]))
    with pytest.raises(DataError, match=f"sample {parts[1][0]} is dealt out twice"):
        chosen(partitions=(np.append(parts[0], parts[1][0]), *parts[1:]))
    both = pools.nonmembers[7]
    images[parts[2][3]] = images[both]
    with pytest.raises(DataError, match=rf"non-member {both} is also at a client \(1 such\)"):
        chosen(dataset=replace(world.dataset, images=images))
    for ids in (parts[4][:1], pools.nonmembers[:1]):
        public = Auxiliary(*world.dataset.tensors(ids))
        with pytest.raises(DataError, match="public image 0 is also a client's or a non-member"):
            chosen(auxiliary=public)
    alone = settings(rounds=1, attack__negatives="others")
    with pytest.raises(NotApplicable, match=r"no member stands beside a non-member.*'others'"):
        choose_question(alone, world, [0], {0: [1]})
