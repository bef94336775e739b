"""What is private can be read by its owner alone, whatever the umask says and whatever was there before."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedattack.files import private_folder, write_bytes, write_tensors
from fedattack.groundtruth import GroundTruth, MembershipTruth
from fedattack.storage import load_truths, save_truth
from fedattack.storage.membership import save_membership_truth


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder.parent)): stat.S_IMODE(path.stat().st_mode)
        for path in (folder, *folder.rglob("*"))
    }


def save_both(folder: Path) -> None:
    save_truth(folder, GroundTruth(2, 3, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), (5, 6)))
    numbers = np.arange(3)
    truth = MembershipTruth(numbers, numbers, numbers, None, {0: {"places": numbers}}, 0.5, 0.1, 3)
    save_membership_truth(folder, truth)


def test_truths_are_their_owners_alone(umask: int, tmp_path: Path) -> None:
    save_both(tmp_path / "truth")
    found = modes(tmp_path / "truth")
    assert found == {
        "truth": 0o700,
        "truth/round-0002": 0o700,
        "truth/round-0002/client-00003.json": 0o600,
        "truth/round-0002/client-00003.safetensors": 0o600,
        "truth/membership.json": 0o600,
        "truth/membership.safetensors": 0o600,
    }
    assert load_truths(tmp_path / "truth")[0].sample_ids == (5, 6)
    write_bytes(tmp_path / "seen", b"x")
    assert stat.S_IMODE((tmp_path / "seen").stat().st_mode) == 0o666 & ~umask


def test_truths_that_were_open_before_are_closed(tmp_path: Path) -> None:
    save_both(tmp_path / "truth")
    write_tensors(tmp_path / "truth" / "round-0001" / "client-00000.safetensors", {"x": torch.ones(1)})
    outside = tmp_path / "outside"
    outside.write_text("x")
    outside.chmod(0o644)
    (tmp_path / "truth" / "link").symlink_to(outside)
    for path in (tmp_path / "truth", *(tmp_path / "truth").rglob("*")):
        if not path.is_symlink():
            path.chmod(0o777 if path.is_dir() else 0o666)
    save_both(tmp_path / "truth")
    (tmp_path / "truth" / "link").unlink()
    assert {mode & 0o077 for mode in modes(tmp_path / "truth").values()} == {0}
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644


def test_a_file_system_without_rights_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "truth").mkdir(mode=0o755)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    monkeypatch.setattr(Path, "chmod", refused)
    private_folder(tmp_path / "truth")
    save_both(tmp_path / "truth")
    assert load_truths(tmp_path / "truth")[0].client == 3
