"""`fedattack gan`: a generator trained, sampled, attacked and weighed, and anybody's images likewise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import Result
from PIL import Image
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from typer.testing import CliRunner

from fedattack.errors import BadRequest, DataError
from fedattack.generative import load_gan
from fedattack.metrics.frechet import frechet_distance
from fedattack.metrics.synthetic import Judge, Labelled, worth
from fedattack.rng import torch_rng
from simulations.run import app

DIGITS = load_digits()
ORDER = np.random.default_rng(0).permutation(
    len(DIGITS.target)
)  # as they lie there, writers follow one another
PIXELS = np.rint(DIGITS.images[ORDER] * 255 / 16).astype(np.uint8)
LABELS = DIGITS.target[ORDER]


def gan(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, ["gan", *map(str, arguments)])


def done(*arguments: object) -> str:
    """What it printed; it must have worked."""
    result = gan(*arguments)
    assert result.exception is None, result.exception
    return result.output


def refusal(*arguments: object) -> str:
    """The one sentence that it was refused with (exit code 2)."""
    result = gan(*arguments)
    assert isinstance(result.exception, BadRequest), result.exception
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits, in which full-black-box sat."""
    folder = tmp_path_factory.mktemp("gan") / "run"
    done(
        *(
            "train",
            "--dataset",
            "digits",
            "--width",
            32,
            "--batch-size",
            32,
            "--rounds",
            2,
            "--local-steps",
            50,
        ),
        *(
            "--limit",
            600,
            "--auxiliary-size",
            200,
            "--set",
            "data.nonmembers=120",
            "--set",
            "attack.candidates=100",
        ),
        *("--attack", "full-black-box", "--set", "full-black-box.samples=300", "--run-dir", folder),
    )
    return folder


def save(folder: Path, images: np.ndarray) -> Path:
    """Images as PNG files."""
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def leaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Candidates beside synthetic images that are the members with noise, and a reference of other people's."""
    root = tmp_path_factory.mktemp("images")
    save(root / "candidates" / "members", PIXELS[:60])
    save(root / "candidates" / "non-members", PIXELS[60:120])
    noise = np.random.default_rng(0).normal(0, 30, (300, 8, 8))
    made = np.clip(PIXELS[np.arange(300) % 60] + noise, 0, 255).astype(np.uint8)
    np.savez(root / "synthetic.npz", images=made)
    np.save(root / "reference.npy", np.clip(PIXELS[200:500] + noise, 0, 255).astype(np.uint8) / 255.0)
    save(root / "public", PIXELS[600:700])
    return root


def test_samples_are_the_generators(trained: Path, tmp_path: Path) -> None:
    told = done("sample", trained, "--count", 1203, "--out", tmp_path / "a", "--png", "--seed", 5)
    with np.load(tmp_path / "a" / "images.npz", allow_pickle=False) as held:
        images = held["images"]
    assert images.shape == (1203, 8, 8)
    assert images.dtype == np.uint8
    nets, _ = load_gan(trained / "generator.safetensors")
    draws = torch_rng(5, "gan sample")
    made = torch.cat([nets.sample(count, draws) for count in (500, 500, 203)])[:, 0]
    assert np.array_equal(images, (made * 255).round().byte().numpy())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "png" / "001202.png")), images[1202])
    assert np.asarray(Image.open(tmp_path / "a" / "sheet.png")).shape[:2] == (8 * 8, 16 * 8)
    assert "samples are distinct" in told
    checkpoint = trained / "generator.safetensors"
    assert "different pictures" in done("sample", checkpoint, "--count", 20, "--out", tmp_path / "b")
    assert "is there already" in refusal("sample", trained, "--out", tmp_path / "a")


def test_a_run_attacked_later_gives_its_own_scores(trained: Path, tmp_path: Path) -> None:
    told = done(
        *("attack", trained, "--attack", "full-black-box,full-black-box-calibrated,monte-carlo"),
        *("--set", "attack.samples=300", "--run-dir", tmp_path / "again"),
    )
    theirs, ours = (pd.read_csv(folder / "records.csv") for folder in (trained, tmp_path / "again"))
    again = ours[ours.attack == "full-black-box"].reset_index(drop=True)
    pd.testing.assert_frame_equal(theirs, again)
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert set(summary["attacks"]) == {"full-black-box", "full-black-box-calibrated", "monte-carlo"}
    floors = summary["attacks"]["full-black-box"]["floors"]
    assert {"chance", "null control, members", "pixels alone"} <= set(floors)
    assert "AUC" in told
    page = (tmp_path / "again" / "report.html").read_text()
    assert "How much do these images leak?" in page
    assert (tmp_path / "again" / "figures" / "nearest.png").is_file()
    assert "images of the generator of round" in page
    # Started again on another question, the folder is not overwritten.
    assert "holds a run with other settings" in refusal(
        *("attack", trained, "--attack", "critic", "--run-dir", tmp_path / "again")
    )


def test_anybodys_images_are_scored(leaking: Path, tmp_path: Path) -> None:
    told = done(
        *("attack", "--synthetic", leaking / "synthetic.npz", "--candidates", leaking / "candidates"),
        *(
            "--reference",
            leaking / "reference.npy",
            "--public",
            leaking / "public",
            "--run-dir",
            tmp_path / "out",
        ),
    )
    rows = pd.read_csv(tmp_path / "out" / "records.csv")
    with np.load(leaking / "synthetic.npz") as held:
        made = held["images"].reshape(300, -1) / 255 * 2 - 1
    asked = PIXELS[:120].reshape(120, -1) / 255 * 2 - 1
    reference = np.rint(np.load(leaking / "reference.npy") * 255).reshape(300, -1) / 255 * 2 - 1
    near, far = (NearestNeighbors(n_neighbors=1).fit(x).kneighbors(asked)[0][:, 0] for x in (made, reference))
    members = np.arange(120) < 60
    expected = {"full-black-box": -near, "full-black-box-calibrated": far - near}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name, scores in expected.items():
        found = rows[rows.attack == name].sort_values("sample")
        assert found["score"].to_numpy() == pytest.approx(scores, abs=1e-5)
        assert (found["is_member"].to_numpy() == members).all()
        area = summary["attacks"][name]["metrics"]["auc"]["mean"]
        assert area == pytest.approx(roc_auc_score(members, scores), abs=1e-12)
    assert summary["attacks"]["full-black-box"]["level"] == "leak"
    # Those that read images alone; others are refused by name, and calibration without a reference by its option.
    assert set(rows.attack) == {*expected, "monte-carlo", "domias"}
    assert "identified" in told
    named = ("--synthetic", leaking / "synthetic.npz", "--candidates", leaking / "candidates", "--attack")
    assert "needs the latents and the generator" in refusal("attack", *named, "white-box")
    assert "give --reference" in refusal("attack", *named, "full-black-box-calibrated")
    assert "give --public" in refusal("attack", *named, "domias")


def test_without_truth_there_is_a_list_and_no_verdict(leaking: Path, tmp_path: Path) -> None:
    flat = save(tmp_path / "flat", PIXELS[50:70])
    told = done(
        *("attack", "--synthetic", leaking / "synthetic.npz", "--candidates", flat),
        *("--attack", "full-black-box", "--run-dir", tmp_path / "out"),
    )
    assert "nothing is scored" in told
    assert "leak" not in told
    listed = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert (listed["full-black-box"].diff().dropna() <= 0).all()
    assert listed["full-black-box"].to_numpy() == pytest.approx(-2 * listed["distance"].to_numpy())
    assert set(listed["candidate"][:10]) == {f"{number:04d}.png" for number in range(10)}  # members 50 to 59
    assert not (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "figures" / "nearest.png").is_file()


def test_people_are_exposed(leaking: Path, tmp_path: Path) -> None:
    for number in range(120):
        side = "members" if number < 60 else "non-members"
        place = tmp_path / "candidates" / side / f"writer-{number // 6}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[number]).save(place / f"{number}.png")
    asked = ("--synthetic", leaking / "synthetic.npz", "--candidates", tmp_path / "candidates")
    done("attack", *asked, "--people", "--attack", "full-black-box", "--run-dir", tmp_path / "out")
    rows = pd.read_csv(tmp_path / "out" / "records.csv")
    assert rows.groupby("group").size().tolist() == [6] * 20
    assert rows.groupby("group")["is_member"].nunique().eq(1).all()
    flat = ("--synthetic", leaking / "synthetic.npz", "--candidates", leaking / "candidates")
    assert "as --people says" in refusal("attack", *flat, "--people")


def test_images_that_cannot_be_asked_about(leaking: Path, tmp_path: Path) -> None:
    known, asked = leaking / "synthetic.npz", leaking / "candidates"

    def of(candidates: Path, synthetic: Path = known, *more: object) -> str:
        return refusal("attack", "--synthetic", synthetic, "--candidates", candidates, *more)

    assert "16 x 16" in of(save(tmp_path / "large", PIXELS[:3].repeat(2, 1).repeat(2, 2)))
    assert "3 x 8 x 8" in of(save(tmp_path / "colour", np.stack([PIXELS[:3]] * 3, -1)))
    assert "square ones are accepted" in of(save(tmp_path / "oblong", PIXELS[:3, :6]))
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in of(tmp_path / "empty")
    assert "no such file or folder" in of(tmp_path / "nowhere")
    np.savez(tmp_path / "scaled.npz", images=PIXELS[:50].astype(float))
    assert "must lie in [0, 1]; got 0 to 255" in of(asked, tmp_path / "scaled.npz")
    np.savez(tmp_path / "dark.npz", images=(PIXELS[:50] > 128).astype(np.uint8))
    assert "run from 0 to 1" in of(asked, tmp_path / "dark.npz")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "of plain arrays" in of(asked, tmp_path / "objects.npy")
    save(tmp_path / "half" / "members", PIXELS[:3])
    assert "no 'non-members'" in of(tmp_path / "half")
    both = tmp_path / "both"
    save(both / "members", PIXELS[:30])
    save(both / "non-members", PIXELS[29:60])
    assert "is among members and non-members (1 such)" in of(both)
    for name in ("reference", "public"):
        assert f"also among the {name} images (60 such)" in of(asked, known, f"--{name}", asked / "members")
    few = ("--attack", "full-black-box", "--set", "full-black-box.neighbours=301")
    assert "300 synthetic images" in of(asked, known, *few)
    assert "all images of --synthetic are looked at" in of(
        asked, known, "--set", "attack.samples=10", *few[:2]
    )
    assert "no federation to set up" in of(asked, known, "--set", "federation.clients=3")
    assert "reads a federation while it trains" in of(asked, known, "--attack", "fedmia")
    assert "nobody is asked about" in refusal("attack", "--synthetic", known)
    assert "one of the two" in refusal("attack")


def test_runs_that_cannot_be_asked_about(trained: Path, tmp_path: Path) -> None:
    assert "no run folder" in refusal("attack", tmp_path)
    assert "has its own" in refusal("attack", trained, "--seed", 3)
    assert "--set attack.candidates=N" in refusal("attack", trained, "--candidates", tmp_path)
    config = (trained / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(config)
    assert "no such file" in refusal("attack", tmp_path)
    (tmp_path / "generator.safetensors").write_bytes((trained / "generator.safetensors").read_bytes())
    assert "was not finished: of 2 rounds, 0 are in" in refusal("attack", tmp_path)
    (tmp_path / "config.toml").write_text(config.replace('task = "wgan-gp"', 'task = "classify"'))
    assert "trained no generator" in refusal("attack", tmp_path)
    (tmp_path / "config.toml").write_text(config.replace("width = 32", "width = 16"))
    (tmp_path / "journal").symlink_to(trained / "journal")
    assert "other nets than" in refusal("attack", tmp_path)
    assert "accepted: wgan-gp" in refusal("train", "--task", "classify")


def test_evaluation_of_a_run(trained: Path, tmp_path: Path) -> None:
    told = done(
        "evaluate", trained, "--count", 400, "--set", "attack.samples=300", "--run-dir", tmp_path / "out"
    )
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(found["leak"]) == {"full-black-box", "full-black-box-calibrated"}
    assert found["test images"] == 120
    assert found["synthetic images"] == 400
    assert found["accuracy"]["trained on"] == 200  # as many as there are public ones
    assert found["judge"] == {
        "model": "scikit-learn MLPClassifier, one hidden layer of 128 ReLU, on pixels",
        "seed": 0,
        "training images": 200,
    }
    assert "The generator has no labels: a teacher says" in " ".join(told.split())
    assert "AUC full-black-box-calibrated" in told


def test_evaluation_of_anybodys_images(leaking: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", images=PIXELS[700:1300], labels=LABELS[700:1300])
    images = ("--synthetic", leaking / "synthetic.npz")
    done("evaluate", *images, "--public", tmp_path / "real.npz", "--run-dir", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["leak"] == {}
    assert found["test images"] == 200
    assert "no labels" in refusal("evaluate", *images, "--public", leaking / "public")
    assert "--public is missing" in refusal("evaluate", *images)


def _labelled(start: int, stop: int) -> Labelled:
    return Labelled(torch.from_numpy(PIXELS[start:stop, None] / 255.0).float(), LABELS[start:stop])


@pytest.mark.slow
def test_worth_of_real_images_noise_and_a_single_digit() -> None:
    public, test = _labelled(0, 300), _labelled(300, 900)
    good = worth(_labelled(900, 1200).images, public, test, 0)
    noise = worth(torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)), public, test, 0)
    ones = test.images[test.labels == 1]
    single = worth(ones[:1].repeat(100, 1, 1, 1), public, test, 0)
    assert good["accuracy"]["trained on"] == 300
    assert good["accuracy"]["synthetic"]["mean"] > good["accuracy"]["real"]["low"] - 0.03
    assert noise["accuracy"]["synthetic"]["mean"] < 0.6 < good["accuracy"]["synthetic"]["mean"]
    assert good["classes"]["found"] == 10
    assert single["classes"]["found"] == 1
    assert single["classes"]["rarest"] == 0
    assert single["accuracy"]["synthetic"]["mean"] == pytest.approx((test.labels == 1).mean())
    assert good["frechet"]["distance"] < 2 * good["frechet"]["floor"] < noise["frechet"]["distance"] / 4
    # Sureness and features, worked out from the network's own weights.
    judge = Judge(public.images, public.labels, 0)
    (first, last), (bias, offset) = judge._net.coefs_, judge._net.intercepts_
    hidden = np.maximum(test.images.flatten(1).numpy() @ first + bias, 0)
    assert judge.features(test.images) == pytest.approx(hidden)
    logits = hidden @ last + offset
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    assert good["sure"]["real"] == pytest.approx((shares.max(1) > 0.9).mean())
    assert good["accuracy"]["teacher"]["mean"] == pytest.approx((shares.argmax(1) == test.labels).mean())
    with pytest.raises(DataError, match="no test images"):
        worth(public.images, public, Labelled(test.images[:0], test.labels[:0]), 0)


def test_frechet_distance_of_normal_samples() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    other = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
    a, b = np.cov(one.T), np.cov(other.T)
    by_root = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(one, other) == pytest.approx(by_root, rel=1e-8)
    scaled = 3 * one + 2  # C2 = 9 C1: (2 + 2 mean)^2 + tr(C1) (1 + 9 - 6)
    closed = np.square(2 + 2 * one.mean(0)).sum() + 4 * np.trace(a)
    assert frechet_distance(one, scaled) == pytest.approx(closed, rel=1e-8)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one[:4], one[4:8]) > 0  # fewer images than features: singular
    with pytest.raises(DataError, match="at least 2"):
        frechet_distance(one[:1], other)
