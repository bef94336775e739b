"""The SemSim benchmark: what presets ask for, its tables against references, killed in every step and taken up."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from adversaries import ATTACKS
from adversaries.reconstruction.matching.inverting_gradients import SEMSIM
from fedattack.annotation.table import read_table, write_table
from fedattack.defenses import build_defenses
from fedattack.errors import ConfigError, DataError
from fedattack.registry import build_plugin
from simulations.studies.classifier import SCHEDULES
from simulations.studies.semsim_benchmark import Asked, chosen_metrics, run_benchmark
from simulations.studies.semsim_presets import PRESETS, Benchmark

ROOT = Path(__file__).resolve().parents[2]

TINY: dict[str, Any] = {
    "settings": {"dataset": "digits", "auxiliary-size": 600, "data.nonmembers": 100},
    "schedule": {"epochs": 3, "batch_size": 32},
    "images": 6,
    "share": 0.5,
    "labeller": {"width": 8, "steps": 120},
    "models": [{"label": "cnn", "model": "tiny-cnn", "activation": "gelu"}, {"label": "mlp", "model": "mlp"}],
    "policies": [
        {"label": "none"},
        {"label": "moved", "defense": "transform", "defense.policy": "43-18-18", "defense.crop": False},
    ],
    "attacks": [
        {"label": "few", "attack": "ig", "ig.preset": "inversed", "ig.iterations": 4},
        {"label": "more", "attack": "ig", "ig.preset": "inversed", "ig.iterations": 60, "ig.tv": 0.01},
    ],
}
METRICS = {"metrics": "psnr,ssim,regcorr"}
TABLES = ("scores.csv", "ranking.csv", "correlations.csv", "disagreements.csv", "proxy-ratings.csv")


def tiny(**changes: Any) -> Benchmark:
    return Benchmark.from_mapping("tiny", TINY | changes)


# ---------------------------------------------------------------------- what is asked for


def test_presets_name_what_the_original_has() -> None:
    cifar10, cifar100 = Benchmark.named("cifar10"), Benchmark.named("cifar100")
    assert [one.label for one in cifar10.attacks] == list(SEMSIM)
    assert len(SEMSIM) == 13
    assert len(cifar100.classifiers) == 14
    assert (cifar100.images, cifar100.schedule) == (600, SCHEDULES["published"])
    assert len(Benchmark.named("small").classifiers) == 4
    assert len(Benchmark.named("small").attacks) == 2


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_cell_of_a_preset_is_a_valid_run(name: str) -> None:
    benchmark = Benchmark.named(name)
    cells = benchmark.sweep(
        {label: Path(f"{n}.safetensors") for n, label in enumerate(benchmark.classifiers)}
    ).cells
    assert len(cells) == len(benchmark.classifiers) * len(benchmark.attacks)
    for cell in cells[:: max(1, len(cells) // 28)]:
        config = cell.config(Path("x"), 1)
        assert config.training.batch_norm == "eval"
        assert (config.training.batch_size, config.compression.name) == (1, "none")
        assert (config.federation.clients, config.victims) == (benchmark.images, benchmark.images)
        assert config.model.weights is not None
        (attack,) = config.attack.names
        built = build_plugin(ATTACKS.get(attack), attack, config.attack.options[attack], {})
        assert built.preset == config.attack.options[attack]["preset"]
        policy = cell.labels["classifier"].rpartition(" · ")[2]
        assert (list(build_defenses(config.defense)) == []) == (policy == "none")


def test_published_noise_and_pruning_act_on_the_attacked_gradient() -> None:
    cells = (
        Benchmark.named("cifar100")
        .sweep({label: Path(f"{n}") for n, label in enumerate(Benchmark.named("cifar100").classifiers)})
        .cells
    )
    defences = {c.labels["classifier"]: build_defenses(c.config(Path("x"), 1).defense) for c in cells}
    noise, pruned = defences["ConvNet · gaussian_1e-3"]["clip-noise"], defences["ConvNet · prune_70"]["prune"]
    assert (noise.clip_norm, noise.noise, noise.unit) == (None, 1e-3, "update")
    assert (pruned.share, pruned.scope) == (0.7, "layer")
    assert defences["ConvNet · crop"]["transform"].policy == ""


def test_half_the_cross_entropy_is_made_up_for_beside_total_variation() -> None:
    """0.25 d + w tv and d + 4 w tv have one minimum: squared distances; absolute ones twice; cosines as they are."""
    tv = {
        one.label: one.settings.get("ig.tv", SEMSIM[one.label].tv)
        for one in Benchmark.named("cifar10").attacks
    }
    factors = {name: tv[name] / SEMSIM[name].tv for name in SEMSIM}
    assert {name: factor for name, factor in factors.items() if factor != 1} == {
        "inversed-adam-L1": 2.0, "inversed-adam-L2": 4.0, "zhu": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": []}, "did you mean 'models'"),
        ({"models": []}, "a list of one or more tables"),
        ({"models": [{"model": "mlp"}]}, "has no 'label'"),
        ({"policies": [{"label": "a"}, {"label": "a"}]}, "called the same"),
        ({"schedule": "long"}, "unknown schedule 'long'"),
        ({"schedule": {"epoch": 3}}, "did you mean 'schedule.epochs'"),
        ({"labeller": {"steps": 0}}, "labeller.steps"),
        ({"images": 0}, "setting 'images' = 0"),
        ({"share": 1.5}, "setting 'share' = 1.5"),
        ({"settings": 3}, "a table is accepted"),
    ],
)  # fmt: skip
def test_bad_benchmarks_are_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        tiny(**changes)


def test_files_and_names(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('images = 2\n[[models]]\nlabel = "m"\nmodel = "mlp"\n[[policies]]\nlabel = "none"\n'
                    '[[attacks]]\nlabel = "a"\nattack = "ig"\n')  # fmt: skip
    own = Benchmark.named(str(path))
    assert (own.name, list(own.classifiers), own.images) == ("own", ["m · none"], 2)
    for name, part in (
        ("tiny", "small, cifar10, cifar100 or a .toml file"),
        (str(tmp_path / "no.toml"), "not exist"),
    ):
        with pytest.raises(ConfigError, match=part):
            Benchmark.named(name)
    path.write_text("[[")
    with pytest.raises(ConfigError, match="not readable TOML"):
        Benchmark.named(str(path))


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    place = tmp_path / "out"
    for asked, benchmark, part in (
        (Asked(step="attacks"), tiny(), "classifier 'cnn · none' is not trained"),
        (Asked(step="ranking"), tiny(), "run --step classifiers first"),
        (Asked(annotations=tmp_path / "no.csv"), tiny(), "cannot read the table"),
        (Asked(metrics={"metrics": "psnr,lpip"}), tiny(), "did you mean 'lpips'"),
        (Asked(metrics={"metrics": "ms-ssim"}), tiny(), "ms-ssim"),
        (Asked(), tiny(attacks=[{"label": "a", "attack": "igg"}]), "igg"),
        (Asked(), tiny(attacks=[{"label": "a", "attack": "fedmia"}]), "not fedmia"),
        (Asked(), tiny(models=[{"label": "m", "model": "resnt18"}]), "did you mean 'resnet18'"),
        (Asked(), tiny(settings={"dataset": "digits", "auxiliary-size": 5000}), "leave none for the clients"),
    ):
        with pytest.raises((ConfigError, DataError), match=part):
            run_benchmark(benchmark, place, asked)
        assert not place.exists()
    with pytest.raises(ConfigError, match="classifiers, attacks, scores, ranking are accepted"):
        Asked(step="train")


def test_metrics_that_need_nothing_are_chosen_and_the_others_told() -> None:
    found, left_out = chosen_metrics({}, (3, 32, 32))
    assert {"psnr", "ssim", "regcorr", "registered-psnr", "ssim-gaussian", "identified"} <= set(found)
    assert "needs a file" in left_out["lpips"]
    assert "161" in left_out["ms-ssim"]
    assert list(chosen_metrics({"metrics": "ssim,psnr"}, (3, 32, 32))[0]) == ["ssim", "psnr"]
    overlap = chosen_metrics({"metric.regcorr.overlap": "0.5"}, (3, 32, 32))[0]["regcorr"]
    assert overlap.overlap == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"metric\.semsim\.checkpoint"):
        chosen_metrics({"metric.semsim.checkpoint": "x"}, (3, 32, 32))
    with pytest.raises(ConfigError, match="a value of the whole set"):
        chosen_metrics({"metrics": "frechet"}, (3, 32, 32))


# ---------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("benchmark") / "whole"
    page = run_benchmark(tiny(), place, Asked(metrics=METRICS, engine="inline"))
    assert page == place / "index.html"
    return place


@pytest.mark.slow
def test_its_tables_are_those_of_references(whole: Path) -> None:
    scores = pd.read_csv(whole / "scores.csv")
    ratings = read_table(whole / "proxy-ratings.csv")
    assert len(scores) == len(ratings) == 2 * 2 * 2 * 6
    assert set(ratings["annotator_type"]) == {"proxy"}
    scores["recognised"] = ratings["label"].to_numpy(int)
    correlations = pd.read_csv(whole / "correlations.csv")

    def told(metric: str, over: str, statistic: str) -> float:
        found = correlations[
            (correlations.metric == metric)
            & (correlations.over == over)
            & (correlations.statistic == statistic)
        ]
        return float(found["value"].iloc[0])

    assert 0 < scores["recognised"].mean() < 1
    for metric in ("psnr", "ssim", "regcorr"):
        area = roc_auc_score(scores["recognised"], scores[metric])
        assert told(metric, "pairs", "auc") == pytest.approx(area, abs=1e-9)
        for over, by in (
            ("classifiers", ["model", "defence"]),
            ("classifiers and attacks", ["model", "defence", "attack"]),
        ):
            means = scores.groupby(by)[[metric, "recognised"]].mean()
            for statistic, reference in (
                ("spearman", stats.spearmanr), ("kendall", stats.kendalltau), ("pearson", stats.pearsonr)
            ):  # fmt: skip
                wanted = reference(means[metric], means["recognised"]).statistic
                assert told(metric, over, statistic) == pytest.approx(wanted, abs=1e-9)
    compared = told("ssim", "pairs", "auc - psnr")
    assert compared == pytest.approx(told("ssim", "pairs", "auc") - told("psnr", "pairs", "auc"), abs=1e-9)
    ranking = pd.read_csv(whole / "ranking.csv")
    shares = scores.groupby(["model", "defence"])["recognised"].mean()
    assert list(ranking["share"]) == sorted(shares, reverse=True)
    for row in ranking.to_dict("records"):
        assert row["share"] == pytest.approx(shares[row["model"], row["defence"]])
        mine = scores[(scores.model == row["model"]) & (scores.defence == row["defence"])]
        assert row["ssim"] == pytest.approx(mine["ssim"].mean())


@pytest.mark.slow
def test_a_transformed_image_is_scored_against_what_was_shown_too(whole: Path) -> None:
    scores = pd.read_csv(whole / "scores.csv")
    moved = scores["defence"] == "moved"
    assert scores.loc[~moved, "shown.psnr"].isna().all()
    more = moved & (scores["attack"] == "more") & (scores["model"] == "mlp")
    assert scores.loc[more, "shown.psnr"].mean() > scores.loc[more, "psnr"].mean() + 1


@pytest.mark.slow
def test_disagreements_are_rank_differences(whole: Path) -> None:
    scores, told = pd.read_csv(whole / "scores.csv"), pd.read_csv(whole / "disagreements.csv")
    places = np.stack(
        [(stats.rankdata(scores[name]) - 1) / (len(scores) - 1) for name in ("psnr", "ssim", "regcorr")]
    )
    spread = np.sort(places.max(0) - places.min(0))[::-1]
    assert told["spread"].to_numpy() == pytest.approx(spread)
    assert told["place by psnr"].between(0, 1).all()


@pytest.mark.slow
def test_the_page_says_proxy_and_shows_the_pairs(whole: Path) -> None:
    text = (whole / "index.html").read_text()
    assert "no human took part" in text
    assert "the proxy recognises" in text.lower()
    assert "recognised by the proxy" in text
    assert text.count('alt="Reconstruction, ') == 6  # one an original
    assert "Fisher" in text
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.slow
def test_ratings_of_people_take_the_proxys_place(whole: Path, tmp_path: Path) -> None:
    """Told is what they say, pairs that they did not rate or disagree about count for nothing."""
    table = read_table(whole / "proxy-ratings.csv")
    few = table[table["attack"] == "more"].copy()
    few["annotator_type"], few["proxy_name"], few["annotator_id"] = "human", "", "a1"
    few["label"] = (few["model"] == "mlp").astype("Int64")
    second = few.assign(annotator_id="a2")
    second.loc[second.index[0], "label"] = 1 - second.loc[second.index[0], "label"]
    path = tmp_path / "ratings.csv"
    write_table(path, pd.concat([few, second]))
    asked = Asked("ranking", path, metrics=METRICS, engine="inline")
    page = run_benchmark(tiny(), whole, asked)
    assert page is not None
    ranking = pd.read_csv(whole / "ranking.csv").set_index(["model", "defence"])
    assert ranking.loc[("mlp", "none"), "share"] == 1
    assert ranking.loc[("cnn", "moved"), "share"] == 0
    assert ranking["rated"].sum() == len(few) - 1
    text = page.read_text()
    assert "the majority of annotators" in text
    assert "no human took part" not in text
    assert f"{len(table) - len(few) + 1} of {len(table)} pairs have no rating" in text
    write_table(path, pd.concat([table, few]))
    with pytest.raises(DataError, match="human and proxy, never pooled"):
        run_benchmark(tiny(), whole, asked)
    proxies = dataclasses.replace(asked, annotators="proxy")
    assert "no human took part" in run_benchmark(tiny(), whole, proxies).read_text()  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no rating by annotators of type 'people'"):
        run_benchmark(tiny(), whole, dataclasses.replace(asked, annotators="people"))
    foreign = few.assign(reconstruction_sha256="0" * 64, pair_id="other")
    write_table(path, foreign.drop_duplicates("pair_id"))
    with pytest.raises(DataError, match="rates no pair of this benchmark"):
        run_benchmark(tiny(), whole, asked)


@pytest.mark.slow
def test_more_metrics_need_no_new_attack(whole: Path, tmp_path: Path) -> None:
    cells = whole / "attacks" / "cells"
    before = {path: path.stat().st_mtime_ns for path in cells.rglob("*.safetensors")}
    asked = {"metrics": {"metrics": "mse,tv"}, "engine": "inline"}
    with pytest.raises(ConfigError, match="run --step scores first"):
        run_benchmark(tiny(), whole, Asked("ranking", **asked))
    run_benchmark(tiny(), whole, Asked("scores", **asked))
    run_benchmark(tiny(), whole, Asked("ranking", **asked))
    assert set(pd.read_csv(whole / "correlations.csv")["metric"]) == {"mse", "tv"}
    assert {path: path.stat().st_mtime_ns for path in cells.rglob("*.safetensors")} == before
    mse = pd.read_csv(whole / "scores.csv")
    ratings = read_table(whole / "proxy-ratings.csv")["label"].to_numpy(int)
    area = (
        pd.read_csv(whole / "correlations.csv")
        .query("metric == 'mse' and statistic == 'auc'")["value"]
        .iloc[0]
    )
    assert area == pytest.approx(roc_auc_score(ratings, -mse["mse"]))  # lower: more leaked


KILLS = {
    "classifiers": ("simulations.studies.classifier", "_keep", 4),  # in the second one's training
    "attacks": ("fedattack.storage.run_folder", "write_tensors", 8),  # with answers of the second cell
    "scores": ("simulations.studies.semsim_benchmark", "write_json", 3),
    "labeller": ("simulations.studies.semsim_benchmark", "save_labeller", 1),
    "ranking": ("simulations.studies.semsim_ranking", "write_bytes", 2),
}
"""Step -> a function of a module, and after which call of it the process is killed."""

DRIVER = """
import importlib, os, signal, sys
from pathlib import Path
from test_semsim_benchmark import METRICS, tiny
from simulations.studies.semsim_benchmark import Asked, run_benchmark
place, module, name, calls = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
if calls:
    found = importlib.import_module(module)
    real, count = getattr(found, name), [0]
    def killing(*given, **named):
        result = real(*given, **named)
        count[0] += 1
        if count[0] == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(found, name, killing)
run_benchmark(tiny(), place, Asked(metrics=METRICS, engine="inline"))
"""


@pytest.mark.slow
def test_killed_in_every_step_and_started_again_the_tables_are_the_same(whole: Path, tmp_path: Path) -> None:
    run_benchmark(tiny(), whole, Asked("scores", metrics=METRICS, engine="inline"))
    run_benchmark(tiny(), whole, Asked("ranking", metrics=METRICS, engine="inline"))
    place = tmp_path / "killed"
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def started(module: str, name: str, calls: int) -> int:
        command = [sys.executable, "-c", DRIVER, str(place), module, name, str(calls)]
        return subprocess.run(
            command, env=environment, capture_output=True, timeout=600, check=False
        ).returncode

    for step, kill in KILLS.items():
        assert started(*kill) == -signal.SIGKILL, step
        assert not (place / "index.html").exists()
    assert (place / "ranking.csv").exists()
    assert not (place / "disagreements.csv").exists()
    assert started("", "", 0) == 0
    for name in TABLES:
        assert (place / name).read_bytes() == (whole / name).read_bytes(), name
    assert not math.isnan(pd.read_csv(place / "correlations.csv")["value"].iloc[0])
