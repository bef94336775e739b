"""Attacks that ask about people, by samples of theirs that nobody trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import honest_answers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import log_softmax
from scipy.stats import zscore
from sklearn.linear_model import BayesianRidge

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.people.person_client import PersonClient
from adversaries.membership.people.person_member import PersonMember
from adversaries.membership.people.statistics import people_of
from adversaries.membership.view import RoundView
from adversaries.needs import Facts
from adversaries.refusals import attack_refusals
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import EVERYONE
from fedattack.storage.observations import load_observations
from fedattack.training import batch_positions, local_update
from simulations.pipeline import simulate

CPU = torch.device("cpu")


def test_which_client_is_this_person(tmp_path: Path) -> None:
    """Gradients sample by sample; then NumPy alone."""
    honest_answers.save_federation(tmp_path, "person-client", seed=1)
    observations, (candidates, _) = load_observations(tmp_path), honest_answers.question()
    groups, labels = candidates.groups.numpy(), candidates.labels.numpy()
    rounds = []
    for number in (1, 2):
        rows = []
        for o in (o for o in observations if o.round == number):
            model = build_model(o.scenario.model).double()
            model.load_state_dict({name: tensor.double() for name, tensor in o.weights.items()})
            cosines = []
            for image, label in zip(candidates.images.double(), candidates.labels, strict=True):
                loss = torch.nn.functional.cross_entropy(model(image[None]), label[None])
                slopes = torch.autograd.grad(loss, list(model.parameters()))
                g, u = torch.cat([s.flatten() for s in slopes]), -o.update.values.double()
                cosines.append(float(g @ u / g.norm() / u.norm()))
            values = np.array(cosines)
            for label in set(labels):
                own = values[labels == label]
                values[labels == label] = zscore(own) if len(own) > 1 else 0.0
            rows.append(zscore([values[groups == person].mean() for person in range(8)]))
        rounds.append(rows)
    for client in range(4):
        answer = PersonClient().run(observations, client, candidates, 0, CPU)
        wanted = np.mean([rows[client] for rows in rounds], axis=0)[groups]
        np.testing.assert_allclose(answer.scores, wanted, atol=1e-4)
        assert answer.details["rounds"] == [1, 2]


def test_did_this_person_take_part(tmp_path: Path) -> None:
    """The last global model beside the references that were not trained on a sample, losses clamped at 8."""
    honest_answers.save_federation(tmp_path, "person-member", seed=1)
    observations, (candidates, references) = load_observations(tmp_path), honest_answers.question()
    after = {
        name: 6 * tensor for name, tensor in initial_weights(observations[0].scenario.model, 5).items()
    }  # sure of itself: some losses are clamped
    knowledge = Knowledge.of(candidates, None, references)
    attack, figures = PersonMember(), {}
    for number, weights in ((1, observations[0].weights), (2, after)):
        figures[number] = attack.watch(RoundView(observations[:1], knowledge, CPU, weights), 0)
    answer = attack.scores(figures, EVERYONE, knowledge)

    model = build_model(observations[0].scenario.model).eval()
    model.load_state_dict(after)
    at, labels = np.arange(16), candidates.labels.numpy()
    with torch.no_grad():
        own = -log_softmax(model(candidates.images).numpy().astype(float), 1)[at, labels]
    beside = -log_softmax(20 * references.logits.numpy().astype(float), 2)[:, at, labels]
    loud = replace(references, logits=20 * references.logits)
    assert (own > 8).any() and (beside > 8).any()  # noqa: PT018
    unseen = ~references.trained_on.numpy()
    kept, people = np.minimum(beside, 8), candidates.groups.numpy()
    shapes = [
        (f(kept) * unseen).sum(0) / unseen.sum(0)
        for f in (np.asarray, np.sqrt, lambda loss: np.log(loss + 0.1))
    ]
    means = np.array([[shape[people == p].mean() for shape in shapes] for p in range(8)])
    lower = means[:, 1] - [np.sqrt(np.minimum(own, 8))[people == p].mean() for p in range(8)]
    answer = attack.scores(figures, EVERYONE, replace(knowledge, references=loud))
    told = BayesianRidge().fit(zscore(means), lower).predict(zscore(means))
    np.testing.assert_allclose(answer.scores, (lower - told)[people], atol=1e-4)
    assert answer.details == {"rounds": [2], "references": 4}

    trained = replace(references, trained_on=torch.ones_like(references.trained_on))
    with pytest.raises(
        NotApplicable, match=r"trained on by every reference model; raise 'attack\.references'"
    ):
        attack.scores(figures, EVERYONE, replace(knowledge, references=trained))
    with pytest.raises(NotApplicable, match="no reference model"):
        attack.scores(figures, EVERYONE, replace(knowledge, references=None))


def test_samples_are_not_people() -> None:
    scene = honest_answers.membership_scene("person-client")
    for attack in (PersonClient(), PersonMember()):
        (sentence,) = attack_refusals(attack, scene, Facts(people=False))
        assert sentence.startswith("setting 'attack.unit' = 'sample': this attack asks about people")
        assert not attack_refusals(attack, scene, honest_answers.FACTS)
    with pytest.raises(NotApplicable, match="the candidates are samples, and this attack asks about people"):
        people_of(replace(honest_answers.question()[0], groups=None))


QMNIST = {
    "dataset": "qmnist",
    "model": "mlp",
    "activation": "relu",
    "width": 128,
    "attack.unit": "group",
    "data.nonmember_unit": "group",
    "data.nonmembers": 100,
    "data.withheld": 0.5,
    "partition": "natural",
    "protocol": "fedavg",
    "batch-size": 16,
    "learning-rate": 0.05,
    "compressor": "none",
    "engine": "inline",
}


@pytest.mark.slow
def test_writers_are_told_by_handwriting_that_nobody_trained_on(shared_dir: Path, tmp_path: Path) -> None:
    """A hundred writers, each a client, go on from a model of about a hundred others; one round of two epochs."""
    settings = QMNIST | {
        "data-dir": str(shared_dir / "data/QMNIST"),
        "clients": 100,
        "partition.groups_per_client": 1,
        "auxiliary-size": 11_000,
        "local-steps": 8,
        "attack": "person-client",
        "weights": str(tmp_path / "others.safetensors"),
        "run-dir": str(tmp_path / "run"),
    }
    plain = Config.from_mapping({name: value for name, value in settings.items() if name != "weights"})
    scene, public = build_world(plain).scenario, build_world(plain).auxiliary
    steps = 10 * len(public) // 16
    training = plain.training.model_copy(update={"local_steps": steps})
    batches, start = batch_positions(len(public), training, 5, 1, 0), initial_weights(scene.model, 1)
    moved = local_update(
        build_model(scene.model), start, public.images, public.labels, batches, training
    ).update
    save_file({name: start[name] + change for name, change in moved.items()}, settings["weights"])

    metrics = simulate(Config.from_mapping(settings)).audits["person-client"].summary["metrics"]
    first, area = metrics["right_client"], metrics["auc"]
    print(f"right client first {first}; AUC against strangers {area}")
    assert first["of"] == 100
    assert first["right"] >= 35  # by chance 1
    assert area["low"] > 0.8


@pytest.mark.slow
def test_a_writer_s_part_shows_in_the_loss_on_other_handwriting(shared_dir: Path, tmp_path: Path) -> None:
    """A hundred writers' model of twenty epochs; each writer beside the one reference that never saw them."""
    settings = QMNIST | {
        "data-dir": str(shared_dir / "data/QMNIST"),
        "clients": 1,
        "candidates": 100,
        "partition.groups_per_client": 100,
        "auxiliary-size": 0,
        "rounds": 20,
        "local-steps": 345,
        "attack": "person-member",
        "references": 2,
        "run-dir": str(tmp_path / "run"),
    }
    summary = simulate(Config.from_mapping(settings)).audits["person-member"].summary
    print(f"AUC of a hundred members and a hundred strangers: {summary['metrics']['auc']}")
    assert summary["members"] == summary["nonmembers"] == 100
    assert summary["metrics"]["auc"]["mean"] >= 0.6
