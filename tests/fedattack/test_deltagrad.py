"""Mechanisms that follow the training's steps, against that training done again with the batches kept."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from central_scenes import Scene, holder

from fedattack.errors import DataError, NotApplicable, RunFailed
from fedattack.unlearning import trajectory
from fedattack.unlearning.amnesiac import Amnesiac
from fedattack.unlearning.deltagrad import DeltaGrad
from fedattack.unlearning.mechanism import Mechanism
from fedattack.unlearning.trajectory import state_file
from fedattack.unlearning.unrolling import Unrolling


@pytest.mark.parametrize(("batch", "rate"), [(128, 0.3), pytest.param(0, 1.0, marks=pytest.mark.slow)])
def test_deltagrad_is_near_retraining_at_a_quarter_of_its_gradients(
    tmp_path: Path, batch: int, rate: float
) -> None:
    scene = Scene(DeltaGrad(), tmp_path, **{"batch-size": batch, "learning-rate": rate})
    rng = np.random.default_rng(0)
    for count in (100,) if batch else (1, 10, 100):
        gone = rng.choice(1257, count, replace=False)
        answer, cost = scene.forget(gone)
        exact, full = scene.retrained(gone)
        assert scene.rho(answer.weights, exact) < 0.2
        assert full.gradients / cost.gradients >= 4
    written = state_file(scene.history.folder, "deltagrad", gone.tolist()).stem
    sizes = [path.stat().st_size for path in scene.history.folder.glob(f"{written}-*")]
    assert answer.details["bytes_kept"] == sum(sizes) > 2 * 500 * 650 * 8


@pytest.mark.parametrize("protocol", ["fedavg", "fedsgd"])
def test_deltagrad_with_exact_gradients_is_the_retraining(
    tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory, "_BYTES", 3 * 16 * 4810)  # a round of eight steps comes in three parts
    settings = {
        "samples": 200,
        "rounds": 4,
        "local-steps": 8 if protocol == "fedavg" else 1,
        "protocol": protocol,
        "training.momentum": 0.5 if protocol == "fedavg" else 0.0,
        "model": "mlp",
    }
    scene = Scene(DeltaGrad(period=1), tmp_path, **settings)
    assert len(list(scene.history.folder.glob("deltagrad-*"))) == 4 * (3 if protocol == "fedavg" else 1)
    emptied = set(scene.central.batches(2)[-1].tolist())  # a batch of which nothing is left
    a_class = np.flatnonzero((scene.central.labels == 3).numpy()).tolist()
    for gone in (emptied, set(a_class), emptied | set(a_class)):
        answer, _ = scene.forget(gone)
        exact, _ = scene.retrained(gone)
        assert scene.rho(answer.weights, exact) < 1e-5
    scene.go_on(scene.forget(emptied)[0])  # in two requests
    answer, _ = scene.forget(set(a_class) - emptied)
    assert scene.rho(answer.weights, exact) < 1e-5
    with pytest.raises(DataError, match="no samples"):
        scene.retrained(range(200))
    assert torch.equal(
        scene.central.flat(scene.forget(set(range(200)) - emptied)[0].weights),
        scene.central.flat(scene.first),
    )


def test_deltagrad_survives_emptied_batches_and_classes_where_it_estimates(tmp_path: Path) -> None:
    scene = Scene(DeltaGrad(), tmp_path, samples=400, rounds=4)
    emptied = set(scene.central.batches(1)[3].tolist())
    a_class = np.flatnonzero((scene.central.labels == 3).numpy()).tolist()
    answer, _ = scene.forget(emptied)
    assert scene.rho(answer.weights, scene.retrained(emptied)[0]) < 0.3
    answer, _ = scene.forget(emptied | set(a_class))
    exact, _ = scene.retrained(emptied | set(a_class))
    assert (
        abs(scene.accuracy(answer.weights) - scene.accuracy(exact))
        < 0.03
        < scene.accuracy(scene.released) - scene.accuracy(exact)
    )


def test_amnesiac_takes_back_what_it_says_and_fine_tuning_mends_it(tmp_path: Path) -> None:
    scene = Scene(Amnesiac(fine_tune=0), tmp_path / "bare")
    first, flat = scene.central.flat(scene.first), scene.central.flat
    one_each = {int(batch[0]) for round in range(1, 11) for batch in scene.central.batches(round)}
    answer, cost = scene.forget(one_each)
    assert float((flat(answer.weights) - first).abs().max()) < 1e-6
    assert answer.details["steps_taken_back"] == 500
    assert cost.gradients == 0
    gone = {11, 70}
    wanted = first.clone()  # the steps, taken by hand from the training
    steps = list(scene.central.walk(scene.first))
    for step, after in pairwise(steps):
        if not gone & set(step.batch.tolist()):
            wanted += after.before - step.before
    torch.testing.assert_close(flat(scene.forget(gone)[0].weights), wanted, rtol=0, atol=1e-6)
    for part in (11, 70):  # in two requests
        answer, _ = scene.forget({part})
        scene.go_on(answer)
    torch.testing.assert_close(flat(answer.weights), wanted, rtol=0, atol=1e-6)

    many = np.random.default_rng(0).choice(1257, 100, replace=False)
    scene.history = scene.history.fork(tmp_path / "whole", scene.released, {})
    assert scene.accuracy(scene.forget(many)[0].weights) < 0.5
    scene.mechanism = Amnesiac()
    assert scene.accuracy(scene.forget(many)[0].weights) >= 0.95 * scene.accuracy(scene.released)


def test_unrolling_is_one_gradient_and_knows_how_far_it_may_be_off(tmp_path: Path) -> None:
    predicted, measured = [], []
    gone = np.random.default_rng(0).choice(400, 16, replace=False)
    for number, rate in enumerate((0.03, 0.1, 0.3)):
        for rounds in (1, 2, 5):
            settings = {"learning-rate": rate, "rounds": rounds, "local-steps": 20, "samples": 400}
            scene = Scene(Unrolling(predict=64), tmp_path / f"{number}-{rounds}", **settings)
            answer, _ = scene.forget(gone)
            exact, _ = scene.retrained(gone)
            apart = scene.central.flat(answer.weights) - scene.central.flat(exact)
            predicted.append(answer.details["predicted_error"])
            measured.append(float(apart.norm()))
    assert np.corrcoef(predicted, measured)[0, 1] > 0.8
    assert np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.8
    scene.mechanism = Unrolling()
    answer, cost = scene.forget(gone)
    assert cost.gradients == pytest.approx(16 / 400)
    start, back = scene.central.flat(scene.first), scene.central.flat(scene.released).clone()
    for number in range(1, 6):
        for batch in scene.central.batches(number):
            lost = np.intersect1d(batch, gone)
            back += 0.3 / len(batch) * scene.central.gradient(start, scene.first, lost)
    torch.testing.assert_close(scene.central.flat(answer.weights), back, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mechanism", [DeltaGrad(), Amnesiac(), Unrolling()])
def test_refuse_steps_that_are_not_sgds(mechanism: Mechanism) -> None:
    def scenario(**settings: object):
        return holder(100, **settings)[1].scenario

    name = type(mechanism).__name__.lower()
    with pytest.raises(NotApplicable, match=r"'defense.names' = 'clip-noise': .*the steps of SGD"):
        mechanism.check(name, scenario(defense="clip-noise"), 1)
    mechanism.check(name, scenario(), 1)


def test_refuses_batch_statistics() -> None:
    with pytest.raises(NotApplicable, match=r"'training.batch_norm' = 'train'"):
        DeltaGrad().check("deltagrad", holder(100, model="resnet20")[1].scenario, 1)


def test_releases_the_training_whose_steps_it_keeps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"model": "resnet20", "learning-rate": 0.01, "local-steps": 2, "batch-size": 8}
    scene = Scene(Amnesiac(), tmp_path, 20, rounds=2, **settings)
    trained = scene.central.train(scene.first)
    for name, tensor in scene.released.items():  # BatchNorm's statistics too
        torch.testing.assert_close(tensor, trained[name])
    assert not caplog.records
    elsewhere = {name: 2 * tensor for name, tensor in trained.items()}
    again = scene.mechanism.prepare({}, scene.ended("elsewhere", elsewhere), scene.trainer)
    assert all(torch.equal(tensor, scene.released[name]) for name, tensor in again.items())
    assert "federation.strategy is not 'fedavg'" in caplog.text


def test_says_beforehand_what_does_not_fit_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(RunFailed, match=r"deltagrad keeps 500 steps, for which .* lacks 0\.0 GB; use fewer"):
        Scene(DeltaGrad(), tmp_path, 100)
    assert len(list((tmp_path / "before").glob("deltagrad-*"))) == 1
