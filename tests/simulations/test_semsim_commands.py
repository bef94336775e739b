"""`fedattack semsim`: a labeller trained, pictures rated by it, SemSim learned from its ratings and weighed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import Result
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from fedattack.annotation import read_table, votes, write_table
from fedattack.annotation.pairs import Picture
from fedattack.errors import BadRequest
from fedattack.metrics.degradations import ARMS
from fedattack.metrics.semsim.labeller import load_labeller
from fedattack.metrics.semsim.training import load_semsim
from fedattack.rng import torch_rng
from simulations.run import app

DIGITS = load_digits()
ARM_NAMES = ("noise 0.3", "noise 1.2", "blur 1", "another image")
SIDE, COUNT = 16, 40
SMALL = ("--dataset", "digits", "--image-size", SIDE, "--set", "data.auxiliary_size=600", "--clients", 2)


def semsim(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, ["semsim", *map(str, arguments)])


def done(*arguments: object) -> str:
    """What it printed; it must have worked."""
    result = semsim(*arguments)
    assert result.exception is None, result.exception
    return " ".join(result.output.split())


def refusal(*arguments: object) -> str:
    """The one sentence that it was refused with (exit code 2)."""
    result = semsim(*arguments)
    assert isinstance(result.exception, BadRequest), result.exception
    assert "\n" not in str(result.exception)
    return str(result.exception)


def write(folder: Path, images: Tensor, labels: np.ndarray) -> Path:
    """Pictures in class folders."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        pixels = (image[0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(place / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of originals and of four degradations, a labeller, a judge, and their ratings."""
    root = tmp_path_factory.mktemp("semsim")
    images = torch.from_numpy(DIGITS.images[:COUNT]).float()[:, None] / 16
    images = functional.interpolate(images, size=SIDE, mode="bilinear").clamp(0, 1)
    folders = [write(root / "originals", images, DIGITS.target[:COUNT])]
    for name in ARM_NAMES:
        changed = dict(ARMS)[name](images, torch_rng(0, name))
        folders.append(write(root / name, changed, DIGITS.target[:COUNT]))
    done("labeller", *SMALL, "--out", root / "p1.safetensors", "--half", "first", "--steps", 80,
         "--channels", 8, "--apart-from", root / "originals", "--apart-from", root / ARM_NAMES[0])  # fmt: skip
    done("labeller", *SMALL, "--out", root / "p2.safetensors", "--name", "P2", "--half", "second",
         "--steps", 80, "--channels", 10, "--seed", 0)  # fmt: skip
    for name in ("p1", "p2"):
        done("label", *folders, "--labeller", root / f"{name}.safetensors", "--out", root / f"{name}.csv")
    done("train", root / "p1.csv", "--out", root / "s.safetensors", "--steps", 15, "--fallback",
         "--without", "attack=blur 1")  # fmt: skip
    return root


def test_ratings_of_a_classifier_say_so_in_the_table(place: Path) -> None:
    frame = read_table(place / "p1.csv")
    assert len(frame) == COUNT * len(ARM_NAMES)
    assert set(frame["annotator_type"]) == {"proxy"}
    assert set(frame["proxy_name"]) == {"P1"}
    assert set(frame["protocol"]) == {"recognise"}
    judge = load_labeller(place / "p1.safetensors")
    assert "first" in judge.facts.source
    rows = frame[frame["attack"] == "noise 0.3"]
    pixels = [np.asarray(Picture.read(Path(path)).pixels()) for path in rows["reconstruction_path"]]
    images = torch.from_numpy(np.stack(pixels)).float()[:, None] / 255
    labels = torch.tensor([int(text) for text in rows["class_label"]])
    chances = judge.true_class(images, labels)
    assert rows["confidence"].astype(float).to_numpy() == pytest.approx(chances.numpy(), abs=1e-5)
    assert (rows["label"].to_numpy(dtype=int) == (chances >= 0.5).numpy()).all()
    counted = votes(frame)
    share = counted.groupby("attack")["majority"].mean()
    assert share["another image"] < 0.3 < share["noise 0.3"]
    raw = (place / "p1.csv").read_text()
    assert "human" not in raw
    assert ",originals/0/" in raw  # paths relative to the table


def test_labeller_is_apart_from_the_other_and_from_the_originals(place: Path) -> None:
    told = done(
        "labeller", *(str(one).replace("=600", "=1400") for one in SMALL), "--out", place / "p3.safetensors",
        "--steps", 2,
        "--apart-from", place / "originals", "--apart-from", place / "noise 0.3",
    )  # fmt: skip
    assert "images are originals that are rated, and left out" in told
    one, other = (load_labeller(place / f"{name}.safetensors") for name in ("p1", "p2"))
    assert one.facts.data_hash != other.facts.data_hash
    assert one.facts.class_names == tuple("0123456789")


def test_semsim_of_a_proxy_is_named_after_it_and_stands_beside_it(place: Path) -> None:
    trained = load_semsim(place / "s.safetensors")
    assert trained.facts.heading == "SemSim-proxy[P1]"
    assert trained.facts.seen["attack"] == ("another image", "noise 0.3", "noise 1.2")
    assert len(trained.facts.originals) == 30  # a quarter is held out
    told = done(
        "evaluate", place / "s.safetensors", place / "p2.csv", "--labeller", place / "p1.safetensors",
        "--by", "attack", "--json", place / "e.json",
    )  # fmt: skip
    assert "30 of 40 originals were in the training and are left out" in told
    assert "labeller P1" in told
    assert "by proxy P2" in told
    assert "nobody looked at these images" in told
    assert "human" not in told
    found = json.loads((place / "e.json").read_text())
    assert found["originals"] == 10
    assert list(found["parts"]) == ["all", "attack seen", "attack unseen"]
    whole = found["parts"]["all"]
    assert {"labeller P1", "SemSim-proxy[P1]", "psnr", "ssim", "regcorr", "SemSim-proxy[P1] - psnr"} <= set(
        whole
    )
    assert whole["psnr"]["pearson"]["fisher"][0] < whole["psnr"]["pearson"]["value"]
    assert "by the number of groups alone (Fisher, 95 %): labeller P1 [" in told
    assert whole["psnr"]["auc"]["count"] == 40
    assert "at least 3 models" in found["parts"]["attack unseen"]["psnr"]["pearson"]["why"]
    assert "no score: a correlation needs at least 3 models or other groups; got 1" in told
    # The labeller's own figure, from the two tables alone.
    tables = [
        votes(read_table(place / f"{name}.csv")).set_index("reconstruction_path") for name in ("p1", "p2")
    ]
    chances = read_table(place / "p1.csv").set_index("reconstruction_path")["confidence"].astype(float)
    held = [
        path for path in tables[1].index
        if digest(Path(str(tables[1].loc[path, "original_path"]))) not in trained.facts.originals
    ]  # fmt: skip
    area = roc_auc_score(tables[1].loc[held, "majority"].astype(int), chances[held])
    assert whole["labeller P1"]["auc"]["value"] == pytest.approx(area, abs=1e-3)
    assert "is evaluated beside the classifier it learned from" in refusal(
        "evaluate", place / "s.safetensors", place / "p2.csv"
    )
    assert "'P2'" in refusal(
        "evaluate", place / "s.safetensors", place / "p2.csv", "--labeller", place / "p2.safetensors"
    )


def digest(path: Path) -> str:
    """As the checkpoint lists originals."""
    return hashlib.sha256(np.asarray(Image.open(path))[None].tobytes()).hexdigest()[:16]


def test_the_trained_file_is_a_metric_anywhere(place: Path) -> None:
    same = place / "originals" / "0"
    told = CliRunner().invoke(
        app,
        ["score", str(same), str(same), "--metrics", "semsim", "--out",
         str(place / "scored"), "--set", f"metric.semsim.checkpoint={place / 's.safetensors'}"],
    )  # fmt: skip
    assert told.exception is None, told.exception
    frame = pd.read_csv(place / "scored" / "records.csv")
    assert frame["semsim"].tolist() == [0.0] * len(list(same.iterdir()))  # identical folders
    assert "SemSim-proxy[P1]" in told.output


def test_a_run_is_refused_before_any_attack_without_a_fitting_checkpoint(place: Path, tmp_path: Path) -> None:
    run = ["--attack", "ig", "--metrics", "semsim", "--engine", "inline", "--run-dir", str(tmp_path / "run")]
    fits = ["--set", f"metric.semsim.checkpoint={place / 's.safetensors'}"]
    for more, sentence in (
        ([], "setting 'metric.semsim.checkpoint' is not set"),
        (["--set", "metric.semsim.checkpoint=none"], "'none': no such file"),
        (fits, "was trained on images of 1 x 16 x 16; these are of 1 x 32 x 32"),
    ):
        result = CliRunner().invoke(app, run + more)
        assert isinstance(result.exception, BadRequest), result.exception
        assert sentence in str(result.exception)
        assert not (tmp_path / "run" / "records.csv").exists()
        assert not (tmp_path / "run" / "parts").exists()


def test_people_and_proxies_are_not_pooled(place: Path, tmp_path: Path) -> None:
    frame = read_table(place / "p1.csv")
    people = frame.assign(annotator_type="human", proxy_name="", annotator_id="a1")
    write_table(tmp_path / "both.csv", pd.concat([frame, people]))
    assert "are not pooled" in refusal("train", tmp_path / "both.csv", "--out", tmp_path / "s.safetensors")
    told = done(
        "train", tmp_path / "both.csv", "--out", tmp_path / "s.safetensors", "--steps", 2, "--fallback",
        "--annotators", "human", "--rule", "sony",
    )  # fmt: skip
    assert "proxy" not in told.lower()
    facts = load_semsim(tmp_path / "s.safetensors").facts
    assert (facts.heading, facts.rule, facts.proxy) == ("SemSim", "sony", "")
    other = people.assign(protocol="match")
    write_table(tmp_path / "mixed.csv", pd.concat([people, other]))
    assert "several protocols" in refusal(
        "train", tmp_path / "mixed.csv", "--out", tmp_path / "s.safetensors"
    )


def test_bad_requests(place: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x.safetensors")
    assert "originals lack a label" in refusal("train", place / "p1.csv", *out)
    assert "unknown rule 'papr'; did you mean 'paper'?" in refusal(
        "train", place / "p1.csv", *out, "--rule", "papr"
    )
    assert "--without 'attack=x'; accepted: AXIS=VALUE with" in refusal(
        "train", place / "p1.csv", *out, "--without", "attack=x"
    )
    assert "--half 'third'" in refusal("labeller", *SMALL, *out, "--half", "third")
    assert "no such file" in refusal("label", place / "originals", place / "blur 1", "--labeller", "no", *out)
    rated = ("label", place / "originals", place / "blur 1", "--labeller", place / "p1.safetensors")
    before = (place / "p1.csv").read_bytes()
    assert "may hold ratings; give a new file" in refusal(*rated, "--out", place / "p1.csv")
    assert (place / "p1.csv").read_bytes() == before
    table = tmp_path / "t.csv"
    big = torch.zeros(2, 1, 24, 24)
    folders = [write(tmp_path / name, big, np.array([0, 1])) for name in ("a", "b")]
    assert "was trained on images of 1 x 16 x 16; these are of 1 x 24 x 24" in refusal(
        "label", *folders, "--labeller", place / "p1.safetensors", "--out", table
    )
    named = [write(tmp_path / name, big[..., :16, :16], np.array(["cat", "dog"])) for name in ("c", "d")]
    assert "class 'cat': labeller 'P1' knows 10 classes" in refusal(
        "label", *named, "--labeller", place / "p1.safetensors", "--out", table
    )
    assert "rated apart" in refusal(
        "label", place / "p1.csv", place / "blur 1", "--labeller", place / "p1.safetensors", "--out", table
    )
    seen = ("evaluate", place / "s.safetensors", place / "seen.csv", "--labeller", place / "p1.safetensors")
    frame = read_table(place / "p2.csv")
    known = set(load_semsim(place / "s.safetensors").facts.originals)
    write_table(place / "seen.csv", frame[[digest(Path(p)) in known for p in frame["original_path"]]])
    assert "all 30 originals" in refusal(*seen)
    assert not table.exists()
    assert not (tmp_path / "x.safetensors").exists()


def test_pictures_without_a_class_are_rated_by_what_the_original_shows(place: Path, tmp_path: Path) -> None:
    for name in ("originals", "noise 0.3"):
        (tmp_path / name).mkdir()
        for path in (place / name).rglob("*.png"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    told = done(
        "label", tmp_path / "originals", tmp_path / "noise 0.3", "--labeller", place / "p1.safetensors",
        "--out", tmp_path / "t.csv",
    )  # fmt: skip
    assert "the class is the one that the classifier finds in each original" in told
    frame = read_table(tmp_path / "t.csv")
    assert set(frame["protocol"]) == {"match"}
    # A table's pairs can be rated again by another, into another table.
    done("label", tmp_path / "t.csv", "--labeller", place / "p2.safetensors", "--out", tmp_path / "u.csv")
    other = read_table(tmp_path / "u.csv")
    assert other["pair_id"].tolist() == frame["pair_id"].tolist()
    assert set(other["proxy_name"]) == {"P2"}
