"""Reference models: who is trained on what, that they are a client's, and that none is trained twice."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional
from unreported import audited

from adversaries.membership.knowledge import Knowledge
from fedattack.audit import AuditResult
from fedattack.config import Config
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Candidates, Scenario
from fedattack.rng import adversary_seed
from fedattack.storage import RunFolder
from fedattack.training import batch_positions
from simulations.experiments import references
from simulations.experiments.references import Recipe, Trained, TrainedReferences, known_samples
from simulations.pipeline import simulate

BASE = {
    "dataset": "digits",
    "model": "mlp",
    "width": 32,
    "clients": 3,
    "rounds": 2,
    "protocol": "fedavg",
    "local-steps": 4,
    "batch-size": 16,
    "learning-rate": 0.1,
    "compressor": "none",
    "engine": "inline",
    "candidates": 30,
    "data.auxiliary_size": 50,
    "data.nonmembers": 100,
    "attack": "rigged_attacks:AgainstReferences",
    "references": 6,
    "federation.evaluate": False,
}
CPU = torch.device("cpu")


def settings(folder: Path, **more: object) -> Config:
    return Config.from_mapping(BASE | {"run-dir": str(folder)} | more)


def ran(folder: Path, **more: object) -> tuple[dict[str, AuditResult], str]:
    """A run's audits, and what it printed."""
    stream = io.StringIO()
    found = audited(settings(folder, **more), Console(file=stream, width=250))
    return found, stream.getvalue()


def reported(folder: Path, **more: object) -> str:
    """What a whole run printed."""
    stream = io.StringIO()
    simulate(settings(folder, **more), console=Console(file=stream, width=250))
    return stream.getvalue()


def knowledge(public: int = 9) -> Knowledge:
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> Candidates:
        images = torch.rand(count, 1, 8, 8, generator=generator)
        return Candidates(images, torch.randint(10, (count,), generator=generator))

    return Knowledge(some(21), some(public) if public else None)


def recipe(**training: Any) -> Recipe:
    config = Config.from_mapping({"model": "mlp", "classes": 10, "width": 8, "learning-rate": 0.1} | training)
    model = config.model.model_copy(update={"channels": 1, "image_size": 8, "activation": "relu"})
    scenario = Scenario(model, config.training, config.compression)
    return Recipe(scenario, 3, adversary_seed(0, "references"))


def test_pairs_are_complementary_halves_and_people_are_dealt_whole() -> None:
    made, samples = recipe(), known_samples(knowledge())
    halves = np.stack([made.trained_on(index, samples) for index in range(16)])
    assert np.array_equal(halves[::2], ~halves[1::2])
    assert (halves.sum(0) == 8).all()
    assert (halves[::2].sum(1) == 15).all()
    assert len({half.tobytes() for half in halves}) == 16
    known = knowledge()
    people = Candidates(known.candidates.images, known.candidates.labels, torch.arange(21) // 3 + 40)
    joined = known_samples(Knowledge(people, known.public))
    assert joined.groups.unique().tolist() == list(range(7 + 9))
    for index in range(4):
        dealt = made.trained_on(index, joined)[:21].reshape(7, 3)
        assert (dealt.all(1) == dealt.any(1)).all()


@pytest.mark.parametrize("protocol", ["fedavg", "fedsgd"])
def test_a_reference_is_a_federation_of_one_client(protocol: str) -> None:
    """torch's own optimiser on the same batches gives the same answers; its momentum begins anew in each round."""
    more = (
        {"training.momentum": 0.9, "training.weight_decay": 0.01, "local-steps": 3}
        if protocol == "fedavg"
        else {}
    )
    made, samples = recipe(protocol=protocol, **{"batch-size": 4}, **more), known_samples(knowledge())
    training, index = made.scenario.training, 3
    own = np.flatnonzero(made.trained_on(index, samples))
    model = build_model(made.scenario.model)
    model.load_state_dict(initial_weights(made.scenario.model, adversary_seed(made.seed, "weights", index)))
    for number in (1, 2, 3):
        optimiser = torch.optim.SGD(
            model.parameters(),
            training.learning_rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
        for batch in batch_positions(len(own), training, made.seed, number, index):
            optimiser.zero_grad()
            functional.cross_entropy(model(samples.images[own[batch]]), samples.labels[own[batch]]).backward()
            optimiser.step()
    with torch.no_grad():
        expected = model.eval()(samples.images)
    torch.testing.assert_close(made.train(index, samples, CPU), expected, atol=2e-6, rtol=0)


def test_a_second_run_trains_none_and_a_killed_one_only_what_was_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    real = Recipe.train

    def counted(self: Recipe, index: int, *arguments: Any) -> Any:
        if len(trained) == 4 and "killed" not in done:
            raise KeyboardInterrupt
        trained.append(index)
        return real(self, index, *arguments)

    done: set[str] = set()
    monkeypatch.setattr(Recipe, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path / "run")
    done.add("killed")
    first, text = ran(tmp_path / "run")
    assert trained == [0, 1, 2, 3, 4, 5]
    assert "6 reference models: 2 trained, 4 from" in text
    second, text = ran(tmp_path / "again")
    assert "6 reference models: none trained, 6 from" in text
    assert (
        f"references: 6 of 6 models are in {tmp_path / 'references'}"
        in (tmp_path / "again/log.txt").read_text()
    )
    assert len(trained) == 6
    name = BASE["attack"]
    assert second[name].records == first[name].records
    _, text = ran(tmp_path / "more", references=8)
    assert trained[6:] == [6, 7]
    _, text = ran(tmp_path / "other", **{"learning-rate": 0.11})
    assert len(trained) == 14
    assert len(list((tmp_path / "references").iterdir())) == 2


def test_damaged_files_are_trained_anew_with_a_warning(tmp_path: Path) -> None:
    first, _ = ran(tmp_path / "run")
    (folder,) = (tmp_path / "references").iterdir()
    expected = (folder / "model-0001.safetensors").read_bytes()
    (folder / "model-0001.safetensors").write_bytes(b"\x00" * 100)
    swapped = (folder / "model-0003.safetensors").read_bytes()
    (folder / "model-0002.safetensors").write_bytes(swapped)
    second, text = ran(tmp_path / "again")
    assert "6 reference models: 2 trained, 4 from" in text
    log = (tmp_path / "again/log.txt").read_text()
    assert "reference model 1 is trained anew" in log
    assert "reference model 2 is trained anew: " in log
    assert "model-0002.safetensors is in the place of another file" in log
    assert (folder / "model-0001.safetensors").read_bytes() == expected
    name = BASE["attack"]
    assert second[name].records == first[name].records


def test_too_few_are_refused_and_those_that_nobody_reads_are_not_trained(tmp_path: Path) -> None:
    with pytest.raises(
        NotApplicable, match=r"'attack\.references' = 3: this attack needs at least 4 reference models"
    ):
        reported(tmp_path / "few", references=3)
    _, text = ran(tmp_path / "none", attack="fedmia")
    assert "reference models" not in text
    assert not (tmp_path / "references").exists()
    assert "none is trained, no attack of this run reads any" in (tmp_path / "none/log.txt").read_text()


def test_a_model_that_cannot_be_trained_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = references.ReferenceModel.run

    def failing(self: Any, *arguments: Any) -> Trained:
        return self.lost("local training diverged") if self.index in failed else real(self, *arguments)

    failed = {2}
    monkeypatch.setattr(references.ReferenceModel, "run", failing)
    result, text = ran(tmp_path / "run", **{"output.cache_dir": str(tmp_path / "cache")})
    assert "5 reference models: 5 trained, 0 from" in text
    assert "1 could not be trained (model 2: local training diverged)" in text
    assert list(result) == [BASE["attack"]]
    failed |= {0, 1, 3}
    _, text = ran(
        tmp_path / "two", attack=("fedmia", BASE["attack"]), **{"output.cache_dir": str(tmp_path / "other")}
    )
    assert "AgainstReferences failed: needs 4 reference models; 2 reference models: 2 trained" in text


def test_without_public_samples_the_candidates_are_halved(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    folder = RunFolder.create(tmp_path / "run", config)
    found = TrainedReferences(config, folder, knowledge(public=0), recipe().scenario, 2)
    assert "trained on half of the 21 candidates alone" in (tmp_path / "run/log.txt").read_text()
    for job in found.missing():
        found.keep(job, Trained(torch.zeros(21, 10)))
    held = found.collected()
    assert held.logits.shape == (6, 21, 10)
    assert held.public_logits.shape == (6, 0, 10)
    assert (held.trained_on.sum(0) == 3).all()


@pytest.mark.slow
@pytest.mark.ray
def test_sixteen_on_two_actors(tmp_path: Path) -> None:
    """The bar: `mlp` on digits, 16 references, two actors; the same bits as inline, and none trained twice."""
    more = {"references": 16, "actors": 2, "engine": "ray", "attack": "attack-r"}
    text = reported(tmp_path / "run", **more)
    assert "16 reference models: 16 trained, 0 from" in text
    text = reported(tmp_path / "again", **more)
    assert "16 reference models: none trained, 16 from" in text
    text = reported(
        tmp_path / "inline", **more | {"engine": "inline", "output.cache_dir": str(tmp_path / "inlines")}
    )
    (one,), (other,) = (list((tmp_path / name).iterdir()) for name in ("references", "inlines"))
    assert one.name == other.name
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
