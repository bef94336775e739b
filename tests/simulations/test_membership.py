"""The experiment on membership, on federations that really run (inline engine unless said otherwise)."""

from __future__ import annotations

import gc
import io
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from unreported import audited

from adversaries.membership.base import MembershipAttack, RoundStatistic
from adversaries.membership.updates.fedmia import FedMIA
from fedattack.config import Config
from fedattack.data import World, build_world
from fedattack.errors import ConfigError, DataError, NotApplicable, RunFailed
from fedattack.observation import EVERYONE, Candidates, Observation
from fedattack.storage import RunFolder, load_observations, save_observation
from simulations.engine.federation import FederationResult, run_federation
from simulations.experiments.base import Plan
from simulations.experiments.membership import MembershipExperiment
from simulations.pipeline import attack_folder, simulate
from simulations.progress import Stages, stages

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "clients": 6,
    "rounds": 4,
    "width": 32,
    "protocol": "fedavg",
    "local-steps": 8,
    "batch-size": 16,
    "learning-rate": 0.3,
    "compressor": "none",
    "engine": "inline",
    "candidates": 40,
    "data.auxiliary_size": 0,
    "data.nonmembers": 600,
}
CPU = torch.device("cpu")
Run = tuple[Config, World, list[Observation], FederationResult]


def settings(folder: Path | None = None, **more: object) -> Config:
    named = {n.replace("__", ".") if "__" in n else n.replace("_", "-"): value for n, value in more.items()}
    where = {} if folder is None else {"run-dir": str(folder)}
    return Config.from_mapping(BASE | where | named)


def ran(**more: object) -> Run:
    config = settings(**more)
    world = build_world(config)
    observations: list[Observation] = []
    result = run_federation(config, world, on_observation=observations.append)
    return config, world, observations, result


@pytest.fixture(scope="module")
def partial() -> Run:
    return ran(clients=8, participation=0.6, dropout=0.2, seed=7, rounds=5)


@pytest.fixture
def quiet() -> Any:
    with stages(Console(quiet=True)) as shown:
        yield shown


def printed() -> tuple[Console, Any]:
    stream = io.StringIO()
    return Console(file=stream, width=250), stream.getvalue


def experiment(path: Path, run: Run, shown: Stages, **attacks: MembershipAttack) -> MembershipExperiment:
    """The experiment, shown all rounds of a recorded run."""
    config, world, observations, result = run
    found = MembershipExperiment(Plan(config, world, RunFolder.create(path, config), shown), attacks)
    for record in result.rounds:
        for observation in observations:
            if observation.round == record.round and found.wants(record.round, observation.client):
                found.observe(observation)
        found.after_round(record)
    found.collect()
    return found


def parts(folder: Path, attack: str) -> Mapping[str, Mapping[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in (folder / "parts" / attack).glob("*.safetensors")}


def alike(one: Path, other: Path, attack: str) -> bool:
    here, there = parts(one, attack), parts(other, attack)
    same = {key: {n: torch.equal(t, there[key][n]) for n, t in held.items()} for key, held in here.items()}
    return here.keys() == there.keys() and all(all(names.values()) for names in same.values())


def test_every_target_is_answered_as_from_the_whole_run_at_once(
    partial: Run, tmp_path: Path, quiet: Stages
) -> None:
    """Round by round, and read back from disk."""
    _, _, observations, result = partial
    found = experiment(tmp_path / "run", partial, quiet, fedmia=FedMIA(), loss=FedMIA("loss"))
    candidates = found.questions()["fedmia"]
    audits = found.audit(result)
    seen = {o.client for o in observations}
    for name, attack in found.attacks.items():
        records = audits[name].records
        assert {record["client"] for record in records} == seen
        for target in sorted(seen):
            at_once = attack.run(observations, target, candidates, 0, CPU)
            stored, _ = found.plan.folder.load_scores(name, target)
            torch.testing.assert_close(at_once.scores, stored.scores, atol=1e-12, rtol=0)
    again = experiment(tmp_path / "run", partial, quiet, fedmia=Unasked(), loss=Unasked())
    assert again.audit(result)["fedmia"].records == audits["fedmia"].records


class Unasked(RoundStatistic):
    """Of a run whose figures and scores are all on disk."""

    def watch(self, view, seed):
        raise AssertionError("computed again")

    measure = scores = watch


@dataclass
class Forgetful(RoundStatistic):
    """Keeps weak references to what it was shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shown: list[weakref.ref] = []

    def measure(self, view):
        self.shown += [weakref.ref(o.update.values) for o in view.observations]
        return view.lengths[:, None].expand(-1, len(view.candidates.labels))


def test_no_update_outlives_its_round(tmp_path: Path, quiet: Stages) -> None:
    config = settings(rounds=3)
    world = build_world(config)
    attack = Forgetful()
    plan = Plan(config, world, RunFolder.create(tmp_path / "run", config), quiet)
    found = MembershipExperiment(plan, {"forgetful": attack})
    alive = []

    def after_round(record) -> None:
        found.after_round(record)
        gc.collect()
        alive.append(sum(reference() is not None for reference in attack.shown))

    run_federation(config, world, on_observation=found.observe, on_round=after_round)
    assert len(attack.shown) == 18
    assert max(alive) <= 1  # the strategy's last one


def test_a_killed_run_asks_for_no_round_twice(tmp_path: Path) -> None:
    """Killed after its second round's figures; the rest is computed from the journal and the clients."""
    whole, folder = settings(tmp_path / "whole", attack="fedmia"), tmp_path / "killed"
    audited(whole)

    def killed(config: Config, world: World, **how: Any) -> FederationResult:
        on_round = how.pop("on_round")

        def after(record: Any) -> None:
            on_round(record)
            if record.round == 3:
                raise KeyboardInterrupt

        return run_federation(config, world, on_round=after, **how)

    with pytest.raises(KeyboardInterrupt):
        audited(settings(folder, attack="fedmia"), federate=killed)
    third = folder / "parts/fedmia/round-00003.safetensors"
    third.unlink()  # as if killed while it was being read
    kept = {path: path.stat().st_mtime_ns for path in third.parent.iterdir()}
    assert len(kept) == 2
    audited(settings(folder, attack="fedmia"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert alike(tmp_path / "whole", folder, "fedmia")


def test_scores_of_a_federation_that_ended_early_are_not_those_of_the_whole(tmp_path: Path) -> None:
    def ended(config: Config, world: World, **how: Any) -> FederationResult:
        on_round = how.pop("on_round")

        def after(record: Any) -> None:
            on_round(record)
            if record.round == 2:
                raise RunFailed("the weights diverged")

        return run_federation(config, world, on_round=after, **how)

    short = {"attack": "fedmia", "rounds": 3, "candidates": 40}
    with pytest.raises(RunFailed, match="diverged"):
        simulate(settings(tmp_path / "run", **short), federate=ended)
    assert "client-00000" in parts(tmp_path / "run", "fedmia"), "what was seen until then is told"
    audited(settings(tmp_path / "run", **short))
    audited(settings(tmp_path / "whole", **short))
    assert alike(tmp_path / "run", tmp_path / "whole", "fedmia")


@pytest.mark.slow
@pytest.mark.ray
def test_the_engine_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).resolve().parent
    monkeypatch.setenv("PYTHONPATH", f"{here.parents[1]}{os.pathsep}{here}")  # of Ray's workers
    names = "fedmia,rigged_attacks:Failing,rigged_attacks:AgainstReferences"
    more = {"attack": names, "rounds": 4, "references": 4, "output.cache_dir": ""}
    for engine in ("inline", "ray"):
        cache = {"output.cache_dir": str(tmp_path / f"cache of {engine}")}
        result = simulate(settings(tmp_path / engine, engine=engine, **more | cache))
        assert list(result.audits) == ["fedmia", "rigged_attacks:AgainstReferences"]
        text = "rigged_attacks:Failing failed: ValueError: too odd to read"
        assert text in (tmp_path / engine / "log.txt").read_text()
    for name in ("fedmia", "rigged_attacks_AgainstReferences"):
        assert alike(tmp_path / "inline", tmp_path / "ray", name)


def test_an_attack_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    names = tuple(f"rigged_attacks:{n}" for n in ("Failing", "Silent", "SecondRound", "OfSome"))
    console, text = printed()
    config = settings(tmp_path / "run", rounds=3, attack=("fedmia", *names))
    audits = audited(config, console)
    assert list(audits) == ["fedmia", *names[2:]]
    for line in (
        "rigged_attacks:Failing failed: ValueError: too odd to read",
        "rigged_attacks:Failing: round 1 cannot be read: ValueError: too odd to read",
        "rigged_attacks:SecondRound: round 2 cannot be read: ValueError: the second round is too odd",
        "rigged_attacks:OfSome: not scored about client 4: ValueError: nobody knows client 4",
        "rigged_attacks:OfSome: not scored about client 5: rigged_attacks:OfSome answered scores",
    ):
        assert text().count(line) == 1
    assert "could not answer 'query.answer': KeyError" in (tmp_path / "run/log.txt").read_text()
    told = {record["client"] for record in audits[names[3]].records}
    assert told == {1, 2, 3}
    used = RunFolder.create(tmp_path / "run", config).load_scores(names[2], 1)[0].details["rounds"]
    assert used == [1, 3]
    alone = settings(tmp_path / "alone", rounds=1, attack=names[:1])
    with pytest.raises(RunFailed, match="too odd to read"):
        simulate(alone)


def test_updates_that_are_none_of_this_model_are_left_out(tmp_path: Path, quiet: Stages) -> None:
    """One client's update of another model, one with NaN: the others' figures are as without them."""
    run = ran(rounds=1)
    config, world, observations, result = run
    o = observations[1]
    other = replace(o.update, names=o.update.names[::-1], shapes=o.update.shapes[::-1])
    broken = replace(observations[2].update, values=observations[2].update.values * float("nan"))
    odd = [*observations]
    odd[1], odd[2] = replace(o, update=other), replace(observations[2], update=broken)
    bad = experiment(tmp_path / "odd", (config, world, odd, result), quiet, fedmia=FedMIA())
    good = experiment(
        tmp_path / "good",
        (config, world, [o for o in observations if o.client not in (1, 2)], result),
        quiet,
        fedmia=FedMIA(),
    )
    log = (tmp_path / "odd/log.txt").read_text()
    assert "client 1 is left out of what is read: its update is of another model" in log
    assert "client 2 is left out of what is read: its update holds NaN" in log
    (here,), (there,) = (
        parts(tmp_path / "odd", "fedmia").values(),
        parts(tmp_path / "good", "fedmia").values(),
    )
    assert here["clients"].tolist() == [0, 3, 4, 5]
    assert torch.equal(here["statistic"], there["statistic"])
    told = {record["client"] for record in bad.audit(result)["fedmia"].records}
    assert told == {0, 3, 4, 5}
    assert "not scored about client 1" in (tmp_path / "odd/log.txt").read_text()
    assert good.failed == {}


def test_a_client_is_asked_about_all_others(tmp_path: Path) -> None:
    """Labels without meaning, learnt by heart: the fall of the loss tells who learnt them."""
    more = {"attack": "client-loss", "labels": "random", "limit": 500, "data.nonmembers": 200, "width": 256}
    config = settings(tmp_path / "run", clients=3, rounds=40, local_steps=20, candidates=200, **more)
    result = simulate(config)
    audit = result.audits["client-loss"]
    print(audit.verdict)
    assert {record["client"] for record in audit.records} == {EVERYONE}
    assert audit.summary["metrics"]["auc"]["low"] > 0.7
    members = {p["sample"] for p in audit.records if p["is_member"] and "sample" in p}
    assert not members & set(build_world(config).partitions[0].tolist())


# ---------------------------------------------------------------------- saved observations


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    more = {"save-observations": True, "attack.targets": (0, 2, 3), "data.auxiliary_size": 40}
    audited(settings(folder, attack="fedmia", rounds=3, candidates=60, **more))
    return folder


def test_saved_observations_give_the_same_answers_and_figures(saved: Path, tmp_path: Path) -> None:
    """Another day, under another seed, and with an attack that was not in the run."""
    names = "fedmia,rigged_attacks:AgainstReferences"
    later = settings(tmp_path / "later", attack=names, references=4, seed=5, **{"attack.targets": (0, 2, 3)})
    result = attack_folder(saved, later, truth=saved / "truth")
    assert alike(saved, tmp_path / "later", "fedmia")
    there = audited(Config.from_toml(saved / "config.toml"))["fedmia"].records
    assert [r["score"] for r in result.audits["fedmia"].records] == [r["score"] for r in there]
    assert [r["is_member"] for r in result.audits["fedmia"].records] == [r["is_member"] for r in there]
    assert result.audits["fedmia"].summary["accuracy"] > 0.5
    assert list(result.audits) == names.split(",")
    assert [p.name for p in (tmp_path / "references").iterdir()]


def test_nothing_under_observations_tells_who_is_a_member(saved: Path) -> None:
    """Candidates are pictures and labels in an order of their own; the truth is apart."""
    found = {path.name for path in (saved / "observations").iterdir()}
    public = {name for name in found if name.startswith("auxiliary-")}
    assert found - public == {"candidates.safetensors", "round-0001", "round-0002", "round-0003"}
    assert load_file(saved / "observations/candidates.safetensors").keys() == {"images", "labels"}
    assert {p.name for p in (saved / "truth").iterdir()} == {"membership.json", "membership.safetensors"}
    owner = load_file(saved / "truth/membership.safetensors")["owner"].numpy()
    places = np.flatnonzero(owner >= 0)
    assert len(places) == 180
    assert abs(places.mean() - len(owner) / 2) < 4 * len(owner) / np.sqrt(12 * len(places))


def test_without_truth_nothing_is_scored_and_answers_are_kept(saved: Path, tmp_path: Path) -> None:
    console, text = printed()
    result = attack_folder(saved, settings(tmp_path / "later", attack="fedmia"), console=console)
    assert result.audits == {}
    assert sorted(result.reconstructions["fedmia"]) == [f"client-{c:05d}" for c in range(6)]
    assert "the scores are in parts/" in text()


def test_sums_are_saved_and_attacked_later(tmp_path: Path) -> None:
    more = {"rounds": 2, "attack": "unmix", "data.auxiliary_size": 40}
    hidden = {"defense": "secure-aggregation", "save-observations": True}
    run = audited(settings(tmp_path / "run", **more, **hidden))
    later = attack_folder(
        tmp_path / "run", settings(tmp_path / "later", **more), truth=tmp_path / "run/truth"
    )
    assert "everyone" in parts(tmp_path / "run", "unmix")
    assert alike(tmp_path / "run", tmp_path / "later", "unmix")
    assert later.audits["unmix"].records == run["unmix"].records


def test_what_saved_observations_cannot_do(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client-loss.*needs a running federation"):
        attack_folder(saved, settings(tmp_path / "one", attack="client-loss"))
    with pytest.raises(NotApplicable, match="at least 4 reference models; use --references 4"):
        attack_folder(saved, settings(tmp_path / "two", attack="rigged_attacks:AgainstReferences"))
    for observation in load_observations(saved / "observations", 1):
        save_observation(tmp_path / "bare", observation)
    with pytest.raises(DataError, match="without a membership attack in the run"):
        attack_folder(tmp_path / "bare", settings(tmp_path / "three", attack="fedmia"))
    attack_folder(saved, settings(tmp_path / "five", attack="fedmia"))
    with pytest.raises(ConfigError, match=r"holds attacks on .*saved.*; give another folder"):
        attack_folder(tmp_path / "bare", settings(tmp_path / "five", attack="fedmia"))
    with pytest.raises(DataError, match="no truth to score membership attacks against"):
        attack_folder(saved, settings(tmp_path / "four", attack="fedmia"), truth=tmp_path)


def test_refusals(partial: Run, tmp_path: Path, quiet: Stages) -> None:
    config, world, observations, result = partial
    three = Candidates(*world.dataset.tensors(np.arange(3)))
    with pytest.raises(NotApplicable, match="client 9, the target"):
        FedMIA().run(observations, 9, three, 0, CPU)
    two = [o for o in observations if o.client < 2]
    with pytest.raises(NotApplicable, match="at least 3 are needed"):
        FedMIA().run(two, two[0].client, three, 0, CPU)
    nobody = replace(result, rounds=[replace(record, clients=()) for record in result.rounds])
    found = experiment(tmp_path / "run", (config, world, [], nobody), quiet, fedmia=FedMIA())
    assert found.audit(nobody) == {}
    assert "no update of a client that it is asked about was observed" in str(found.failed["fedmia"])
    with pytest.raises(NotApplicable, match="all clients are malicious"):
        simulate(settings(tmp_path / "other", clients=1, attack="client-loss"))
