"""Run folders and stored observations."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedattack import sealed
from fedattack.config import CompressionConfig, Config, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, DataError, RunFailed
from fedattack.files import content_hash, write_bytes
from fedattack.groundtruth import GroundTruth
from fedattack.observation import Auxiliary, MembershipScores, Observation, Reconstruction, Scenario, Update
from fedattack.sealed import Identity
from fedattack.storage import RunFolder, load_observations, load_truths, save_observation, save_truth
from fedattack.storage.plain import plain


def observation(client: int = 0, round_: int = 1, sparse: bool = True, auxiliary: bool = True) -> Observation:
    generator = torch.Generator().manual_seed(round_)
    model = ModelConfig(name="tiny-cnn", classes=4, channels=1, image_size=8, activation="relu")
    names, shapes = ("a.weight", "b.weight"), ((4, 3), (5,))
    weights = {
        name: torch.randn(shape, generator=generator) for name, shape in zip(names, shapes, strict=True)
    }
    weights["bn.running_mean"] = torch.zeros(2)
    indices = torch.tensor([0, 3, 12, 16]) if sparse else None
    values = torch.randn(4 if sparse else 17, generator=generator) + client
    public = Auxiliary(
        torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(9)), torch.arange(6), "public"
    )
    return Observation(
        round=round_,
        client=client,
        scenario=Scenario(model, TrainingConfig(), CompressionConfig(rate=0.25)),
        weights=weights,
        update=Update(names, shapes, indices, values, "gradient"),
        num_examples=3,
        wire_bytes=77,
        auxiliary=public if auxiliary else None,
        buffers={"bn.running_mean": torch.full((2,), 0.5)},
    )


def same(first: Observation, second: Observation) -> bool:
    tensors = [
        (first.weights, second.weights),
        (first.buffers, second.buffers),
        ({"v": first.update.values}, {"v": second.update.values}),
    ]
    if first.update.indices is not None:
        tensors.append(({"i": first.update.indices}, {"i": second.update.indices}))
    if first.auxiliary is not None:
        tensors.append(({"x": first.auxiliary.images}, {"x": second.auxiliary.images}))
        tensors.append(({"y": first.auxiliary.labels}, {"y": second.auxiliary.labels}))
    equal = all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in tensors)
    facts = [
        (o.round, o.client, o.scenario, o.num_examples, o.wire_bytes, o.update.names) for o in (first, second)
    ]
    shapes = first.update.shapes == second.update.shapes and first.update.kind == second.update.kind
    sources = (first.auxiliary and first.auxiliary.source) == (second.auxiliary and second.auxiliary.source)
    return equal and facts[0] == facts[1] and shapes and sources


# --- observations on disk -------------------------------------------------------------------------------------------


def test_observations_come_back_as_they_were(tmp_path: Path) -> None:
    kept = [observation(0, 2, sparse=False), observation(0), observation(3), observation(1, auxiliary=False)]
    for one in kept:
        save_observation(tmp_path, one)
    found = load_observations(tmp_path)
    assert [(o.round, o.client) for o in found] == [(1, 0), (1, 1), (1, 3), (2, 0)]
    by_key = {o.key: o for o in kept}
    assert all(same(by_key[o.key], o) for o in found)


def test_weights_and_auxiliary_data_are_stored_once(tmp_path: Path) -> None:
    for client in range(3):
        save_observation(tmp_path, observation(client))
    save_observation(tmp_path, observation(0, 2))
    assert len(list(tmp_path.glob("round-0001/weights-*"))) == 1
    assert len(list(tmp_path.glob("auxiliary-*"))) == 1
    first, second, *_ = load_observations(tmp_path)
    assert first.weights is second.weights
    # A malicious server may send every client a model of its own.
    other = observation(9)
    other.weights["a.weight"] += 1
    save_observation(tmp_path, other)
    assert len(list(tmp_path.glob("round-0001/weights-*"))) == 2
    assert same(other, next(o for o in load_observations(tmp_path) if o.client == 9))


def test_observations_hold_no_truth(tmp_path: Path) -> None:
    secret = GroundTruth(1, 0, torch.rand(2, 1, 8, 8), torch.tensor([1, 3]), (40, 41))
    save_observation(tmp_path / "observations", observation())
    save_truth(tmp_path / "truth", secret)
    found = load_truths(tmp_path / "truth")[0]
    assert torch.equal(found.images, secret.images)
    assert (found.labels.tolist(), found.sample_ids, found.key) == ([1, 3], (40, 41), observation().key)
    pixels = secret.images.numpy().tobytes()
    assert not any(
        pixels in path.read_bytes() for path in (tmp_path / "observations").rglob("*") if path.is_file()
    )


def _edit_json(folder: Path, **changes) -> None:
    """Change what a document says, and seal it again: who made the change had no part in what it says."""
    path = folder / "round-0001" / "client-00000.json"
    document = json.loads(path.read_text())
    del document[sealed.SEAL]
    tensors = load_file(path.with_suffix(".safetensors"))
    sealed.write_json(path, document | changes, observation().key, None, tensors)


def _edit_tensors(folder: Path, **changes) -> None:
    path = folder / "round-0001" / "client-00000.safetensors"
    save_file({**load_file(path), **changes}, path)
    _edit_json(folder)


def _exchange(folder: Path, what: str, tensors) -> None:
    place = folder / "round-0001" if what == "weights" else folder
    name = f"{what}-{content_hash(tensors)[:16]}.safetensors"
    save_file(tensors, place / name)
    _edit_json(folder, **{what: name})


CORRUPTIONS = {
    "NaN": (lambda f: _edit_tensors(f, values=torch.tensor([1.0, math.nan, 0, 0])), "NaN"),
    "wrong dtype": (lambda f: _edit_tensors(f, values=torch.zeros(4, dtype=torch.float64)), "float32"),
    "too few": (lambda f: _edit_tensors(f, indices=torch.tensor([0, 1, 2])), "one for each"),
    "out of range": (
        lambda f: _edit_tensors(f, indices=torch.tensor([0, 1, 2, 17])),
        r"rise strictly within \[0, 17",
    ),
    "negative": (lambda f: _edit_tensors(f, indices=torch.tensor([-1, 1, 2, 3])), "rise strictly"),
    "repeated": (lambda f: _edit_tensors(f, indices=torch.tensor([0, 2, 2, 3])), "rise strictly"),
    "buffer": (
        lambda f: _edit_tensors(f, **{"buffer.bn.running_mean": torch.tensor([math.inf, 0])}),
        "infinite",
    ),
    "shape": (lambda f: _edit_json(f, shapes=[[4, 4], [5]]), "a.weight"),
    "unknown parameter": (lambda f: _edit_json(f, names=["a.weight", "c.weight"]), "c.weight"),
    "escape": (lambda f: _edit_json(f, weights="../../weights-0000000000000000.safetensors"), "weights"),
    "missing weights": (
        lambda f: _edit_json(f, weights="weights-0000000000000000.safetensors"),
        "safetensors file",
    ),
    "kind": (lambda f: _edit_json(f, kind="secret"), "kind"),
    "examples": (lambda f: _edit_json(f, num_examples=0), "num_examples"),
    "extra field": (lambda f: _edit_json(f, truth=[1]), "truth"),
    "another client": (lambda f: _edit_json(f, client=5), "client 5"),
    "no JSON": (lambda f: (f / "round-0001" / "client-00000.json").write_text("{"), "JSON"),
    "no safetensors": (
        lambda f: (f / "round-0001" / "client-00000.safetensors").write_bytes(b"\x80\x04junk"),
        "not a readable safetensors",
    ),
    "auxiliary range": (
        lambda f: _exchange(f, "auxiliary", {"images": torch.full((2, 1, 8, 8), 1.5)}),
        "outside",
    ),
    "auxiliary shape": (lambda f: _exchange(f, "auxiliary", {"images": torch.rand(2, 3, 8, 8)}), "takes"),
    "weights NaN": (
        lambda f: _exchange(
            f, "weights", {"a.weight": torch.full((4, 3), math.nan), "b.weight": torch.zeros(5)}
        ),
        "NaN",
    ),
    "other weights": (
        lambda f: save_file({"a.weight": torch.zeros(4, 3)}, next(f.glob("round-0001/weights-*"))),
        "weights-.* is damaged",
    ),
    "other tensors": (
        lambda f: save_file({"values": torch.zeros(4)}, f / "round-0001" / "client-00000.safetensors"),
        "client-00000.json is damaged",
    ),
}


@pytest.mark.parametrize(("corrupt", "words"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_malformed_observations_are_refused(tmp_path: Path, corrupt, words: str) -> None:
    save_observation(tmp_path, observation())
    assert len(load_observations(tmp_path)) == 1
    corrupt(tmp_path)
    with pytest.raises(DataError, match=words):
        load_observations(tmp_path)


def test_an_unfinished_observation_is_refused_by_name(tmp_path: Path) -> None:
    save_observation(tmp_path, observation())
    save_observation(tmp_path, observation(1))
    (tmp_path / "round-0001" / "client-00001.json").unlink()
    with pytest.raises(DataError, match=r"client-00001\.safetensors has no client-00001\.json beside it"):
        load_observations(tmp_path)
    with pytest.raises(DataError, match="no observation in"):
        load_observations(tmp_path / "elsewhere")


def test_observations_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    save_observation(tmp_path, observation(), Identity("a", "x"))
    save_observation(tmp_path, observation(1), Identity("b", "x"))
    with pytest.raises(
        DataError, match=r"client-00001\.json belongs to another run than .*client-00000\.json"
    ):
        load_observations(tmp_path)


# --- run folder -----------------------------------------------------------------------------------------------------


def test_a_run_folder_repeats_its_run(tmp_path: Path) -> None:
    config = Config.from_mapping({"seed": 7, "compression": 0.01, "attack": "hcgla", "hcgla.iterations": 5})
    folder = RunFolder.create(tmp_path / "a" / "run", config)
    assert not folder.resumed
    assert Config.from_toml(folder.path / "config.toml") == config
    again = RunFolder.create(folder.path, Config.from_mapping({"engine": "inline"}, config.model_dump()))
    assert again.resumed
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder.create(folder.path, config, resume=False)


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    config = Config.from_mapping({"seed": 7, "hcgla.iterations": 5})
    RunFolder.create(tmp_path / "run", config)
    other = Config.from_mapping({"seed": 7, "learning-rate": 0.5, "hcgla.iterations": 6})
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(tmp_path / "run", other)
    assert "training.learning_rate = 0.1 there, 0.5 here" in str(caught.value)
    assert "attack.options.hcgla.iterations = 5 there, 6 here" in str(caught.value)


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and no run folder"):
        RunFolder.create(tmp_path, Config())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(ConfigError, match="give a folder"):
        RunFolder.create(tmp_path / "thesis.tex", Config())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.toml").write_text("[")
    with pytest.raises(ConfigError, match="not readable"):
        RunFolder.create(tmp_path / "broken", Config())


def test_answers_of_attacks_are_resumed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Config())
    answer = Reconstruction(
        images=torch.rand(2, 1, 8, 8),
        labels=torch.tensor([3, 1]),
        loss=math.inf,
        label_confidence=0.1 + 0.2,
        certificate=math.nan,
        method="gauss-newton",
        history=[3.0, math.nan, 1e-300],
        floors={"prior": torch.rand(2, 1, 8, 8), "ridge": torch.rand(1, 1, 8, 8)},
        details={"restarts": [1, 2], "note": "ü"},
    )
    assert folder.load_reconstruction("my.pkg:Attack", "round-0001-client-00000") is None
    folder.save_reconstruction("my.pkg:Attack", "round-0001-client-00000", answer, 12.5, 3_000_000)
    again = RunFolder.create(tmp_path / "run", Config())
    found, seconds, memory = again.load_reconstruction("my.pkg:Attack", "round-0001-client-00000")
    assert (seconds, memory) == (12.5, 3_000_000)
    assert torch.equal(found.images, answer.images)
    assert torch.equal(found.labels, answer.labels)
    assert all(torch.equal(found.floors[name], answer.floors[name]) for name in ("prior", "ridge"))
    assert (found.loss, found.label_confidence, found.method, found.details) == (
        math.inf,
        0.1 + 0.2,
        "gauss-newton",
        answer.details,
    )
    assert math.isnan(found.certificate)
    assert found.history[::2] == [3.0, 1e-300]
    part = folder.path / "parts" / "my.pkg_Attack" / "round-0001-client-00000"
    part.with_suffix(".json").unlink()  # killed between the two files
    assert again.load_reconstruction("my.pkg:Attack", "round-0001-client-00000") is None
    with pytest.raises(DataError, match="cannot name a file"):
        folder.save_reconstruction("../evil", "x", answer, 1.0)


def test_a_torn_answer_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Config())
    folder.save_reconstruction("a", "k", Reconstruction(torch.rand(1, 1, 8, 8), torch.tensor([0]), 1.0), 1.0)
    save_file({"images": torch.rand(1, 1, 8, 8)}, folder.path / "parts" / "a" / "k.safetensors")
    with pytest.raises(DataError, match=r"k\.json is damaged: its checksum does not match"):
        folder.load_reconstruction("a", "k")


def test_scores_and_other_parts_are_resumed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Config())
    assert folder.load_scores("fedmia", 3) is None
    scores = MembershipScores(torch.randn(5, dtype=torch.float64), "cosine", {"rounds": 4})
    folder.save_scores("fedmia", 3, scores, 2.0)
    found, seconds = folder.load_scores("fedmia", 3)
    assert torch.equal(found.scores, scores.scores)
    assert (found.statistic, found.details, seconds) == ("cosine", {"rounds": 4}, 2.0)
    assert folder.load_part("federation") is None
    folder.save_part("federation", {"rounds": [{"round": 1, "loss": math.nan, "accuracy": 0.5}]})
    assert folder.load_part("federation") == {"rounds": [{"round": 1, "loss": None, "accuracy": 0.5}]}


def test_leftovers_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Config())
    leftover = folder.path / "parts" / ".k.json.4711.part"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")
    RunFolder.create(folder.path, Config())
    assert not leftover.exists()


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "kept.bin", b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(RunFailed, match="the file would exceed the allowed file size"):
            write_bytes(tmp_path / "kept.bin", bytes(2_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "kept.bin").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.bin"]


_FILL = """
import sys
from pathlib import Path
from fedattack import files
from fedattack.errors import RunFailed

folder = Path(sys.argv[1])
files.write_bytes(folder / "kept.bin", b"before")
try:
    files.write_bytes(folder / "kept.bin", bytes(2_000_000))
except RunFailed as error:
    print(error)
print((folder / "kept.bin").read_bytes().decode(), sorted(p.name for p in folder.iterdir()))
"""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


def test_a_full_disk_is_one_clear_sentence(tmp_path: Path) -> None:
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if shutil.which("unshare") is None or _run([*alone, mount]).returncode:
        pytest.skip("needs a small file system of its own, and this user may not mount one")
    script = tmp_path.with_name(tmp_path.name + ".py")
    script.write_text(_FILL)
    done = _run([*alone, f"{mount} && exec {sys.executable} {script} {tmp_path}"])
    assert "no space left on the device" in done.stdout, done.stderr
    assert "2,000,000 bytes" in done.stdout
    assert done.stdout.endswith("before ['kept.bin']\n")


def test_unwritable_places_are_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="cannot write"):
        write_bytes(tmp_path / "file" / "below", b"x")


def test_json_is_strictly_valid() -> None:
    value = {
        "a": math.nan,
        "b": [math.inf, -math.inf],
        "c": torch.tensor([1.5]),
        3: (True, None),
        "d": Path("x"),
    }
    text = json.dumps(plain(value), allow_nan=False)
    assert json.loads(text) == {"a": None, "b": ["inf", "-inf"], "c": [1.5], "3": [True, None], "d": "x"}
    with pytest.raises(TypeError):
        plain(object())
