"""Tables, summary, figures, terminal and the report, from audits of made-up victims."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from audit_scenes import scored
from PIL import Image
from rich.console import Console

from fedattack.audit import AuditResult, audit_membership, audit_reconstruction, audit_unlearning
from fedattack.config import CompressionConfig, Config, ModelConfig, TrainingConfig
from fedattack.groundtruth import GroundTruth
from fedattack.observation import Auxiliary, Observation, Reconstruction, Scenario, Update
from fedattack.reporting import figures, formats
from fedattack.reporting.report import write_results
from fedattack.reporting.terminal import print_summary
from fedattack.storage import RunFolder
from fedattack.storage.records import records_frame

FEDERATION = {
    "clients": 4,
    "rounds": [
        {
            "round": 1,
            "loss": 2.3,
            "accuracy": 0.11,
            "train_loss": None,
            "answered": 4,
            "wire_bytes": 4000,
            "seconds": 1.0,
        },
        {
            "round": 2,
            "loss": 1.9,
            "accuracy": 0.35,
            "train_loss": 2.0,
            "answered": 3,
            "wire_bytes": 3000,
            "seconds": 1.0,
        },
    ],
    "rejections": [{"round": 2, "client": 3, "reason": "value 5 is NaN <script>alert(1)</script>"}],
}


def reconstruction_result(
    sigma: float = 0.01, victims: int = 4, name: str = "hcgla", channels: int = 3
) -> AuditResult:
    generator = torch.Generator().manual_seed(0)
    model = ModelConfig(name="tiny-cnn", classes=10, channels=channels, image_size=12, activation="relu")
    scenario = Scenario(model, TrainingConfig(), CompressionConfig(rate=0.5))
    weights = {"w": torch.zeros(10, 4), "b": torch.zeros(10)}
    update = Update(("w", "b"), ((10, 4), (10,)), torch.arange(0, 50, 2), torch.ones(25))
    public = Auxiliary(torch.rand(5, channels, 12, 12, generator=generator), None, "faces of <others>")
    observations, answers, truths = [], [], []
    for client in range(victims):
        images = torch.rand(1, channels, 12, 12, generator=generator)
        label = torch.tensor([client])
        observations.append(Observation(1, client, scenario, weights, update, 1, 100, public))
        truths.append(GroundTruth(1, client, images, label, (client,)))
        rebuilt = (images + sigma * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        prior = torch.full_like(images, 0.4)
        answers.append(Reconstruction(rebuilt, label, 0.5, history=[3.0, 1.0, 0.5], floors={"prior": prior}))
    return audit_reconstruction(name, observations, answers, truths, 2.0)


@pytest.fixture(scope="module")
def results() -> list[AuditResult]:
    rng = np.random.default_rng(0)
    member = np.arange(200) < 100
    asked = [scored(rng.normal(size=200) + member, member, 2)]
    return [
        reconstruction_result(),
        audit_membership("fedmia", asked, statistic="loss", seconds=1.0),
        audit_unlearning(
            "unlearn-max-loss",
            {"before": [0.9, 0.91], "after": [0.7, 0.72], "random": [0.89, 0.9]},
            requests=5,
            mechanism="retrain",
        ),
    ]


@pytest.fixture(scope="module")
def written(results: list[AuditResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = RunFolder.create(tmp_path_factory.mktemp("run") / "one", Config())
    report = write_results(
        folder,
        results,
        FEDERATION,
        command="fedattack --attack hcgla --seed 0",
        label_counts={0: {1: 5}, 1: {2: 7, 3: 1}},
        notes=["untrained model"],
    )
    assert report == folder.path / "report.html"
    return folder.path


def test_records_are_one_table(written: Path) -> None:
    frame, text = pd.read_parquet(written / "records.parquet"), pd.read_csv(written / "records.csv")
    assert len(frame) == len(text) == 4 + 200 + 2 * 5
    assert frame["client"].dtype == "Int64"
    assert frame["label_right"].dtype == "boolean"
    assert frame["psnr"].dtype == "float64"
    assert frame.loc[0, "psnr"] == pytest.approx(text.loc[0, "psnr"])
    assert frame["is_member"].sum() == 100
    assert json.loads(frame.loc[0, "kept_per_layer"]) == {"w": 20, "b": 5}


def test_column_types_do_not_depend_on_the_run(results: list[AuditResult]) -> None:
    alone, mixed = records_frame(results[:1]), records_frame(results)
    assert all(alone[name].dtype == mixed[name].dtype for name in alone.columns)
    assert records_frame([]).empty


def test_summary_is_strict_json_and_complete(written: Path, results: list[AuditResult]) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(token)

    document = json.loads((written / "summary.json").read_text(), parse_constant=refuse)
    assert document["config"] == Config().model_dump(mode="json")
    assert document["federation"]["rejections"] == FEDERATION["rejections"]
    attack = document["attacks"]["hcgla"]
    assert (attack["family"], attack["count"], attack["k"]) == ("reconstruction", 4, 25)
    assert attack["k_per_pixel"] == pytest.approx(25 / 432)
    assert attack["verdict"] == results[0].verdict
    assert set(attack["floors"]) == {"flat grey", "auxiliary mean", "prior"}
    psnrs = [row["psnr"] for row in results[0].records]
    assert attack["metrics"]["psnr"]["mean"] == pytest.approx(np.mean(psnrs))
    assert attack["metrics"]["psnr"]["worst"] == pytest.approx(min(psnrs))
    assert document["attacks"]["fedmia"]["floors"]["chance"]["auc"]["mean"] == 0.5


def test_identical_images_survive_as_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Config())
    write_results(folder, [reconstruction_result(sigma=0.0)])
    psnr = json.loads((folder.path / "summary.json").read_text())["attacks"]["hcgla"]["metrics"]["psnr"]
    assert (psnr["mean"], psnr["best"], psnr["identical"], psnr["low"]) == ("inf", "inf", 4, None)
    assert "∞" in (folder.path / "report.html").read_text()


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data


def test_the_report_stands_alone(written: Path) -> None:
    source = (written / "report.html").read_text()
    page = _Page(source)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key == "src"]
    assert len(addresses) == 7
    for address in addresses:
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert "url(" not in source
    assert "@import" not in source
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_the_report_says_what_matters_in_order(written: Path, results: list[AuditResult]) -> None:
    page = _Page((written / "report.html").read_text())
    assert [h.split(",")[0] for h in page.headings] == [
        "Verdicts",
        "Results",
        "Pictures",
        "What the attacker saw",
        "The federation",
        "This run",
        "Every figure",
        "How to read this page",
    ]
    assert page.text.index("worst found: ") < page.text.index("Verdicts", page.text.index("worst found: "))
    for result in results:
        headline, _, explanation = result.verdict.partition(": ")
        assert page.text.index(headline) < page.text.index(explanation) < page.text.index("Results, beside")
    assert "floor: auxiliary mean" in page.text
    assert "25 of 50 numbers, 50 %" in page.text
    assert "5 public images without labels; source: faces of <others>" in page.text
    assert "value 5 is NaN <script>alert(1)</script>" in page.text
    assert "fedattack --attack hcgla --seed 0" in page.text
    assert "untrained model" in page.text


def test_a_run_without_attacks_still_reports(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Config())
    page = _Page(write_results(folder, [], FEDERATION).read_text())
    assert "No attack was part of this run" in page.text
    assert page.headings == ["The federation", "This run, and how to repeat it", "How to read this page"]


def test_failed_attacks_are_reported(tmp_path: Path) -> None:
    model = ModelConfig(name="tiny-cnn", classes=10, channels=1, image_size=8, activation="relu")
    update = Update(("w",), ((4,),), None, torch.ones(4))
    seen = Observation(
        1, 0, Scenario(model, TrainingConfig(), CompressionConfig()), {"w": torch.zeros(4)}, update, 1
    )
    truth = GroundTruth(1, 0, torch.rand(1, 1, 8, 8), torch.tensor([1]), (0,))
    failed = audit_reconstruction("weak", [seen], [None], [truth], 1.0)
    page = _Page(write_results(RunFolder.create(tmp_path / "run", Config()), [failed]).read_text())
    assert "the attack failed" in page.text
    console = Console(width=100, file=io.StringIO())
    print_summary(console, [failed])
    assert "the attack failed" in console.file.getvalue()


def test_single_images_are_written_at_their_own_size(written: Path, results: list[AuditResult]) -> None:
    paths = sorted((written / "images" / "hcgla").glob("*-reconstruction.png"))
    assert len(paths) == 4
    pixels = np.asarray(Image.open(paths[2]))
    expected = (results[0].images["reconstruction"][2] * 255).round().permute(1, 2, 0).numpy()
    assert pixels.shape == (12, 12, 3)
    np.testing.assert_array_equal(pixels, expected.astype(np.uint8))


def test_the_sheet_shows_the_images_and_their_scores(results: list[AuditResult]) -> None:
    sheet = figures.reconstruction_sheet(results[0], limit=3)
    axes = np.array(sheet.axes).reshape(-1, 3)
    original = results[0].images["original"][1]
    shown = axes[0, 1].images[0].get_array()
    assert shown.shape == (132, 132, 3)  # whole pixels, eleven times as large
    np.testing.assert_array_equal(shown[::11, ::11], (original * 255).round().byte().permute(1, 2, 0).numpy())
    assert axes[1, 2].get_xlabel() == f"{results[0].records[2]['psnr']:.1f} dB"
    assert "k = 25 of 50 numbers (50 % kept, 0.0579 per pixel)" in sheet.get_suptitle()
    assert "the first 3 of 4 images" in sheet.get_suptitle()
    assert Image.open(io.BytesIO(figures.png(sheet))).size[0] > 300


def test_dots_show_every_score(results: list[AuditResult]) -> None:
    axes = figures.score_dots(results[0]).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(lines["reconstruction"], [row["psnr"] for row in results[0].records])
    np.testing.assert_allclose(lines["floor: prior"], [row["floor.prior.psnr"] for row in results[0].records])
    np.testing.assert_allclose(
        lines["control: against other victims"], [row["control_psnr"] for row in results[0].records]
    )


def test_grey_images_and_many_victims_are_drawn() -> None:
    many = reconstruction_result(victims=70, channels=1)
    assert figures.enlarged(many.images["original"][0]).shape == (132, 132, 3)
    drawn = figures.score_dots(many).axes[0]
    assert "70 images beside what could be guessed; median" in drawn.get_title(loc="left")
    psnrs = [row["psnr"] for row in many.records]
    middles = [line.get_xdata()[0] for line in drawn.lines if line.get_marker() == "o"]
    assert middles[0] == pytest.approx(np.median(psnrs))
    assert list(drawn.lines[0].get_xdata()) == pytest.approx(np.quantile(psnrs, [0.05, 0.95]).tolist())
    assert len(figures.reconstruction_sheet(many).axes) == 8 * 4  # original, reconstruction, two floors


def with_histories(result: AuditResult, *histories: list[float]) -> AuditResult:
    told = {f"round 1, client {number}": history for number, history in enumerate(histories)}
    return dataclasses.replace(result, curves={"histories": told})


def test_objectives_of_many_victims_are_a_median_and_bands(results: list[AuditResult]) -> None:
    rng = np.random.default_rng(0)
    falling = [(rng.uniform(1, 2) * 0.8 ** np.arange(20)).tolist() for _ in range(30)]
    axes = figures.loss_history(with_histories(results[0], *falling, [5.0, 4.0])).axes[0]
    (median,) = axes.lines
    expected = np.median([*falling, [5.0] + [4.0] * 19], axis=0)
    np.testing.assert_allclose(median.get_ydata(), expected)
    assert (np.diff(median.get_ydata()) < 0).all()
    assert len(axes.collections) == 2
    assert "31 victims" in axes.get_title(loc="left")
    assert len(figures.loss_history(with_histories(results[0], *falling[:8])).axes[0].lines) == 8


def test_nothing_is_drawn_of_a_point_or_of_three(results: list[AuditResult]) -> None:
    assert figures.loss_history(with_histories(results[0], [1.0], [math.nan, 2.0])) is None
    assert figures.score_dots(reconstruction_result(victims=1)) is None
    for members in (3, 9, 10):
        scores = np.arange(members + 40.0)
        few = audit_membership("few", [scored(scores, scores < members, 2)], statistic="loss", seconds=1.0)
        assert (figures.roc([few]) is None) == (members < 10)
        both = figures.roc([few, results[1]])
        assert len([line for line in both.axes[0].lines if line.get_label() != "chance"]) == 1 + (
            members >= 10
        )


@pytest.mark.parametrize("width", [100, 140])
def test_the_terminal_table_fits(results: list[AuditResult], width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    print_summary(
        console, [*results, reconstruction_result(name="my.package.attacks:LongName[experimental]")]
    )
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "my.package.attacks:LongName[experimental]" in re.sub(r"\s", "", text)
    assert "floor" in text
    for result in results:
        assert " ".join(result.verdict.split()) in " ".join(text.split())


def test_figures_as_a_person_reads_them() -> None:
    assert [formats.decimal(v) for v in (None, math.nan, math.inf, -0.04, 1234.56)] == [
        "–",
        "–",
        "∞",
        "0.0",
        "1,234.6",
    ]
    assert [formats.percent(v) for v in (0.1234, 0.00012, 0.0)] == ["12.3 %", "0.01 %", "0.0 %"]
    assert [formats.rate(v) for v in (1.0, 0.001, 0.000192)] == ["100 %", "0.1 %", "0.0192 %"]
    assert [formats.seconds(v) for v in (0.44, 75, 725, 10920)] == [
        "0.4 s",
        "75 s",
        "12 min 5 s",
        "3 h 2 min",
    ]
    assert [formats.size(v) for v in (12, 62672, 31.3e6)] == ["12 B", "62.7 kB", "31.3 MB"]
    assert [formats.count(v) for v in (7834.0, 37.125, 7833.6)] == ["7,834", "37.1", "7,834"]
    assert formats.interval({"low": 0.1, "high": 0.25}, 0, 100) == "[10, 25]"
    assert formats.signed(-0.04) == "0.0"
    assert formats.p_value(0.0) == "p < 0.0001"
