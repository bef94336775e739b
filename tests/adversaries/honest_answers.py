"""Every reconstruction and membership attack's answer to observations read from disk, for the test of honesty.

Run as a script, it answers in a process of its own: ``python honest_answers.py FOLDER SEED`` prints the digests.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from malicious_scenes import PUBLIC, batch_of, observe, pictures, scenario
from torch import Tensor

from adversaries import ATTACKS, MembershipAttack, ReconstructionAttack
from adversaries.membership.knowledge import Knowledge, References
from adversaries.membership.view import RoundView
from adversaries.needs import Facts
from adversaries.refusals import attack_refusals
from adversaries.seats import ClientView, MaliciousClient, MaliciousServer
from fedattack.config import TrainingConfig
from fedattack.files import write_tensors
from fedattack.groundtruth import GroundTruth
from fedattack.models import build_model, initial_weights
from fedattack.observation import (
    EVERYONE,
    Auxiliary,
    Candidates,
    Observation,
    Reconstruction,
    Scenario,
    Update,
)
from fedattack.registry import plugin_options
from fedattack.storage.observations import load_observations, read_tensors, save_observation
from fedattack.task import LocalRound, task_of

TWO_PASSES = TrainingConfig(protocol="fedavg", local_steps=4, batch_size=2, learning_rate=0.01)

RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hcgla": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 5, "method": "matching"}),
    "tensor": ({"model": "two-layer", "batch": 2, "width": 128}, {}),
    "dlg": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 4}),
    "idlg": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 4}),
    "ig": ({"model": "lenet-zhu", "batch": 2}, {"iterations": 4, "restarts": 2}),
    "sapag": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 4}),
    "cpl": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 4}),
    "tag": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 4}),
    "gradinversion": ({"model": "resnet20", "batch": 2}, {"iterations": 2, "restarts": 2}),
    "gauss-newton": ({"model": "lenet-zhu", "batch": 1}, {"products": 100}),
    "imprint": ({"model": "imprint", "batch": 4, "width": 32}, {}),
    "loki": ({"model": "loki", "batch": 4, "width": 32}, {}),
    "cah": ({"model": "mlp", "batch": 2}, {}),
    "fishing": ({"model": "lenet-zhu", "batch": 3}, {"settings": {"products": 100}}),
    "spear": ({"model": "cnn-mcmahan", "batch": 2, "width": 32}, {"turns": 1}),
    "analytic": ({"model": "mlp", "batch": 1}, {}),
    "rgap": ({"model": "lenet-zhu", "batch": 1}, {}),
    "ggl": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 3, "epochs": 1}),
    "gifd": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 3, "epochs": 1}),
    "dip": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 3}),
    "lti": ({"model": "lenet-zhu", "batch": 1}, {"epochs": 1, "passes": 1, "hidden": 32, "inputs": 512}),
    "fgla": ({"model": "lenet-zhu", "batch": 1}, {"passes": 1, "epochs": 1, "width": 8}),
    "rog": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 3, "pairs": 8, "epochs": 1}),
    "dlf": ({"model": "lenet-zhu", "batch": 2, "images": 4, "training": TWO_PASSES}, {"iterations": 4}),
}
"""Attack -> (scene of a client, settings that keep it short), where they are not to be the drawn ones."""

SCENES: tuple[dict[str, Any], ...] = (
    {"model": "lenet-zhu", "batch": 1},
    {"model": "lenet-zhu", "batch": 3},
    {"model": "mlp", "batch": 1},
    {"model": "mlp", "batch": 2},
    {"model": "resnet20", "batch": 2},
    {"model": "two-layer", "batch": 2, "width": 128},
    {"model": "imprint", "batch": 4, "width": 32},
    {"model": "loki", "batch": 4, "width": 32},
)
"""Small scenes, of which an attack gets the first that meets its needs."""

SHORT = {"iterations": 4, "epochs": 1, "products": 100}
"""Settings that keep an attack short, where it has them."""


def reconstruction_attacks() -> list[str]:
    """Names of all registered attacks that rebuild images."""
    return [name for name in ATTACKS.names() if issubclass(ATTACKS.get(name), ReconstructionAttack)]


def build(name: str) -> ReconstructionAttack:
    """The attack with its short settings."""
    cls = ATTACKS.get(name)
    settings = {key: value for key, value in SHORT.items() if key in plugin_options(cls)}
    attack = cls(**RECIPES[name][1] if name in RECIPES else settings)
    assert isinstance(attack, ReconstructionAttack)
    return attack


def made(settings: dict[str, Any]) -> Scenario:
    """The scenario of a scene."""
    others = {
        key: value for key, value in settings.items() if key not in ("model", "batch", "width", "images")
    }
    return scenario(settings["model"], settings["batch"], settings.get("width"), **others)


def scene_of(name: str) -> dict[str, Any]:
    """The scene of an attack: its own, or the first small one that meets its needs."""
    if name in RECIPES:
        return RECIPES[name][0]
    return drawn_scene(build(name))


def drawn_scene(attack: ReconstructionAttack) -> dict[str, Any]:
    """The first small scene that meets an attack's needs."""
    facts = Facts(rounds=(1,), auxiliary=len(PUBLIC), labelled=True)
    return next(scene for scene in SCENES if not attack_refusals(attack, made(scene), facts))


def save_scene(folder: Path, name: str, seed: int) -> GroundTruth:
    """Write what the server sees of one client, and give back what it must not."""
    settings = scene_of(name)
    scene = made(settings)
    images, labels = batch_of(settings.get("images", scene.training.batch_size), seed)
    labels = (labels[0] + torch.arange(len(labels))) % 10  # distinct, which some attacks need
    save_observation(folder, observe(build(name), scene, images, labels, public=PUBLIC))
    return GroundTruth(1, 0, images, labels, tuple(range(len(labels))))


def digest(answer: Reconstruction) -> str:
    """SHA-256 of everything that an attack answers."""
    found = hashlib.sha256()
    tensors = {"images": answer.images, "labels": answer.labels, **answer.floors}
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    found.update(repr((answer.loss, answer.label_confidence, answer.history, answer.details)).encode())
    return found.hexdigest()


def answers(folder: Path, names: list[str]) -> dict[str, str]:
    """Digest of each attack's answer to the observation in the sub-folder of its name."""
    found = {}
    for name in names:
        (answer,) = build(name).run(load_observations(folder / name), 3, torch.device("cpu"))
        found[name] = digest(answer)
    return found


CLIENTS, ROUNDS, ASKED, MODELS = 4, 2, 16, 4
"""Of a membership scene: clients, rounds, candidates, reference models."""

KNOWN = Auxiliary(PUBLIC.images[:40], PUBLIC.labels[:40])  # type: ignore[index]
FACTS = Facts(
    rounds=tuple(range(1, ROUNDS + 1)),
    clients=CLIENTS,
    drawn=CLIENTS,
    honest=CLIENTS,
    held_out=ASKED // 2,
    auxiliary=len(KNOWN),
    labelled=True,
    references=MODELS,
    people=True,
)
BRIEF = {"samples": 50, "evaluations": 20}
TRAINING = TrainingConfig(protocol="fedavg", batch_size=0, local_steps=3, learning_rate=0.2)
GRADIENT = TrainingConfig(batch_size=0)
GENERATOR = TRAINING.model_copy(update={"task": "wgan-gp", "local_steps": 5, "learning_rate": 0.01})


def membership_attacks() -> list[str]:
    """Names of all registered attacks on membership."""
    return [name for name in ATTACKS.names() if issubclass(ATTACKS.get(name), MembershipAttack)]


def membership_attack(name: str) -> MembershipAttack:
    """The attack with its default settings, but for what would take long."""
    settings = {key: value for key, value in BRIEF.items() if key in plugin_options(ATTACKS.get(name))}
    attack = ATTACKS.get(name)(**settings)
    assert isinstance(attack, MembershipAttack)
    return attack


def membership_scene(name: str) -> Scenario:
    """The first small federation that meets an attack's needs."""
    attack = membership_attack(name)
    made = [scenario("mlp", 0, 24, training=t, activation="relu") for t in (TRAINING, GRADIENT)]
    made.append(scenario("wgan-gp-mlp", 0, 24, training=GENERATOR, activation="relu"))
    return next(scene for scene in made if not attack_refusals(attack, scene, FACTS))


def question() -> tuple[Candidates, References]:
    """What all are asked, whoever trained on it, and what the adversary's models say to it."""
    generator = torch.Generator().manual_seed(4)
    candidates = Candidates(pictures(ASKED, seed=70), torch.arange(ASKED) % 10, torch.arange(ASKED) // 2)
    logits = torch.randn(MODELS, ASKED + len(KNOWN), 10, generator=generator)
    halves = torch.rand(MODELS // 2, ASKED + len(KNOWN), generator=generator) < 0.5
    halves = torch.cat([halves, ~halves])
    split = logits[:, :ASKED], halves[:, :ASKED], logits[:, ASKED:], halves[:, ASKED:]
    return candidates, References(*(part.contiguous() for part in split))


def save_federation(folder: Path, name: str, seed: int) -> None:
    """Write what the server sees of clients whose data depend on the seed: under 1 they are asked about."""
    scene, attack, (candidates, _) = membership_scene(name), membership_attack(name), question()
    data = [batch_of(6, seed=10 * seed + client) for client in range(CLIENTS)]
    if seed == 1:
        for client, (images, labels) in enumerate(data):
            own = slice(2 * client, 2 * client + 2)
            images[:2], labels[:2] = candidates.images[own], candidates.labels[own]
    model, weights, task = build_model(scene.model), initial_weights(scene.model, 0), task_of(scene)
    earlier: dict[int, list[Observation]] = defaultdict(list)
    for number in range(1, ROUNDS + 1):
        sent, steps = weights, []
        if isinstance(attack, MaliciousServer):
            sent = attack.arm(scene, weights, number, KNOWN, candidates)
        for client, (images, labels) in enumerate(data):
            own = dict(sent)
            if isinstance(attack, MaliciousServer):
                own |= attack.tailor(scene, sent, client, earlier[client] if attack.adapts else ())
            batches = [np.arange(len(images))] * scene.training.local_steps
            draws = torch.Generator().manual_seed(100 * number + client)
            step = task.step(scene, draws)
            update = task.train(model, LocalRound(own, images, labels, batches, scene, step, draws)).update
            values = torch.cat([tensor.flatten() for tensor in update.values()])
            shapes = tuple(tuple(tensor.shape) for tensor in update.values())
            kind = "delta" if scene.training.protocol == "fedavg" else "gradient"
            reply = Update(tuple(update), shapes, None, values, kind)
            seen = Observation(number, client, scene, own, reply, len(images), auxiliary=KNOWN)
            save_observation(folder, seen)
            earlier[client].append(seen)
            steps.append(update)
        step = 1.0 if scene.training.protocol == "fedavg" else -scene.training.learning_rate
        moved = {n: w + step * torch.stack([s[n] for s in steps]).mean(0) for n, w in sent.items()}
        if not isinstance(attack, MaliciousServer) or attack.aggregates:
            weights = moved
        write_tensors(folder / f"after-{number}.safetensors", weights)


def figures_digest(found: Any, tensors: dict[str, Tensor]) -> None:
    """Add tensors to a digest, by name."""
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().numpy().tobytes())


def of_client(
    found: Any, attack: MaliciousClient, candidates: Candidates, observations: list[Observation], seed: int
) -> None:
    """Add what the attack says, and sends, as the last client: it sees the global models, and its own update."""
    memory: dict[str, Tensor] = {}
    early = candidates if attack.asks_early else None
    for o in (o for o in observations if o.client == CLIENTS - 1):
        view = ClientView(o.round, o.client, o.scenario, o.weights, seed + o.round, memory, 1, early)
        attack.see(view)
        figures_digest(found, attack.reply(view, o.update.dense()))
    scores = attack.answer(view, candidates)
    assert scores["scores"].shape == (ASKED,)
    figures_digest(found, scores)


def membership_answers(folder: Path, names: list[str], seed: int = 3) -> dict[str, str]:
    """Digest of each attack's figures and scores of the federation in the sub-folder of its name."""
    told = {}
    for name in names:
        attack, (candidates, references) = membership_attack(name), question()
        observations, found = load_observations(folder / name), hashlib.sha256()
        if isinstance(attack, MaliciousClient):
            of_client(found, attack, candidates, observations, seed)
            told[name] = found.hexdigest()
            continue
        knowledge = Knowledge.of(candidates, observations[0].auxiliary, references)
        figures = {}
        for number in range(1, ROUNDS + 1):
            seen = [o for o in observations if o.round == number]
            after = read_tensors(folder / name / f"after-{number}.safetensors")
            figures[number] = attack.watch(RoundView(seen, knowledge, torch.device("cpu"), after), seed)
            figures_digest(found, dict(figures[number]))
        alone = attack.needs_now(observations[0].scenario).about == "client"
        for target in range(CLIENTS) if alone else [EVERYONE]:
            answer = attack.scores(figures, target, knowledge)
            assert answer.scores.shape == (ASKED,)
            assert answer.scores.isfinite().all()
            figures_digest(found, {"scores": answer.scores})
            found.update(repr(answer.details).encode())
        told[name] = found.hexdigest()
    return told


def main() -> None:
    """Answer in the presence of another truth and other global random states."""
    torch.set_num_threads(1)
    folder, truth = Path(sys.argv[1]), int(sys.argv[2])
    images, labels = batch_of(4, truth)
    other = GroundTruth(1, 0, images, labels, (8, 9, 10, 11))
    torch.manual_seed(12_345)
    np.random.seed(7)  # noqa: NPY002 (the point is that the global state does not matter)
    torch.rand(1000)
    names = sorted(path.name for path in folder.iterdir())
    of_members = set(membership_attacks())
    found = answers(folder, [name for name in names if name not in of_members])
    print(json.dumps(found | membership_answers(folder, [name for name in names if name in of_members])))
    assert len(other.labels) == 4


if __name__ == "__main__":
    main()
