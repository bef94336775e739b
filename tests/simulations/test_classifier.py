"""Classifiers of a benchmark: the published schedule, training as a reference does it, killed and taken up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from fedattack.config import Config
from fedattack.errors import ConfigError, DataError, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.rng import numpy_rng
from fedattack.training import evaluate
from simulations.studies import classifier as module
from simulations.studies.classifier import (
    SCHEDULES,
    Lesson,
    Schedule,
    finished,
    lesson,
    public_parts,
    train_classifier,
)

SHORT = Schedule(epochs=3, batch_size=32)


def digits(schedule: Schedule = SHORT, **more: Any) -> Lesson:
    settings = {
        "dataset": "digits", "auxiliary-size": 300, "data.nonmembers": 100, "model": "tiny-cnn", "clients": 4,
    }  # fmt: skip
    return lesson(Config.from_mapping(settings | more), schedule, 0.5)


def test_the_published_schedule() -> None:
    published = SCHEDULES["published"]
    falls = [epoch for epoch in range(1, 200) if published.rate(epoch) < 0.999 * published.rate(epoch - 1)]
    assert falls == [74, 124, 175]  # 200 // 1.6 is 124: 1.6 as a float is a little more
    assert [published.rate(epoch) for epoch in (0, 74, 124, 199)] == pytest.approx([0.1, 0.01, 1e-3, 1e-4])
    assert (published.batch_size, published.momentum, published.nesterov) == (64, 0.9, True)
    assert (published.weight_decay, published.loss_weight) == (5e-4, 0.5)
    assert [Schedule(epochs=2).rate(epoch) for epoch in (0, 1)] == pytest.approx([0.1, 1e-3])


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", -1), ("epochs", 1.5), ("batch_size", 0), ("learning_rate", -1.0), ("loss_weight", "half")],
)
def test_bad_schedules_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"schedule.{name}"):
        dataclasses.replace(SHORT, **{name: value})


def test_training_is_sgd_with_nesterov_momentum(tmp_path: Path) -> None:
    """Written out: velocity, look-ahead and decay as in Sutskever et al. 2013, with half the cross-entropy."""
    work = digits()
    found = load_file(train_classifier(work, tmp_path, "a").weights)
    model = build_model(work.world.scenario.model)
    model.load_state_dict(initial_weights(work.world.scenario.model, 0))
    images, labels = work.world.dataset.tensors(work.train)
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(3):
        rate = 0.1 * 0.1 ** sum(epoch >= int(3 // part) for part in (2.667, 1.6, 1.142))
        order = numpy_rng(0, "classifier order", epoch).permutation(len(labels))
        for start in range(0, len(order), 32):
            batch = torch.from_numpy(order[start : start + 32])
            slopes = torch.autograd.grad(0.5 * cross_entropy(model(images[batch]), labels[batch]), parameters)
            with torch.no_grad():
                for p, v, slope in zip(parameters, velocity, slopes, strict=True):
                    decayed = slope + 5e-4 * p
                    v.mul_(0.9).add_(decayed)
                    p.sub_(rate * (decayed + 0.9 * v))
    for name, tensor in model.state_dict().items():
        assert torch.allclose(found[name], tensor, atol=1e-6)


def test_weights_fit_the_setting_and_have_the_recorded_accuracy(tmp_path: Path) -> None:
    work = digits(model="convnet", width=2, **{"image-size": 9})
    made = train_classifier(work, tmp_path, "conv · 3-1-7")
    config = work.config.model_copy(
        update={"model": work.world.scenario.model.model_copy(update={"weights": str(made.weights)})}
    )
    state = initial_weights(config.model, 0)
    assert int(state["body.1.num_batches_tracked"]) == 3 * -(-150 // 32)
    assert not torch.equal(state["body.1.running_var"], torch.ones(2))
    images, labels = work.world.dataset.tensors(work.held_out)
    share = evaluate(build_model(config.model), state, images, labels)["accuracy"]
    told = made.record["accuracy"]["held-out"]
    assert (told["mean"], told["count"]) == (pytest.approx(share), 100)
    assert told["low"] < share < told["high"]
    assert finished(work, tmp_path, "conv · 3-1-7") == made
    assert finished(work, tmp_path, "another") is None
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".safetensors"]


def test_nobody_is_on_two_sides() -> None:
    work = digits()
    first, rest = public_parts(work.world, 0, 0.5)
    clients = np.concatenate(work.world.partitions)
    sides = [first, rest, work.held_out, clients]
    assert [len(side) for side in sides[:3]] == [150, 150, 100]
    assert len(np.unique(np.concatenate(sides))) == sum(map(len, sides))
    assert np.array_equal(work.train, first)


def test_killed_after_an_epoch_and_taken_up_it_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = digits(defense="transform,prune")
    whole = train_classifier(work, tmp_path / "whole", "a")

    kept, after = module._keep, []

    def killed(*given: Any) -> None:
        kept(*given)
        after.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_keep", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train_classifier(work, tmp_path / "killed", "a")
    monkeypatch.undo()
    again = train_classifier(work, tmp_path / "killed", "a")
    assert len(after) == 3
    assert again.weights.read_bytes() == whole.weights.read_bytes()
    assert again.record == whole.record
    assert len(whole.record["losses"]) == 3


def test_defences_act_on_the_training_gradient(tmp_path: Path) -> None:
    """Of each tensor 30 % of the entries move in the one step that there is."""
    one_step = Schedule(epochs=1, batch_size=150, weight_decay=0.0, momentum=0.0, nesterov=False)
    work = digits(one_step, defense="prune", **{"defense.share": 0.7})
    before = initial_weights(work.world.scenario.model, 0)
    after = load_file(train_classifier(work, tmp_path, "pruned").weights)
    for name, tensor in before.items():
        assert int((after[name] != tensor).sum()) <= max(1, round(0.3 * tensor.numel()))
    assert int((after["head.weight"] != before["head.weight"]).sum()) == round(
        0.3 * before["head.weight"].numel()
    )


def test_what_changes_the_weights_changes_the_digest() -> None:
    digests = {
        digits(**more).digest
        for more in ({}, {"seed": 1}, {"defense": "prune"}, {"model": "mlp"}, {"defense": "transform"})
    }
    assert len(digests | {digits(dataclasses.replace(SHORT, epochs=4)).digest}) == 6
    same = digits(clients=2, attack="ig", engine="inline", victims=2)
    assert same.digest == digits().digest


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    work = digits()
    made = train_classifier(work, tmp_path, "a")
    path = made.weights.with_suffix(".json")
    path.write_text(json.dumps({"digest": "x"}))
    with pytest.raises(DataError, match="not the record of this classifier"):
        train_classifier(work, tmp_path, "a")
    path.unlink()
    state = made.weights.with_suffix(".state.safetensors")
    for tensors, part in (
        ({"digest": torch.zeros(32, dtype=torch.uint8)}, "state of another training"),
        (
            {"digest": torch.tensor(list(bytes.fromhex(work.digest)), dtype=torch.uint8)},
            "does not hold the state",
        ),
        ({"x": torch.zeros(1)}, "does not hold the state"),
    ):
        save_file(tensors, state)
        with pytest.raises(DataError, match=part):
            train_classifier(work, tmp_path, "a")


def test_a_diverging_classifier_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="lower it"):
        train_classifier(digits(dataclasses.replace(SHORT, learning_rate=1e9)), tmp_path, "a")
