"""The command: ``python simulations/run.py --attack hcgla --compression 0.001``, installed as ``fedattack``."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import the checkout, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import codecs
import io
import os
import unicodedata
from functools import cache, partial
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedattack.config import Config
from fedattack.errors import ConfigError, FedattackError, unknown_name
from simulations.cli.options import (
    PLAIN,
    PROMINENT,
    AsJson,
    FailOn,
    Loudness,
    OutFile,
    OutFolder,
    SetOptions,
    Trusted,
    assigned,
    check_level,
    completed_anything,
    completed_kinds,
    console,
    fail_on,
    plainly,
    show_table,
    speech,
    trust_typed,
    typed,
    writable_file,
    writable_folder,
)
from simulations.cli.options import with_settings as with_settings
from simulations.cli.strict import Cli, Stopped

EPILOG = "More: fedattack settings. Exit codes: 1 failed, 2 refused, 3 found (--fail-on)."

app = Cli(
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
learn = Cli(help="Train and test HCGLA's generator and denoiser.", no_args_is_help=True)
app.add_typer(learn, name="hcgla")
gan = Cli(help="Train a generator, sample it, attack what it releases.", no_args_is_help=True)
app.add_typer(gan, name="gan")
forgetting = Cli(help="Audit what is left of forgotten samples.", no_args_is_help=True)
app.add_typer(forgetting, name="unlearning")
ratings = Cli(help="What ratings are worth: agreement, checks, votes.", no_args_is_help=True)
app.add_typer(ratings, name="annotations", hidden=True)  # `annotate --help` names it
semsim = Cli(help="Learn a metric from ratings, test it, and rank metrics.", no_args_is_help=True)
app.add_typer(semsim, name="semsim")


def _version(asked: bool) -> None:
    if asked:
        from fedattack.version import fedattack_version

        typer.echo(f"fedattack {fedattack_version()}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", help="of fedattack", is_eager=True, callback=_version, rich_help_panel="The run"
    ),
]


@app.callback(invoke_without_command=True, epilog=EPILOG)
@with_settings
def run(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="what would run and what it costs", rich_help_panel="The run")
    ] = False,
    loudness: Loudness = None,
    as_json: AsJson = False,
    fails: FailOn = None,
    version: Version = False,
    *,
    config: Config,
) -> None:
    """Train a federation, attack it, report what leaked: fedattack --attack hcgla"""
    said = speech(loudness, as_json)
    check_level(fails, config.attack.names)
    from fedattack.metrics import ready_metrics

    ready_metrics(
        config.metric
    )  # the federation takes longer to import than a missing file should take to say
    if dry_run:
        from simulations.cli.dry_run import show_plan

        show_plan(config, said)
        return
    from simulations.pipeline import simulate

    result = simulate(config, console=said.told, command=typed())
    said.result(result.folder, result.summary)
    fail_on(fails, result.summary)


Kind = Annotated[
    str | None,
    typer.Argument(
        help="attacks, defences, data-sets, models, ...", show_default=False, autocompletion=completed_kinds
    ),
]
Name = Annotated[
    str | None,
    typer.Argument(
        help="an attack, a defence, a mechanism or a preset", show_default=False,
        autocompletion=completed_anything,
    ),
]  # fmt: skip


@app.command("list")
def list_plugins(
    kind: Kind = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="README's table of attacks")] = False,
) -> None:
    """Everything that can be named: attacks, data sets, models, ..."""
    from simulations.cli.written import attacks_markdown, kinds

    if markdown:
        typer.echo(attacks_markdown(), nl=False)
        return
    found = {title.lower().replace(" ", "-"): (title, rows) for title, rows in kinds().items()}
    if kind is not None and kind not in found:
        raise unknown_name("kind", kind, found)
    for title, rows in [found[kind]] if kind else found.values():
        show_table(title, ("name", "what it is"), rows)


@app.command("show")
def show_plugin(
    name: Annotated[
        str,
        typer.Argument(help="of anything that `fedattack list` names", autocompletion=completed_anything),
    ],
) -> None:
    """What an attack, a defence, ... does and needs, and a command that runs."""
    from simulations.cli.written import described, settings_tables

    trust_typed([name])
    table = Table(title=Text(name), show_header=False, **PLAIN)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    parts = dict(described(name))
    to_copy = [parts.pop(title) for title in ("command", "BibTeX") if title in parts]
    for title, text in parts.items():
        table.add_row(Text(title), Text(text))
    console.print(table, "")
    for text in to_copy:  # not broken into lines
        plainly(console, f"{text}\n")
    for title, rows in settings_tables(name, strict=False).items():
        show_table(
            title, ("setting", "default", "meaning"), [(one, default, text) for one, _, default, text in rows]
        )


@app.command("settings")
def list_settings(name: Name = None) -> None:
    """Every setting, or one attack's: default, option and meaning.

    An empty value (NAME=) is None.
    """
    from simulations.cli.written import settings_tables

    trust_typed([name or ""])
    texts = {f"--{option}": text for group in PROMINENT.values() for option, text in group.items()}
    for title, rows in settings_tables(name).items():
        show_table(
            title,
            ("setting", "default", "meaning"),
            [
                (setting, default, f"{option}  {meaning or texts.get(option, '')}".strip())
                for setting, option, default, meaning in rows
            ],
        )


@app.command("attack")
@partial(
    with_settings,
    sections=("seed", "attack", "metric", "engine", "output"),
    hidden=("victims",),
)
def attack_saved(
    observations: Annotated[
        Path, typer.Argument(help="folder written by --save-observations", show_default=False)
    ],
    truth: Annotated[Path | None, typer.Option(help="folder of the private truth, to score against")] = None,
    loudness: Loudness = None,
    as_json: AsJson = False,
    fails: FailOn = None,
    *,
    config: Config,
) -> None:
    """Attack saved observations later, without the federation."""
    said = speech(loudness, as_json)
    check_level(fails, config.attack.names)
    if fails is not None and truth is None:
        raise ConfigError(f"--fail-on {fails}: nothing is scored without --truth; accepted: both, or neither")
    from simulations.pipeline import attack_folder

    result = attack_folder(observations, config, console=said.told, truth=truth, command=typed())
    said.result(result.folder, result.summary)
    fail_on(fails, result.summary)


@app.command("sweep")
def sweep(
    file: Annotated[Path, typer.Argument(help="TOML file with [settings] and [axes]", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder; default: runs/<name of the file>", callback=writable_folder),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="ray or inline; default: the file's")] = None,
    trusted: Trusted = None,
    loudness: Loudness = None,
    as_json: AsJson = False,
    fails: FailOn = None,
) -> None:
    """Run every combination that FILE names; it can be resumed."""
    said = speech(loudness, as_json)
    check_level(fails)
    trust_typed(trusted or [])
    from simulations.studies.sweep import Sweep, run_sweep

    folder = out or Path("runs") / file.stem
    table = run_sweep(Sweep.from_toml(file), folder, console=said.told, engine=engine, command=typed())
    rows = table.records()
    said.result(folder, {"folder": str(folder), "cells": rows})
    fail_on(fails, {"attacks": dict(enumerate(rows))})


@app.command("score")
@partial(with_settings, sections=("metric",))
def score(
    sources: Annotated[
        list[Path],
        typer.Argument(help="a run, a sweep, or originals and then reconstructions", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder; default: scores in the source", callback=writable_folder),
    ] = None,
    loudness: Loudness = None,
    *,
    config: Config,
) -> None:
    """Score again, by any metrics: a run, a sweep, folders of images."""
    said = speech(loudness)
    from simulations.studies.scoring import score_sources

    score_sources(sources, config.metric, out, console=said.told, command=typed())


FinishedRuns = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="folders of finished runs", show_default=False)
]


@app.command("compare")
def compare(
    runs: FinishedRuns,
    out: Annotated[
        Path | None, typer.Option("--out", help="page to write; default: compare.html", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines, and no page without --out")] = False,
) -> None:
    """Set finished runs side by side: settings, figures, differences."""
    from simulations.cli.compare import run_compare

    run_compare(runs, out, as_json, console, typed())


@app.command("export")
def export(
    runs: FinishedRuns,
    to: Annotated[str, typer.Option("--to", help="mlflow")] = "mlflow",
    uri: Annotated[
        str | None, typer.Option(help="of the tracker; default: MLFLOW_TRACKING_URI, or ./mlruns")
    ] = None,
    experiment: Annotated[str, typer.Option(help="that the runs are put into")] = "fedattack",
    pictures: Annotated[
        bool, typer.Option("--pictures", help="report and figures too: they show private images")
    ] = False,
) -> None:
    """Give figures of finished runs to an experiment tracker."""
    from simulations.cli.export import run_export

    run_export(runs, to, uri, experiment, pictures, console)


Output = OutFile


@learn.command("collect-pairs")
@with_settings
def collect_pairs(
    out: Output,
    count: Annotated[
        int | None, typer.Option(min=2, help="pairs to collect; default: of all public images, at most 112")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="matching iterations before a pair is taken")] = 40,
    *,
    config: Config,
) -> None:
    """Attack public images for a few iterations and keep (intermediate reconstruction, truth) pairs."""
    from simulations.cli.hcgla import run_collect_pairs

    run_collect_pairs(config, out, count, iterations, console)


@learn.command("train-denoiser")
def train_denoiser(
    pairs: Annotated[Path, typer.Argument(help="file written by collect-pairs", show_default=False)],
    out: Output,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    seed: int = 0,
) -> None:
    """Train the DnCNN filter on collected pairs."""
    from simulations.cli.hcgla import run_train_denoiser

    run_train_denoiser(pairs, out, epochs, seed, console)


@learn.command("test-denoiser")
def check_denoiser(
    pairs: Annotated[Path, typer.Argument(help="file written by collect-pairs", show_default=False)],
    weights: Annotated[Path, typer.Argument(help="file written by train-denoiser", show_default=False)],
) -> None:
    """PSNR before and after the filter on held-out pairs."""
    from simulations.cli.hcgla import run_test_denoiser

    run_test_denoiser(pairs, weights, console)


@learn.command("train-generator")
@with_settings
def train_generator(
    out: Output, epochs: Annotated[int | None, typer.Option(min=1)] = None, *, config: Config
) -> None:
    """Train the generator that turns an intercepted update into an image, through the same compressor."""
    from simulations.cli.hcgla import run_train_generator

    run_train_generator(config, out, epochs, console)


@learn.command("test-generator")
@with_settings
def check_generator(
    generator: Annotated[Path, typer.Argument(help="file written by train-generator", show_default=False)],
    *,
    config: Config,
) -> None:
    """PSNR of the generator on held-out public people, beside its floor."""
    from simulations.cli.hcgla import run_test_generator

    run_test_generator(config, generator, console)


INLINE = {"engine": {"name": "inline"}}
CENTRAL = INLINE | {
    "training": {"task": "wgan-gp", "local_steps": 500},
    "federation": {"clients": 1, "rounds": 16},
    "attack": {"candidates": 500},
}
ASKING = ("seed", "attack", "engine", "output")
Run = Annotated[Path | None, typer.Argument(help="folder of a run of `gan train`", show_default=False)]
Synthetic = Annotated[Path | None, typer.Option(help="synthetic images: folder, archive, .npz or .npy")]
Asked = Annotated[
    Path | None, typer.Option(help="images to ask about, in members/ and non-members/ or together")
]
Reference = Annotated[Path | None, typer.Option(help="images of a generator trained on other people's data")]
Public = Annotated[Path | None, typer.Option(help="real images that nobody trained on")]
People = Annotated[bool, typer.Option("--people", help="sub-folders of the candidates are people")]
Count = Annotated[int, typer.Option(min=1, help="images to draw")]


@gan.command("train")
@partial(with_settings, left_open=CENTRAL)
def gan_train(config: Config) -> None:
    """Train a WGAN-GP in one place (--clients 1), or in a federation of more."""
    from simulations.cli.gan import run_train

    run_train(config, console, typed())


@gan.command("sample")
def gan_sample(
    generator: Annotated[Path, typer.Argument(help="folder of a run, or its generator", show_default=False)],
    out: OutFolder,
    count: Count = 5000,
    png: Annotated[bool, typer.Option("--png", help="each image as a PNG file too")] = False,
    seed: int = 0,
) -> None:
    """Draw images of a generator: images.npz, a sheet to look at, PNG files."""
    from simulations.cli.gan import run_sample

    run_sample(generator, out, count, png, seed, console)


@gan.command("attack")
@partial(with_settings, left_open=INLINE, sections=ASKING)
def gan_attack(
    run: Run = None,
    synthetic: Synthetic = None,
    candidates: Asked = None,
    reference: Reference = None,
    public: Public = None,
    people: People = False,
    *,
    config: Config,
) -> None:
    """Ask a run's generator, or anybody's synthetic images, who was trained on."""
    from simulations.cli.gan import Given, run_attack

    given = Given(run, synthetic, candidates, reference, public, people)
    run_attack(given, config, console, typed())


@gan.command("evaluate")
@partial(with_settings, left_open=INLINE, sections=ASKING)
def gan_evaluate(
    run: Run = None,
    synthetic: Synthetic = None,
    candidates: Asked = None,
    reference: Reference = None,
    public: Public = None,
    people: People = False,
    count: Count = 5000,
    *,
    config: Config,
) -> None:
    """Set what synthetic images are worth beside what they leak."""
    from simulations.cli.gan import Given, run_evaluate

    given = Given(run, synthetic, candidates, reference, public, people)
    run_evaluate(given, count, config, console, typed())


# A perceptron on digits, trained until it answers most mislabelled samples as it was told.
SHADOWS = INLINE | {
    "data": {"name": "digits", "auxiliary_size": 0, "nonmembers": 500},
    "model": {"name": "mlp"},
    "training": {"protocol": "fedavg", "batch_size": 32, "local_steps": 15, "learning_rate": 0.3},
    "compression": {"name": "none"},
    "federation": {"clients": 1, "rounds": 60},
}


@forgetting.command("audit")
@partial(
    with_settings,
    left_open=SHADOWS,
    sections=("seed", "data", "model", "training", "federation", "unlearning", "attack", "engine", "output"),
)
def forgetting_audit(
    mechanism: Annotated[
        str, typer.Option(help="mechanisms, several with commas; none: nothing is forgotten")
    ] = "none,retrain,fine-tuning,gradient-ascent,neg-grad,random-labels,scrub-distil,salun",
    shadows: Annotated[int, typer.Option(help="models to train")] = 128,
    targets: Annotated[int, typer.Option(help="samples to forget, by a coin each")] = 40,
    mislabelled: Annotated[float, typer.Option(min=0, max=1, help="share of them with a wrong label")] = 0.5,
    retained: Annotated[int, typer.Option(help="samples that every model keeps")] = 400,
    probes: Annotated[int, typer.Option(help="retained samples that a model has by a coin")] = 40,
    *,
    config: Config,
) -> None:
    """Can it be told what a model forgot? U-LiRA over shadow trainings, beside what merely looks forgotten."""
    from simulations.cli.unlearning import Counts, run_audit

    counts = Counts(shadows, targets, mislabelled, retained, probes)
    run_audit(config, mechanism, counts, console, typed())


RATINGS = Path("ratings.csv")
RatingTable = Annotated[
    Path, typer.Argument(metavar="TABLE", help="ratings, .csv or .parquet", show_default=False)
]
RatedBy = Annotated[str | None, typer.Option(help="of a table with several: match, recognise, ...")]


@app.command("annotate")
def annotate(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SOURCE...", show_default=False,
            help="runs or sweeps; or a folder of originals and one of reconstructions of the same names",
        ),
    ] = None,
    annotator: Annotated[str | None, typer.Option(help="pseudonym of who rates; several with commas")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="match: beside the original; recognise: the reconstruction alone")
    ] = None,
    table: Annotated[Path, typer.Option(help=".csv file that answers are appended to")] = RATINGS,
    ask: Annotated[str, typer.Option(help="of recognise: recognisable (yes, no), or class")] = "recognisable",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 0,
    seed: Annotated[int, typer.Option(help="of the order, the repeats and the checks")] = 0,
    export: Annotated[Path | None, typer.Option(metavar="FILE", help="write one HTML file instead")] = None,
    returned: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", help="merge what such a file sent back")
    ] = None,
) -> None:  # fmt: skip
    """Let people rate reconstructions on a page, one key an answer.

    `fedattack annotations report TABLE` shows progress and agreement; `votes` and `import` are beside it.

    SOURCE: runs or sweeps; or a folder of originals and one of reconstructions of the same names.
    """
    from simulations.cli.annotate import make_plans, run_export, run_import, run_serve

    if returned is not None:
        if sources or export:
            raise ConfigError("--import goes with --table alone: the export's key tells what was asked")
        run_import(returned, table, console)
        return
    plans = make_plans(sources or [], annotator, protocol, seed, ask)
    if export is not None:
        run_export(plans, table, export, console)
    else:
        run_serve(plans, table, port, console)


@ratings.command("report")
def ratings_report(
    table: RatingTable,
    protocol: RatedBy = None,
    fast: Annotated[float, typer.Option(min=0, help="seconds under which an answer is marked")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Progress, failed checks, fast answers, and how far annotators agree."""
    from simulations.cli.annotate import run_report

    run_report(table, protocol, fast, as_json, console)


@ratings.command("votes")
def ratings_votes(
    table: RatingTable,
    out: Annotated[
        Path,
        typer.Option("--out", help=".csv or .parquet to write", show_default=False, callback=writable_file),
    ],
    protocol: RatedBy = None,
    annotators: Annotated[str | None, typer.Option(help="human or proxy, of a table with both")] = None,
) -> None:
    """Write each pair's votes: k of n, share, majority."""
    from simulations.cli.annotate import run_votes

    run_votes(table, out, protocol, annotators, console)


@ratings.command("import")
def ratings_import(
    folder: Annotated[
        Path, typer.Argument(help="released ratings: <id>/, -<id>/, others/", show_default=False)
    ],
    table: Annotated[Path, typer.Option(help=".csv file that they are added to")] = RATINGS,
) -> None:
    """Take over ratings in the folder layout of the SemSim release."""
    from simulations.cli.annotate import run_import_released

    run_import_released(folder, table, console)


Ratings = Annotated[
    list[Path], typer.Argument(help="tables of ratings, .csv or .parquet", show_default=False)
]
Protocol = Annotated[str | None, typer.Option(help="match, recognise, ... of tables that hold several")]
Annotators = Annotated[str | None, typer.Option(help="human or proxy, of tables that hold both")]
LabellerFile = Annotated[
    Path | None, typer.Option("--labeller", help="file of `semsim labeller`: the classifier that rated")
]


@semsim.command("train")
def semsim_train(
    tables: Ratings,
    out: Output,
    rule: Annotated[str, typer.Option(help="paper, or sony as in the released code")] = "paper",
    recipe: Annotated[str, typer.Option(help="small, or published (a ResNet-18: hours of a CPU)")] = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="default: the recipe's")] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="share of originals kept for a test")
    ] = 0.25,
    without: Annotated[
        list[str] | None, typer.Option(help="leave out: model=..., attack=..., dataset=...")
    ] = None,
    fallback: Annotated[bool, typer.Option("--fallback", help="allow originals without both labels")] = False,
    normalised: Annotated[bool, typer.Option("--normalised/--raw", help="embeddings of length 1")] = True,
    protocol: Protocol = None,
    annotators: Annotators = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Train SemSim on rated reconstructions."""
    from simulations.studies.semsim import TrainRequest, chosen_recipe, run_train

    asked = TrainRequest(tuple(tables), out, held_out, tuple(without or ()), protocol, annotators, device)
    run_train(asked, chosen_recipe(recipe, rule, steps, fallback, normalised, seed), console)


@semsim.command("evaluate")
def semsim_evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="file written by `semsim train`", show_default=False)],
    tables: Ratings,
    labeller: LabellerFile = None,
    by: Annotated[
        str, typer.Option(help="what makes a group: some of model,attack,defence,dataset")
    ] = "model,defence",
    protocol: Protocol = None,
    annotators: Annotators = None,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Set SemSim beside PSNR, SSIM and regcorr: do they say what was recognised?"""
    from simulations.studies.semsim import run_evaluate

    groups = tuple(part.strip() for part in by.split(",") if part.strip())
    run_evaluate(checkpoint, tables, labeller, groups, protocol, annotators, seed, json_file, console)


@semsim.command("label")
def semsim_label(
    sources: Annotated[
        list[Path],
        typer.Argument(help="runs, sweeps, tables, or folders: originals, then others", show_default=False),
    ],
    out: Output,
    labeller: Annotated[
        Path, typer.Option("--labeller", help="file of `semsim labeller`", show_default=False)
    ],
) -> None:
    """Rate reconstructions by a classifier, as a table that says "proxy"."""
    from simulations.studies.semsim import run_label

    run_label(sources, labeller, out, console)


@semsim.command("labeller")
@with_settings
def semsim_labeller(
    out: Output,
    name: Annotated[
        str, typer.Option(help="by which its ratings, and what learns from them, are called")
    ] = "P1",
    wide: Annotated[int, typer.Option("--channels", min=1, help="of its first layer")] = 16,
    steps: Annotated[int, typer.Option(min=1)] = 600,
    half: Annotated[str, typer.Option(help="all, first or second half of the public images")] = "all",
    apart_from: Annotated[list[Path] | None, typer.Option(help="runs, ...: not their originals")] = None,
    *,
    config: Config,
) -> None:
    """Train a classifier that rates, on the public images of a federation that is set up alike."""
    from simulations.studies.semsim import run_labeller

    run_labeller(config, out, name, wide, steps, half, apart_from or [], console)


@semsim.command("benchmark")
def semsim_benchmark(
    preset: Annotated[str, typer.Option(help="small, cifar10, cifar100, or a .toml file")] = "small",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="folder; default: runs/semsim-<preset>",
            callback=writable_folder,
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option("--data-dir", help="folder or archive of the data set", show_default=False)
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(help="one step alone: classifiers, attacks, scores, ranking", show_default=False),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="table of ratings of the pairs; none: a classifier rates", show_default=False),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="of a table of several: match, recognise", show_default=False)
    ] = None,
    annotators: Annotated[
        str | None, typer.Option(help="of a table of both: human, proxy", show_default=False)
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="names with commas; none: all that need no file", show_default=False)
    ] = None,
    assignments: SetOptions = None,
    engine: Annotated[str | None, typer.Option(help="ray or inline", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="of everything", show_default=False)] = None,
) -> None:
    """Train classifiers, attack them, score the pairs by every metric, rank metrics; started again, it resumes."""
    from simulations.studies.semsim_benchmark import Asked, run_benchmark
    from simulations.studies.semsim_presets import Benchmark

    given = {"data-dir": data_dir, "seed": seed}
    set_to = assigned(assignments)
    chosen = {
        name: value for name, value in set_to.items() if name.partition(".")[0] in ("metric", "metrics")
    }
    settings: dict[str, Any] = {name: value for name, value in set_to.items() if name not in chosen}
    settings |= {name: value for name, value in given.items() if value is not None}
    by = chosen | ({"metrics": metrics} if metrics else {})
    asked = Asked(step, annotations, protocol, annotators, by, engine)
    benchmark = Benchmark.named(preset).with_settings(settings)
    folder = out or Path("runs") / f"semsim-{benchmark.name}"
    run_benchmark(benchmark, folder, asked, console=console, command=typed())


@semsim.command("search")
@partial(
    with_settings,
    left_open={"data": {"name": "cifar10"}, "model": {"name": "resnet20-4"}},
    sections=("seed", "data", "model", "engine"),
)
def semsim_search(
    out: OutFolder,
    candidates: Annotated[int, typer.Option(min=1, help="policies to score")] = 1600,
    per_class: Annotated[int, typer.Option(min=1, help="images of each class for privacy")] = 5,
    batches: Annotated[int, typer.Option(min=1, help="batches for accuracy")] = 10,
    batch: Annotated[int, typer.Option(min=2, help="images of such a batch")] = 100,
    least_accuracy: Annotated[float, typer.Option(help="smallest accuracy score an image")] = -1.34,
    schedule: Annotated[str, typer.Option(help="published or short")] = "published",
    share: Annotated[float, typer.Option(min=0.01, max=0.99, help="of public images, for training")] = 0.1,
    *,
    config: Config,
) -> None:
    """Search augmentation policies that leak little and cost little accuracy (ATS), without an attack."""
    from simulations.cli.policies import Effort, run_search

    effort = Effort(candidates, per_class, batches, batch, least_accuracy)
    run_search(config, out, effort, schedule, share, console)


_TYPEWRITTEN = str.maketrans(
    {"\u2013": "-", "\u2014": "-", "\u2026": "...", "\u00d7": "x", "\u2018": "'", "\u2019": "'", "\u201c": '"',
     "\u201d": '"', "\u2264": "<=", "\u2265": ">=", "\u00b1": "+-", "\u2192": "->", "\u2022": "*", "\u00b7": "."}
)  # fmt: skip


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that a stream's encoding lacks: the nearest in ASCII."""
    assert isinstance(error, UnicodeEncodeError)
    shown = []
    for one in error.object[error.start : error.end].translate(_TYPEWRITTEN):
        if "\u2500" <= one <= "\u259f":  # lines and bars
            shown.append(
                "-"
                if one in "\u2500\u2501\u2574\u2576\u2578\u257a\u257e"
                else "|"
                if one in "\u2502\u2503"
                else "+"
            )
        else:
            shown.append(unicodedata.normalize("NFKD", one).encode("ascii", "ignore").decode() or "?")
    return "".join(shown), error.end


@cache
def _command() -> click.Command:
    command = typer.main.get_command(app)
    for parameter in command.params:
        if parameter.name in ("install_completion", "show_completion") and isinstance(
            parameter, click.Option
        ):
            parameter.hidden = True  # the help is a screen
    return command


def main() -> None:
    """Entry point: exit code 2 for a bad request, 1 for a failed run; no traceback for a user's mistake."""
    codecs.register_error("fedattack", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a log's encoding may lack a dash; that must end no run
            stream.reconfigure(errors="fedattack")
    if (here := os.getcwd()) not in sys.path:  # package.module:Class, as for `python -m`
        sys.path.append(here)
    try:
        code = _command()(prog_name="fedattack", standalone_mode=False)
    except FedattackError as error:
        _refuse(str(error))
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        code = 2
    except click.ClickException as error:
        place = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fedattack"
        _refuse(f"{error.format_message().rstrip('.')}; see {place} --help")
        code = error.exit_code
    except (KeyboardInterrupt, Stopped, click.Abort) as error:
        folder = getattr(error, "folder", None)
        what = "the run folder" if folder is None else str(folder)
        with_folder = "" if folder is None or "--run-dir" in sys.argv else f" and --run-dir {folder}"
        told = f"interrupted; {what} can be resumed with the same command{with_folder}"
        Console(stderr=True).print(Text(told), soft_wrap=True)
        code = 130
    sys.exit(code or 0)


def _refuse(text: str) -> None:
    """Say what is wrong, on standard error."""
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), " ", text), soft_wrap=True)


if __name__ == "__main__":
    main()
