"""The audit of membership: targets pooled, floors without a model, whose sample it is, the best of many attacks."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from audit_scenes import scored, targets
from rich.console import Console
from scipy.stats import beta
from sklearn.metrics import roc_auc_score, roc_curve

from fedattack.audit import audit_membership, get_family
from fedattack.audit.membership import Guarantee, Source
from fedattack.audit.membership_floors import blind_baseline, null_control
from fedattack.audit.membership_pool import Pool
from fedattack.audit.selection import best_of
from fedattack.errors import DataError
from fedattack.metrics import Interval, tpr_at_fpr
from fedattack.reporting import figures
from fedattack.reporting.terminal import print_summary

PLAIN = {"shared": False, "unit": 0.0, "offset": 0.0, "spread": 0.0}
CLUSTERED = {"shared": True, "unit": 1.0, "offset": 0.5, "spread": 0.3}


def _asked(shift: float, count: int = 400, client: int = 0, **more):
    rng = np.random.default_rng(7 + client)
    scores = np.concatenate([rng.normal(shift, 1, count), rng.normal(0, 1, count)])
    return scored(scores, np.arange(2 * count) < count, client, first=10_000 * client, **more)


@pytest.mark.parametrize(
    ("shift", "level", "words"),
    [
        (3.0, "leak", "members identified: AUC 0.98"),
        (0.6, "partial", "membership leaks: AUC 0.6"),
        (0.0, "none", "no leakage beyond chance: AUC"),
        (-0.6, "undecided", "run backwards"),
    ],
)
def test_verdicts(shift: float, level: str, words: str) -> None:
    asked = _asked(shift, client=3, rounds=(1, 2, 3, 5), labels=np.arange(800) % 10)
    found = audit_membership("fedmia", [asked], seconds=2.0)
    assert found.level == level
    assert words in found.verdict
    assert found.summary["count"] == 800
    chance = found.summary["floors"]["chance"]["auc"]
    assert chance["low"] < 0.5 < chance["high"]
    tail = found.summary["metrics"]["tpr_at_1_percent_fpr"]
    assert tail["true_positives"] == tpr_at_fpr(asked.scores, asked.is_member, 0.01).true_positives
    assert found.records[401] == {
        "attack": "fedmia",
        "family": "membership",
        "client": 3,
        "sample": 30_401,
        "label": 1,
        "rounds": "1-3 5",
        "score": asked.scores[401],
        "is_member": False,
        "kind": "held out",
    }


def test_a_few_certain_members_are_leakage_at_an_auc_of_chance() -> None:
    asked = _asked(0.0)
    asked.scores[:30] += 20.0
    asked.scores[30:400] -= 0.22  # the rest hidden, so that the AUC stays at chance
    found = audit_membership("fedmia", [asked])
    assert found.summary["metrics"]["auc"]["mean"] == pytest.approx(0.5, abs=0.03)
    assert found.level == "partial"


def test_several_targets_are_pooled_not_averaged() -> None:
    one, two = _asked(0.6, 100), _asked(1.2, 300, client=4)
    two = dataclasses.replace(two, scores=two.scores + 5.0)  # another scale: one threshold has to do
    found = audit_membership("fedmia", [one, two])
    scores, member = np.concatenate([one.scores, two.scores]), np.concatenate([one.is_member, two.is_member])
    area, areas = found.summary["metrics"]["auc"], [roc_auc_score(t.is_member, t.scores) for t in (one, two)]
    assert area["mean"] == pytest.approx(roc_auc_score(member, scores))
    assert (area["worst"], area["best"]) == pytest.approx(tuple(sorted(areas)))
    assert area["clients_mean"] == pytest.approx(np.mean(areas))
    assert area["clients_sd"] == pytest.approx(np.std(areas, ddof=1))
    fpr, tpr, _ = roc_curve(member, scores)
    for name, share in (("tpr_at_1_percent_fpr", 0.01), ("tpr_at_0.1_percent_fpr", 0.001)):
        point = found.summary["metrics"][name]
        assert point["mean"] == pytest.approx(tpr[fpr <= share][-1])
        assert (point["members"], point["nonmembers"]) == (400, 400)
    assert found.curves["roc"]["members"] == 400
    beside = get_family("membership").beside(found)
    assert beside[0].startswith(f"client by client: AUC {min(areas):.3f} to {max(areas):.3f}, mean")
    with pytest.raises(DataError, match="one of each"):
        audit_membership("x", [one, scored([0.0, 1.0], [True, True])])
    with pytest.raises(DataError, match="one per candidate"):
        audit_membership("x", [dataclasses.replace(one, samples=one.samples[1:])])


def test_held_out_and_other_clients_members_are_told_apart() -> None:
    asked = _asked(1.0, 100)
    others = np.arange(200) >= 150
    asked = dataclasses.replace(asked, others=others, scores=asked.scores + 0.8 * others)
    metrics = audit_membership("a", [asked]).summary["metrics"]
    for name, kept in (("auc_held_out", ~others), ("auc_others", others | asked.is_member)):
        expected = roc_auc_score(asked.is_member[kept], asked.scores[kept])
        assert metrics[name]["mean"] == pytest.approx(expected)
        assert metrics[name]["low"] < expected < metrics[name]["high"]
    assert "auc_others" not in audit_membership("a", [_asked(1.0)]).summary["metrics"]


def test_a_held_out_sample_that_all_targets_share_is_not_many() -> None:
    """Ten targets, no effect, and the same held-out samples, each with a mean of its own: no leak is found."""
    design = {"shared": True, "unit": 3.0, "offset": 0.0, "spread": 0.0}
    levels = [audit_membership("a", targets(10, 40, 0.0, seed=seed, **design)).level for seed in range(25)]
    assert levels.count("partial") + levels.count("leak") <= 2


@pytest.mark.parametrize(("clients", "design"), [(1, PLAIN), (10, PLAIN), (10, CLUSTERED), (100, CLUSTERED)])
def test_the_null_control_holds_chance_as_often_as_it_says(clients: int, design: dict) -> None:
    count = 200 if clients == 1 else 40
    pools = (Pool.of(targets(clients, count, 1.0, seed=seed, **design)) for seed in range(100))
    found = [null_control(pool, seed) for seed, pool in enumerate(pools)]
    for name in ("members", "non-members"):
        held = sum(one[name].low <= 0.5 <= one[name].high for one in found)
        print(f"{clients} clients, {design}, {name}: {held} of 100")
        assert 90 <= held <= 99


def test_the_null_control_splits_people() -> None:
    asked = targets(1, 60, 0.5, seed=0, **PLAIN)[0]
    people = dataclasses.replace(asked, groups=np.arange(120) // 4, scores=np.arange(120.0) // 4)
    found = null_control(Pool.of([people]), 0)
    # 15 people of four samples each: as wide as for 15 samples.
    alone = null_control(Pool.of([dataclasses.replace(asked, groups=None)]), 0)
    assert found["members"].high - found["members"].low > 1.7 * (alone["members"].high - alone["members"].low)


def _pixels(shift: float, seed: int, members: set[int]):
    def images(ids: np.ndarray) -> torch.Tensor:
        noise = np.random.default_rng(seed).normal(0.5, 0.1, (len(ids), 1, 8, 8))
        return torch.from_numpy(noise + shift * np.isin(ids, list(members))[:, None, None, None])

    return images


@pytest.mark.parametrize("clients", [1, 4])
def test_pixels_alone_tell_candidates_that_differ(clients: int) -> None:
    asked = targets(clients, 100, 0.0, seed=1, **(PLAIN | {"shared": True}))
    members = {int(i) for one in asked for i in one.samples[one.is_member]}
    told = blind_baseline(asked, _pixels(0.05, 0, members), 0)
    assert told is not None
    assert told.low > 0.6
    withheld = audit_membership(
        "a", [dataclasses.replace(one, scores=one.scores + 9 * one.is_member) for one in asked], blind=told
    )
    assert withheld.level == "undecided"
    assert (
        "the candidates differ: pixels alone, without any model, tell members by an AUC of"
        in withheld.verdict
    )
    assert withheld.summary["floors"]["pixels alone"]["auc"]["low"] == told.low
    runs = 60 // clients
    found = [blind_baseline(asked, _pixels(0.0, seed, set()), seed) for seed in range(runs)]
    assert sum(one.low <= 0.5 for one in found) >= runs - 2
    people = [dataclasses.replace(one, groups=one.samples % 100) for one in asked]  # each of both kinds
    assert blind_baseline(people, _pixels(0.05, 0, members), 0).low > 0.6
    assert blind_baseline([scored(np.arange(12.0), np.arange(12) > 5)], _pixels(0.0, 0, set()), 0) is None


def test_pixels_alone_tell_one_target_from_the_others() -> None:
    """Each client's members have a mark of their own, which no classifier of all clients together can use."""
    asked = [_asked(0.0, 60, client, others=np.arange(120) >= 60) for client in range(4)]

    def images(ids: np.ndarray) -> torch.Tensor:
        pixels = np.random.default_rng(0).normal(0.5, 0.1, (len(ids), 8, 8))
        for row, sample in zip(pixels, ids, strict=True):
            own = sample // 10_000
            row[own] += 0.1 if sample % 10_000 < 60 else 0.0
            row[(own + 1) % 4] += 0.0 if sample % 10_000 < 60 else 0.1
        return torch.from_numpy(pixels)

    assert blind_baseline(asked, images, 0).low > 0.6


def test_the_right_client_first() -> None:
    rng = np.random.default_rng(0)
    owner, names = np.repeat([0, 2, 5], 30), np.array([0, 2, 5])
    scores = rng.normal(size=(3, 90)) + 1.0 * (names[:, None] == owner)
    scores[:, 7] = 1.0  # a tie names nobody
    asked = [_asked(0.5, 30, client) for client in names]
    found = audit_membership("a", asked, source=Source(names, scores, owner))
    right = [names[scores[:, i].argmax()] == owner[i] and len({*scores[:, i]}) == 3 for i in range(90)]
    metric = found.summary["metrics"]["right_client"]
    assert (metric["right"], metric["of"]) == (sum(right), 90)
    assert metric["mean"] == pytest.approx(np.mean(right))
    assert metric["low"] < metric["mean"] < metric["high"]
    assert found.summary["floors"]["chance"]["right_client"]["mean"] == pytest.approx(1 / 3)
    assert f"right client first: {sum(right)} of 90 members" in " ".join(
        get_family("membership").beside(found)
    )


def test_no_leak_is_claimed_where_the_right_client_can_be_told() -> None:
    names, owner = np.arange(4), np.repeat(np.arange(4), 100)
    asked = [_asked(0.0, 400, client) for client in names]
    blind = np.random.default_rng(0).normal(size=(4, 400))
    assert audit_membership("a", asked, source=Source(names, blind, owner)).level == "none"
    told = audit_membership("a", asked, source=Source(names, blind + (names[:, None] == owner), owner))
    assert told.level == "undecided"
    assert "yet whose a member is can be told: the right client comes first for" in told.verdict


def test_the_best_of_many_attacks_that_know_nothing_is_at_chance() -> None:
    naive, held, means = [], 0, []
    for seed in range(25):
        rng, first = np.random.default_rng(seed), Pool.of(targets(2, 60, 0.0, seed=seed, **PLAIN))
        pools = {str(i): dataclasses.replace(first, scores=rng.normal(size=240)) for i in range(12)}
        naive.append(max(pool.auc().mean for pool in pools.values()))
        found = best_of(pools, seed)
        means.append(found.auc.mean)
        held += found.auc.low <= 0.5 <= found.auc.high
    print(f"largest of 12: {np.mean(naive):.3f}; corrected {np.mean(means):.3f}, holds 0.5 in {held} of 25")
    assert np.mean(naive) > 0.55
    assert np.mean(means) == pytest.approx(0.5, abs=0.015)
    assert held >= 23


def test_the_best_of_many_is_told_where_two_were_asked_the_same() -> None:
    weak = audit_membership("weak", [_asked(0.2)])
    strong = audit_membership("strong", [_asked(1.0)])
    other = audit_membership("other", [_asked(0.5, client=1)])
    family = get_family("membership")
    (best,) = family.together([weak, strong, other])["best"]
    assert best["attacks"] == ["weak", "strong"]
    assert best["chosen"] == {"strong": 20}
    assert best["auc"]["mean"] == pytest.approx(strong.summary["metrics"]["auc"]["mean"], abs=0.005)
    assert family.together([weak, other]) is None
    both = family.together([weak, other, strong, dataclasses.replace(other, attack="another")])
    assert [one["attacks"] for one in both["best"]] == [["weak", "strong"], ["other", "another"]]
    console = Console(width=80, file=io.StringIO())
    print_summary(console, [weak, strong])
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "best of 2 attacks (weak, strong)" in " ".join(text.split())
    assert "warning: with 400 non-members, 0.1 % means no false positive at all" in " ".join(text.split())


def test_what_the_noise_allows_stands_beside_what_was_found() -> None:
    bound = audit_membership("a", [_asked(0.6)], guarantee=Guarantee(2.0, 1e-5, "sample", 3))
    allowed = bound.summary["allowed"]
    assert allowed["tpr_at_1_percent_fpr"] == pytest.approx(np.exp(2) * 0.01 + 1e-5)
    assert allowed["auc"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-4)
    assert (
        "what the accounted epsilon allows (2 at delta 1e-05 for one sample there or zero (zero-out), client 3)"
        in " ".join(get_family("membership").beside(bound))
    )
    assert not any("accounting" in one for one in bound.summary["warnings"])
    whole = audit_membership("a", [_asked(0.6)], guarantee=Guarantee(1.0, 0.0, "client", 0)).summary[
        "allowed"
    ]
    assert whole["auc"] == pytest.approx(
        1 / (1 + np.exp(-2))
    )  # one sample's change is two steps from nothing
    broken = audit_membership("a", [_asked(2.0)], guarantee=Guarantee(0.1, 1e-5, "sample", 3))
    assert any("above what the accounted epsilon allows" in one for one in broken.summary["warnings"])
    nothing = audit_membership("a", [_asked(0.6)], guarantee=Guarantee(20.0, 1e-5, "sample", 0))
    assert "client 0): everything; found" in " ".join(get_family("membership").beside(nothing))


def test_warnings_say_what_the_candidates_call_for() -> None:
    few = audit_membership("a", [_asked(0.5, 12)], warnings=["of the run"]).summary["warnings"]
    assert few[0] == "of the run"
    assert "only 12 members of client 0 to ask about: chance spreads widely" in few
    many = audit_membership("a", [_asked(0.5, 1000)], blind=Interval(0.5, 0.46, 0.54, 2000)).summary[
        "warnings"
    ]
    assert not any("false positive" in one or "only" in one or "pixels" in one for one in many)


def test_the_most_exposed_are_shown() -> None:
    grey = torch.arange(200)[:, None, None, None].expand(-1, 1, 4, 4) / 200
    asked = _asked(1.0, 100, labels=np.arange(200) % 10)
    found = audit_membership("a", [asked], images=lambda ids: grey[ids])
    top = np.argsort(-asked.scores[:100])[:8]
    assert [row["sample"] for row in found.summary["exposed"]] == top.tolist()
    weak = dataclasses.replace(
        audit_membership("b", [_asked(0.1, 100)], images=lambda ids: grey[ids]), attack="b"
    )
    axes = figures.exposed([weak, found], limit=1).axes[0]
    assert len(axes.images) == 16
    assert axes.images[0].get_array()[0, 0, 0] == round(top[0] / 200 * 255)
    assert axes.texts[0].get_text() == "a:\nmembers"
    assert f"label {top[0] % 10}, {asked.scores[top[0]]:.3g}" in [text.get_text() for text in axes.texts]
    assert figures.exposed([audit_membership("a", [asked])]) is None


def test_exposure_person_by_person() -> None:
    """Person 0 of the members scores highest; of those nobody trained on, person 10 does, and is the floor."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 20)
    scores = rng.normal(size=400) + 5.0 * (groups == 0) + 2.0 * (groups == 10)
    found = audit_membership("a", [scored(scores, np.arange(400) < 200, groups=groups)])
    people = found.summary["people"]
    bar = np.sort(scores[200:])[::-1][20]
    for name, first in (("members", 0), ("non-members", 10)):
        rows = people[name]
        assert rows[0]["group"] == first
        assert sorted(row["group"] for row in rows) == list(range(first, first + 10))
        for row in rows:
            called = int((scores[groups == row["group"]] > bar).sum())
            low = beta.ppf(0.025, called, 21 - called) if called else 0.0
            assert (row["found"], row["of"]) == (called, 20)
            assert row["low"] == pytest.approx(low)
    axes = figures.exposed_people([found], limit=4).axes
    assert [axis.texts[0].get_text() for axis in axes] == [
        "20 of 20",
        f"{people['non-members'][0]['found']} of 20",
    ]
    assert any("for 1 of 10 people trained on" in one for one in get_family("membership").beside(found))
    assert audit_membership("a", [_asked(1.0)]).summary["people"] is None


def test_the_left_end_of_a_roc_curve_needs_fifty_negatives() -> None:
    found = [audit_membership("a", [_asked(1.0, count)]) for count in (49, 50)]
    assert [len(figures.roc([one]).axes) for one in found] == [1, 2]
    eight = figures.roc([dataclasses.replace(found[1], attack=str(i)) for i in range(8)])
    assert len({(line.get_color(), line.get_linestyle()) for line in eight.axes[0].lines}) == 9
