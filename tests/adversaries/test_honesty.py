"""An adversary sees an observation and nothing else: by its imports, and by what its answers depend on."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import honest_answers
import numpy as np
import pytest
import torch
from hcgla_scenes import answers_digest, fixed_observation, smooth_images

from fedattack.groundtruth import GroundTruth

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("fedattack", "adversaries", "strategies", "simulations")
PRIVATE = (
    "fedattack.groundtruth",
    "fedattack.data",
    "fedattack.audit",
    "fedattack.storage",
    "fedattack.reporting",
)
"""What knows the truth: the auditor's types, the pools of private samples, the report."""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, or names in full in a string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            target = node.value.partition(":")[0]
            if target.startswith(tuple(f"{room}." for room in ROOMS)) and not target.endswith(".py"):
                yield target


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_no_adversary_imports_what_knows_the_truth() -> None:
    assert len(files("adversaries")) > 10
    found = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files("adversaries")
        for module in imports(path)
        if any(within(module, private) for private in PRIVATE)
    }
    assert not found


def test_rooms_import_one_way() -> None:
    found = set()
    for height, room in enumerate(ROOMS):
        for path in files(room):
            for module in imports(path):
                # The front door hands on what is asked for by name; `python -m fedattack` is the command.
                door = path.parent == ROOT / "fedattack" and path.name in ("__init__.py", "__main__.py")
                if any(within(module, above) for above in ROOMS[height + 1 :]) and not door:
                    found.add(f"{path.relative_to(ROOT)} imports {module}")
    assert not found


def test_the_rules_catch_an_offender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "adversaries"
    room.mkdir()
    offender = room / "peek.py"
    offender.write_text(
        "def f():\n    from fedattack import groundtruth\n    return 'simulations.run:main'\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = set(imports(offender))
    assert {"fedattack.groundtruth", "simulations.run"} <= found


FRESH = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import adversaries.reconstruction.hcgla
known = [name for name in sys.modules if name.startswith(tuple(json.loads(sys.argv[4])))]
import numpy as np, torch
torch.set_num_threads(1)
from fedattack.groundtruth import GroundTruth
from hcgla_scenes import answers_digest, fixed_observation, smooth_images
private = smooth_images(2, 16, seed=99)
truth = GroundTruth(1, 0, private, torch.tensor([5, 6]), (8, 9))
torch.manual_seed(12345)
np.random.seed(7)
torch.rand(1000)
print(json.dumps({"known": known, "answers": answers_digest(fixed_observation(sys.argv[3]))}))
"""


def test_private_data_cannot_change_an_answer_by_one_bit(tmp_path: Path) -> None:
    """The observation is fixed; the second process has other private images, labels and global random states."""
    path = tmp_path / "observation.pt"
    observation = fixed_observation(str(path), smooth_images(2, 16, seed=1), torch.tensor([3, 8]))
    truth = GroundTruth(1, 0, smooth_images(2, 16, seed=1), torch.tensor([3, 8]), (0, 1))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (the point is that the global state does not matter)
    here = answers_digest(observation)
    arguments = [str(ROOT), str(Path(__file__).parent), str(path), json.dumps(PRIVATE)]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    assert there["answers"] == here
    assert there["known"] == []
    # A digest that could not change would prove nothing: another update is another answer.
    other = fixed_observation(str(tmp_path / "other.pt"), smooth_images(2, 16, seed=2), truth.labels)
    assert all(answers_digest(other)[method] != digest for method, digest in here.items())


def elsewhere(folder: Path) -> dict[str, str]:
    """The answers of a process with other private data and other global random states."""
    done = subprocess.run(
        [sys.executable, honest_answers.__file__, str(folder), "99"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_no_attack_answers_by_anything_but_its_observation(tmp_path: Path) -> None:
    """All attacks on images and on membership; figures and answers, to the bit."""
    names, of_members = honest_answers.reconstruction_attacks(), honest_answers.membership_attacks()
    for part, seed in (("seen", 1), ("other", 2)):
        for name in names:
            honest_answers.save_scene(tmp_path / part / name, name, seed)
        for name in of_members:
            honest_answers.save_federation(tmp_path / part / name, name, seed)

    def answers(part: str) -> dict[str, str]:
        found = honest_answers.answers(tmp_path / part, names)
        return found | honest_answers.membership_answers(tmp_path / part, of_members)

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = answers("seen")
    torch.set_num_threads(threads)
    assert elsewhere(tmp_path / "seen") == here
    # A digest that could not change would prove nothing: other clients' updates are another answer.
    there = answers("other")
    assert not {name for name in here if there[name] == here[name]}
