"""Every reconstruction attack's answer to an observation read from disk, for the test of honesty.

Run as a script, it answers in a process of its own: ``python honest_answers.py FOLDER SEED`` prints the digests.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from malicious_scenes import PUBLIC, batch_of, observe, scenario

from adversaries import ATTACKS, ReconstructionAttack
from adversaries.needs import Facts
from adversaries.refusals import attack_refusals
from fedattack.groundtruth import GroundTruth
from fedattack.observation import Reconstruction, Scenario
from fedattack.registry import plugin_options
from fedattack.storage.observations import load_observations, save_observation

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
    "spear": ({"model": "mlp", "batch": 2}, {}),
    "analytic": ({"model": "mlp", "batch": 1}, {}),
    "rgap": ({"model": "lenet-zhu", "batch": 1}, {}),
    "ggl": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 3, "epochs": 1}),
    "gifd": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 3, "epochs": 1}),
    "dip": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 3}),
    "lti": ({"model": "lenet-zhu", "batch": 1}, {"epochs": 1}),
    "fgla": ({"model": "lenet-zhu", "batch": 1}, {"epochs": 1}),
    "rog": ({"model": "lenet-zhu", "batch": 1}, {"iterations": 3}),
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
    others = {key: value for key, value in settings.items() if key not in ("model", "batch", "width")}
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
    scene = made(scene_of(name))
    images, labels = batch_of(scene.training.batch_size, seed)
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


def main() -> None:
    """Answer in the presence of another truth and other global random states."""
    torch.set_num_threads(1)
    folder, truth = Path(sys.argv[1]), int(sys.argv[2])
    images, labels = batch_of(4, truth)
    other = GroundTruth(1, 0, images, labels, (8, 9, 10, 11))
    torch.manual_seed(12_345)
    np.random.seed(7)  # noqa: NPY002 (the point is that the global state does not matter)
    torch.rand(1000)
    print(json.dumps(answers(folder, sorted(path.name for path in folder.iterdir()))))
    assert len(other.labels) == 4


if __name__ == "__main__":
    main()
