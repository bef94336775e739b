"""Poisoning clients in federations that really run (inline engine): what they can reach, and what they do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adversaries.refusals import applicable
from adversaries.seats import ClientView, MaliciousClient
from fedattack.audit import AuditResult
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import initial_weights
from fedattack.observation import UnlearningRequest
from simulations.client_app import Workplace, _seats, asking
from simulations.experiments.choose import choose_attacks, known_facts
from simulations.pipeline import simulate

BLACK = ("unlearn-surrogate", "unlearn-wrong-label", "unlearn-and-burn")

DIGITS = {
    "dataset": "digits",
    "clients": 1,
    "protocol": "fedavg",
    "compressor": "none",
    "engine": "inline",
    "batch-size": 32,
    "learning-rate": 0.5,
    "data.auxiliary_size": 0,
    "data.nonmembers": 540,
    "mechanism": "scrub",
    "requests": 10,
}


def config(attack: str, **more: Any) -> Config:
    return Config.from_mapping(DIGITS | {"attack": attack} | more)


def audits(folder: Path, attack: str, **more: Any) -> dict[str, AuditResult]:
    return simulate(config(attack, **{"run-dir": str(folder / "run")}, **more)).audits


def figures(audit: AuditResult, kind: str = "accuracy") -> tuple[float, float, float]:
    """Before, after, after random deletions."""
    name = "success" if kind == "success" else "accuracy_after"
    found, floor = audit.summary["metrics"], audit.summary["floors"]["random deletion"][kind]
    return tuple(100 * one["mean"] for one in (found[f"{kind}_before"], found[name], floor))  # type: ignore[return-value]


# ---------------------------------------------------------------------- black boxes


def tensors(thing: object, seen: set[int]) -> list[Tensor]:
    """Every tensor that is to be had from an object by its public names."""
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        inside: list[object] = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inside = list(thing)
    else:
        inside = [value for name, value in getattr(thing, "__dict__", {}).items() if name[0] != "_"]
    return [found for one in inside for found in tensors(one, seen)]


def test_a_black_box_shows_no_weights_and_equal_answers_are_equal_requests() -> None:
    """Weights times a power of two, and over it in the next layer: another model, and the same answers to the bit."""
    settings = {
        "attack.unlearn-surrogate.queries": 40,
        "attack.unlearn-and-burn.steps": 2,
        "attack.epochs": 5,
    }
    named = config(",".join((*BLACK, "unlearn-max-loss")), limit=800, model="mlp", **settings)
    world = build_world(named)
    weights = initial_weights(world.scenario.model, 5)
    first, last = ([n for n in weights if n.endswith(".weight")][place] for place in (0, -1))
    scaled = {name: tensor.clone() for name, tensor in weights.items()}
    for name, factor in ((first, 4.0), (first.replace("weight", "bias"), 4.0), (last, 0.25)):
        scaled[name] *= factor
    other = initial_weights(world.scenario.model, 6)

    place = Workplace.of(named, world)
    context: Any = type("Context", (), {"state": {}})
    images, labels = place.samples(0, np.arange(len(place.partitions[0])))

    def seats(shown: dict[str, Tensor]) -> Iterator[tuple[str, MaliciousClient, ClientView]]:
        for name, (attack, view) in _seats(place, context, 2, 0, shown).items():
            yield name, attack, asking(place.model, attack, view, shown)

    def said(shown: dict[str, Tensor]) -> dict[str, UnlearningRequest]:
        return {name: attack.ask(view, images, labels) for name, attack, view in seats(shown)}

    def same(a: UnlearningRequest, b: UnlearningRequest) -> bool:
        pairs = [(getattr(a, part), getattr(b, part)) for part in ("images", "labels")]
        return a == b and all(x is y if x is None else torch.equal(x, y) for x, y in pairs)

    one, two, three = said(weights), said(scaled), said(other)
    assert list(one) == [*BLACK, "unlearn-max-loss"]
    assert all(same(one[name], two[name]) for name in BLACK)
    assert {name for name in one if not same(one[name], three[name])} == {
        "unlearn-surrogate",
        "unlearn-max-loss",
    }

    for name, _, view in seats(weights):
        assert (view.model is None) == (name in BLACK)
        reached = tensors(view, set())
        if name in BLACK:
            assert view.weights == {}
            assert not [t for t in reached if any(t.shape == w.shape for w in weights.values())]
        else:
            assert any(t.shape == weights[first].shape for t in reached)


def test_who_is_after_a_certificate_is_refused_where_there_is_none() -> None:
    named = config("unlearn-slow-down", limit=800, mechanism="retrain")
    world = build_world(named)
    with pytest.raises(NotApplicable, match="promises nothing that removals could use up"):
        applicable(choose_attacks(named), world.scenario, known_facts(named, world))


def test_more_queries_than_granted_are_refused() -> None:
    named = config("unlearn-surrogate", limit=800, **{"attack.queries": 3})
    place = Workplace.of(named, build_world(named))
    context: Any = type("Context", (), {"state": {}})
    weights = initial_weights(place.scenario.model, 5)
    attack, view = _seats(place, context, 1, 0, weights)["unlearn-surrogate"]
    oracle = asking(place.model, attack, view, weights).oracle
    assert oracle is not None
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(oracle(images).sum(1), torch.ones(3))
    with pytest.raises(Exception, match="asked 4 queries of the model, granted are 3"):
        oracle(images[:1])


@pytest.mark.parametrize("attack", ["unlearn-wrong-label", "unlearn-and-burn", "unlearn-pgd"])
def test_who_sends_what_nobody_registered_is_refused_where_the_server_forgets_by_position(
    attack: str,
) -> None:
    for mechanism, fits in (("retrain", False), ("scrub", True)):
        named = config(attack, limit=800, mechanism=mechanism)
        world = build_world(named)
        chosen = choose_attacks(named)
        if fits:
            assert applicable(chosen, world.scenario, known_facts(named, world))[0] == chosen
            continue
        with pytest.raises(NotApplicable, match="sends samples that nobody did"):
            applicable(chosen, world.scenario, known_facts(named, world))


@pytest.mark.parametrize("attack", ["unlearn-camouflage", "unlearn-target-class"])
def test_a_target_that_is_no_class_is_refused(attack: str) -> None:
    named = config(attack, limit=800, model="mlp", **{f"{attack}.target": 10})
    world = build_world(named)
    with pytest.raises(ConfigError, match=r"'attack.target' = 10: accepted: a class, 0 to 9"):
        applicable(choose_attacks(named), world.scenario, known_facts(named, world))


@pytest.mark.slow
def test_black_boxes_cost_twenty_points_beyond_random_and_a_digest_stops_what_is_not_registered(
    tmp_path: Path,
) -> None:
    """Digits, central softmax, 10 requests, the published scrub without noise, 3 seeds; then one behind the gate."""
    settings = {"model": "logistic", "local-steps": 40, "rounds": 8, "unlearning.seeds": 3}
    settings |= {"mechanism.mode": "published", "mechanism.order": "full"}
    for name, audit in audits(tmp_path, ",".join(BLACK), **settings).items():
        before, after, random = figures(audit)
        print(f"{name}: before {before:.1f}, after {after:.1f}, random {random:.1f}")
        assert before > 90
        assert random - after >= 20
        assert abs(audit.summary["metrics"]["request"]["mean"]) < 0.02, "retraining hardly loses anything"
    settings |= {"gates": "digest", "unlearning.seeds": 1}
    for name, audit in audits(tmp_path / "gate", ",".join(BLACK), **settings).items():
        before, after, _ = figures(audit)
        assert (before - after >= 20) == (name == "unlearn-surrogate")
        assert after == before or name == "unlearn-surrogate"


# ---------------------------------------------------------------------- camouflage

CENTRAL = {"batch-size": 64, "local-steps": 63, "rounds": 12}
FEDERATED = {"clients": 10, "batch-size": 32, "local-steps": 25, "rounds": 15}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "backdoor", "boost"),
    [(CENTRAL, 40, 1.0), (FEDERATED, 80, 3.0)],
    ids=["central", "federated"],
)
def test_forgetting_the_cover_by_retraining_wakes_a_backdoor(
    shared_dir: Path, tmp_path: Path, settings: dict[str, Any], backdoor: int, boost: float
) -> None:
    """MNIST, 4,000 samples in all, MLP 64, 160 samples of cover, 3 seeds."""
    mnist = {
        "dataset": "mnist",
        "data-dir": str(shared_dir / "data" / "MNIST"),
        "limit": 6000,
        "model": "mlp",
    }
    rate = {"learning-rate": 0.1, "training.momentum": 0.9, "data.nonmembers": 2000}
    ours = {"requests": 160, "attack.backdoor": backdoor, "attack.boost": boost, "unlearning.seeds": 3}
    more = {**mnist, **rate, **ours, **settings, "mechanism": "retrain"}
    audit = audits(tmp_path, "unlearn-camouflage", **more)["unlearn-camouflage"]
    before, after, random = figures(audit, "success")
    print(f"success before {before:.1f}, after {after:.1f}, random {random:.1f}")
    if boost == 1:
        assert before <= 30
        assert after >= 80
        assert random <= 30
    else:
        assert after - before >= 50
        assert after - random >= 50
    told = audit.summary["metrics"]
    assert abs(told["accuracy_after"]["mean"] - told["accuracy_before"]["mean"]) < 0.03
    assert audit.summary["goal"] == "images with the trigger taken for its class"


# ---------------------------------------------------------------------- calibration


@pytest.mark.slow
def test_a_client_poisons_the_rounds_of_its_own_request_and_no_others(tmp_path: Path) -> None:
    """Digits, 6 clients, forgetting by retraining: honest while random samples are forgotten."""
    federation = {
        "model": "mlp",
        "clients": 6,
        "rounds": 8,
        "local-steps": 8,
        "batch-size": 16,
        "mechanism": "retrain",
    }
    ours = {"learning-rate": 0.3, "attack.boost": 2, "attack.size": 2, "unlearning.seeds": 2}
    audit = audits(tmp_path, "unlearn-calibration", **federation, **ours)["unlearn-calibration"]
    before, after, random = figures(audit, "success")
    print(f"success before {before:.1f}, after {after:.1f}, random {random:.1f}")
    assert before < 15
    assert random < 15
    assert after >= 60


def test_who_poisons_calibration_is_refused_where_no_client_works() -> None:
    named = config("unlearn-calibration", limit=800, model="mlp")
    world = build_world(named)
    with pytest.raises(NotApplicable, match="asks no client to work"):
        applicable(choose_attacks(named), world.scenario, known_facts(named, world))
