"""The sub-commands of `fedattack gan`: training a generator, sampling it, attacking and weighing what it releases."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adversaries.membership.synthetic.base import SyntheticAttack
from adversaries.membership.synthetic.neighbours import nearest
from adversaries.membership.synthetic.release import released
from adversaries.refusals import applicable
from fedattack.audit import AuditResult
from fedattack.config import AttackConfig, Config
from fedattack.data import World, build_world
from fedattack.data.dataset import as_float
from fedattack.data.images import Images, read_images
from fedattack.data.pools import fingerprints
from fedattack.errors import ConfigError, DataError, FedattackError, RunFailed
from fedattack.files import content_hash, whole_file, write_bytes
from fedattack.generative import load_gan
from fedattack.generative.diversity import diversity
from fedattack.metrics.synthetic import Labelled, worth
from fedattack.reporting import figures, formats
from fedattack.reporting.report import image_png
from fedattack.rng import adversary_seed, numpy_rng, torch_rng
from fedattack.storage import RunFolder
from fedattack.storage.plain import plain, write_json
from fedattack.storage.spreadsheet import csv_bytes
from fedattack.task import TASKS
from simulations.experiments.base import EXPERIMENTS, Plan
from simulations.experiments.choose import known_facts
from simulations.experiments.executor import choose_device, reason
from simulations.experiments.synthetic import (
    MEMBERS,
    NON_MEMBERS,
    SHOWN,
    FinishedRun,
    Folders,
    ReleaseExperiment,
    attack_folders,
    synthetic_attacks,
)
from simulations.generators import FILE
from simulations.pipeline import (
    federation_figures,
    open_run_folder,
    report,
    run_directory,
    simulate,
    with_threats,
)
from simulations.progress import tell

LEAK = ("full-black-box", "full-black-box-calibrated")
PLAIN: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": None, "padding": (0, 2, 0, 0)}
_AT_ONCE = 500
_LOOKED_AT, _JUDGED = 5000, 1000
_NEAREST = 8


@dataclass(frozen=True)
class Given:
    """What a command is asked to look at: a run, or folders of images."""

    run: Path | None = None
    synthetic: Path | None = None
    candidates: Path | None = None
    reference: Path | None = None
    public: Path | None = None
    people: bool = False

    def check(self) -> None:
        """ConfigError unless it is one of the two."""
        names = ("synthetic", "candidates", "reference", "public")
        folders = [name for name in names if getattr(self, name) is not None]
        if (self.run is None) == (self.synthetic is None):
            raise ConfigError(
                "give the folder of a run, or --synthetic with a folder of images: one of the two"
            )
        if self.run is not None and (folders or self.people):
            raise ConfigError(
                f"--{[*folders, 'people'][0]}: of a run, images come from its own settings; give folders with "
                "--synthetic, and the number of members to ask about as --set attack.candidates=N"
            )


def run_train(config: Config, console: Console, command: str) -> None:
    """Train a generator, as any run is trained."""
    task = config.training.task
    if TASKS.get(task).kind != "generate":
        raise ConfigError(
            f"setting 'training.task' = {task!r}: `gan train` trains a generator; accepted: wgan-gp"
        )
    simulate(config, console=console, command=command)


def run_sample(place: Path, out: Path, count: int, png: bool, seed: int, console: Console) -> None:
    """Write `count` images of a generator into the new folder `out`; memory does not grow with their number."""
    gan, settings = load_gan(place / FILE if place.is_dir() else place)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {str(out)!r}: is there already; give a new or an empty folder")
    channels, side, _ = settings.image_shape
    shape = (count, side, side) if channels == 1 else (count, side, side, channels)
    draws, looked_at = torch_rng(seed, "gan sample"), list[Tensor]()

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, count, _AT_ONCE):
            made = gan.sample(min(_AT_ONCE, count - start), draws)
            if start < _LOOKED_AT:
                looked_at.append(made)
            if png:
                for number, image in enumerate(made, start=start):
                    write_bytes(out / "png" / f"{number:06d}.png", image_png(image))
            pixels = (made * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            yield np.ascontiguousarray(pixels.numpy())

    write_array(out / "images.npz", shape, chunks())
    first = torch.cat(looked_at)[:_LOOKED_AT]
    write_bytes(out / "sheet.png", image_png(figures.sheet(first[:SHOWN])))
    distinct = _distinct(place, first)
    found = {"generator": content_hash(gan.state_dict()), "seed": seed, "count": count, "distinct": distinct}
    write_json(out / "sample.json", found)
    told = (
        f"{count:,} images of {side} x {side}, {channels} channel{'s' if channels > 1 else ''}, and a sheet"
    )
    tell(console, f"{told} written to", out)
    for sentence in (distinct, settings.privacy):
        if sentence:
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _distinct(place: Path, made: Tensor) -> str:
    """How many of the images are distinct, in words: of a run beside its held-out images, else as 8-bit pictures."""
    if place.is_dir() and len(made) > 1:
        run = FinishedRun.read(place)
        world = build_world(run.config)
        held_out = world.dataset.tensors(world.pools.nonmembers[:_JUDGED])[0]
        if len(held_out) > 1:
            return diversity(made[:_JUDGED], held_out).text
    pictures = fingerprints((made * 255).round().to(torch.uint8).numpy())
    return f"{len(set(pictures)) / len(pictures):.1%} of {len(pictures):,} are different pictures of 8 bits"


def write_array(path: Path, shape: Sequence[int], chunks: Iterator[NDArray[np.uint8]]) -> None:
    """Write an .npz file of one uint8 array `images`, of that shape, from chunks of its first axis (RunFailed)."""
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    with (
        whole_file(path, int(np.prod(shape))) as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for chunk in chunks:
            member.write(chunk.tobytes())


def run_attack(given: Given, config: Config, console: Console, command: str) -> None:
    """Attack a run's generator, or anybody's images, and write the report."""
    given.check()
    if given.run is not None:
        opened = Released.open(given.run, config)
        opened.attack(synthetic_attacks(opened.config), console, command)
        return
    if given.candidates is None:
        raise ConfigError("--synthetic: nobody is asked about; give --candidates with a folder of images")
    _refuse_federation(config)
    attacks, folders = synthetic_attacks(config, images_alone=True), _folders(given)
    config = _in_folder(config, "gan-attack")
    with open_run_folder(config, console) as (folder, shown):
        _only_of(folder, config, given)
        told = attack_folders(folders, attacks, config, shown)
        notes = [*folders.notes, *(f"{name} is left out: {why}" for name, why in told.left_out.items())]
        for note in notes:
            shown.say(note, folder)
    if folders.is_member is None:
        _scores(folder, folders, told.scores, config)
        tell(
            console,
            f"nothing is scored: nobody says which of the {len(folders.candidates):,} candidates were trained on "
            f"(put them into {MEMBERS}/ and {NON_MEMBERS}/); the scores, the most suspicious by "
            f"{next(iter(told.scores))} first, are in",
            folder.path / "scores.csv",
        )
        return
    about = f"{len(folders.synthetic):,} synthetic images of {given.synthetic}"
    results = list(told.audits.values())
    report(console, folder, results, None, command, told.left_out, notes=notes, about=about)


def _refuse_federation(config: Config) -> None:
    """ConfigError for settings that say nothing about anybody's images."""
    if wrong := config.model_fields_set - {"seed", "attack", "engine", "output"}:
        section = min(wrong)
        raise ConfigError(
            f"settings of section {section!r}: of anybody's images there is no federation to set up"
        )
    if "samples" in config.attack.shared_options:
        raise ConfigError("setting 'attack.samples': all images of --synthetic are looked at; leave it out")


def _folders(given: Given) -> Folders:
    """Of --synthetic and --candidates."""
    assert given.synthetic is not None
    assert given.candidates is not None
    return Folders.read(given.synthetic, given.candidates, given.reference, given.public, given.people)


def _in_folder(config: Config, name: str) -> Config:
    """With the folder that the command writes into; a new one where none is named."""
    called = config.model_copy(update={"attack": AttackConfig(names=(name,))})
    output = config.output.model_copy(update={"run_dir": str(run_directory(called))})
    return config.model_copy(update={"output": output})


def _only_of(folder: RunFolder, config: Config, given: Given, **more: str) -> None:
    """ConfigError where the folder holds answers about something else."""
    told = {name: str(value) for name, value in vars(given).items() if value} | more
    if (earlier := folder.load_part("asked")) not in (None, told):
        raise ConfigError(
            f"setting 'output.run_dir' = {config.output.run_dir!r}: holds answers about {earlier}; give another one"
        )
    folder.save_part("asked", told)


def _scores(
    folder: RunFolder, folders: Folders, scores: Mapping[str, NDArray[np.float64]], config: Config
) -> None:
    """Write the candidates, the most suspicious first, and a picture of those beside what is nearest."""
    device = choose_device(config.engine.device)
    asked, made = as_float(folders.candidates.pixels), as_float(folders.synthetic.pixels)
    distances, places = nearest(made, asked, 1, device)
    first = next(iter(scores))
    frame = pd.DataFrame({"candidate": folders.candidates.names} | dict(scores))
    frame["nearest synthetic image"] = [folders.synthetic.names[place] for place in places[:, 0].tolist()]
    frame["distance"] = distances[:, 0].numpy()
    frame = frame.sort_values(first, ascending=False, kind="stable")
    write_bytes(folder.path / "scores.csv", csv_bytes(frame))
    top = torch.from_numpy(frame.index.to_numpy()[:_NEAREST].copy())
    pair = {"images": asked[top], "synthetic": made[places[top, 0]], "distances": distances[top, 0].tolist()}
    picture = figures.nearest_sheet(first, {"candidates": pair})
    write_bytes(folder.figures / "nearest.png", figures.png(picture))


@dataclass(frozen=True, eq=False)
class Released:
    """A finished run, its world built again, and the attacks that are to be asked about its generator."""

    run: FinishedRun
    config: Config
    world: World
    given: Given

    @classmethod
    def open(cls, place: Path, config: Config, name: str = "gan-attack") -> Released:
        """ConfigError for settings that would make it another run."""
        run = FinishedRun.read(place)
        if wrong := config.model_fields_set - {"attack", "engine", "output"}:
            section = min(wrong)
            raise ConfigError(
                f"settings of section {section!r}: the run {str(place)!r} has its own; leave them out"
            )
        asked: dict[str, Any] = {"names": (), "options": {}, "shared_options": {}}
        asked |= {field: getattr(config.attack, field) for field in config.attack.model_fields_set}
        update = {"attack": run.config.attack.model_copy(update=asked), "engine": config.engine}
        chosen = _in_folder(run.config.model_copy(update=update | {"output": config.output}), name)
        world = build_world(chosen)
        run.check(world)
        return cls(run, chosen, world, Given(run=place))

    def attack(
        self, named: Mapping[str, SyntheticAttack], console: Console, command: str, also: Sequence[str] = ()
    ) -> tuple[RunFolder, list[AuditResult]]:
        """Ask every attack that applies, and write the report, which `also` says so much more."""

        def check(_: str, attack: SyntheticAttack) -> None:
            EXPERIMENTS.get(attack.family).check(self.config, self.world)

        scenario = self.world.scenario
        attacks, left_out = applicable(named, scenario, known_facts(self.config, self.world), check)
        sitting = self.config.attack.model_copy(update={"names": tuple(attacks)})
        config = self.config.model_copy(update={"attack": sitting})
        notes = [f"{name} is left out: {why}" for name, why in left_out.items()]
        with open_run_folder(self.config, console) as (folder, shown), ExitStack() as stack:
            _only_of(folder, self.config, self.given, generator=content_hash(self.run.weights))
            experiment = ReleaseExperiment(Plan(config, self.world, folder, shown), attacks)
            stack.callback(experiment.close)
            scored = experiment.audit(self.run.federation)
            notes += [f"{name} failed: {reason(error)}" for name, error in experiment.failed.items()]
            if not scored:
                error = next(iter(experiment.failed.values()))
                raise error if isinstance(error, FedattackError) else RunFailed(notes[-1]) from error
            for note in notes:
                shown.say(note, folder)
        results = with_threats(scored, attacks, scenario, self.world.auxiliary)
        last, device = self.config.federation.rounds, choose_device(self.config.engine.device)
        seed = adversary_seed(self.config.seed, "sheet")
        made = released(scenario, self.run.weights, SHOWN, seed, device)
        more: dict[str, Any] = {"notes": [*notes, *also], "generated": {last: made.images}}
        more["about"] = f"the generator of {self.given.run}"
        figures = federation_figures(self.config, self.world, self.run.federation)
        report(console, folder, results, figures, command, left_out, **more)
        return folder, results


def run_evaluate(given: Given, count: int, config: Config, console: Console, command: str) -> None:
    """Print, and write, what synthetic images are worth beside what they leak."""
    given.check()
    leaks: list[AuditResult] = []
    if given.run is not None:
        opened = Released.open(given.run, config, "gan-evaluate")
        synthetic, public, test = _of_run(opened, count)
        found = _worth(synthetic, public, test, opened.config.seed)
        folder, leaks = opened.attack(_leaking(opened.config), console, command, _sentences(found))
    else:
        assert given.synthetic is not None
        if given.public is None:
            raise ConfigError(
                "--public is missing: a folder of labelled real images, by which the others are judged"
            )
        _refuse_federation(config)
        attacks = _leaking(config)
        made, real = read_images(given.synthetic), read_images(given.public)
        public, test = _halves(real, config.seed)
        found = _worth(as_float(made.pixels), public, test, config.seed)
        config = _in_folder(config, "gan-evaluate")
        with open_run_folder(config, console) as (folder, shown):
            _only_of(folder, config, given)
            if given.candidates is not None:
                folders = _folders(given)
                if folders.is_member is None:
                    raise DataError(
                        f"candidates {str(given.candidates)!r}: nobody says which were trained on, so that nothing "
                        f"can be scored; put them into {MEMBERS}/ and {NON_MEMBERS}/"
                    )
                told = attack_folders(folders, attacks, config, shown)
                leaks = list(told.audits.values())
        if leaks:
            about = f"{len(made):,} synthetic images of {given.synthetic}"
            report(
                console,
                folder,
                leaks,
                None,
                command,
                told.left_out,
                notes=[*folders.notes, *_sentences(found)],
                about=about,
            )
    document = found | {"leak": {one.attack: one.summary | {"verdict": one.verdict} for one in leaks}}
    write_json(folder.path / "evaluation.json", plain(document))
    console.print(_table(found, leaks))
    for sentence in _said(found):
        console.print(sentence, markup=False, highlight=False)
    tell(console, "figures", folder.path / "evaluation.json")


def _worth(synthetic: Tensor, public: Labelled, test: Labelled, seed: int) -> dict[str, Any]:
    """What the images are worth, and how different they are."""
    found = worth(synthetic, public, test, seed)
    some, real = synthetic[:_JUDGED], test.images[:_JUDGED]
    told = diversity(some, real) if min(len(some), len(real)) > 1 else None
    return found | {"diversity": None if told is None else asdict(told) | {"text": told.text}}


def _leaking(config: Config) -> dict[str, SyntheticAttack]:
    """The attacks of `config`; where it names none, the full black-box attack, and the same calibrated."""
    names = config.attack.names or LEAK
    named = config.attack.model_copy(update={"names": names})
    return synthetic_attacks(config.model_copy(update={"attack": named}))


def _of_run(opened: Released, count: int) -> tuple[Tensor, Labelled, Labelled]:
    """Synthetic images of a run's generator, the public images, and the held-out ones."""
    world, config = opened.world, opened.config
    public = world.auxiliary
    if public is None or public.labels is None or not len(public):
        raise DataError(
            f"{str(opened.given.run)!r}: no labelled public images were granted in that run, by which images are "
            "judged; train with data.auxiliary_size above 0"
        )
    if not len(world.pools.nonmembers):
        raise DataError(
            f"{str(opened.given.run)!r}: nothing was held out in that run; train with data.nonmembers above 0"
        )
    seed = adversary_seed(config.seed, "evaluation")
    device = choose_device(config.engine.device)
    made = released(world.scenario, opened.run.weights, count, seed, device).images
    images, labels = world.dataset.tensors(world.pools.nonmembers)
    return made, Labelled(public.images, public.labels.numpy()), Labelled(images, labels.numpy())


def _halves(public: Images, seed: int) -> tuple[Labelled, Labelled]:
    """Real images to learn from, two thirds, and to test on."""
    if public.labels is None:
        raise DataError("--public: these images have no labels; put them into a sub-folder for each class")
    order = numpy_rng(seed, "evaluation").permutation(len(public))
    cut = len(public) // 3
    sides = (order[cut:], order[:cut])
    learn, test = (Labelled(as_float(public.pixels[side]), public.labels[side]) for side in sides)
    return learn, test


def _said(found: Mapping[str, Any]) -> list[str]:
    """What the table does not say of itself."""
    judge, frechet = found["judge"], found["frechet"]
    teacher = formats.percent(found["accuracy"]["teacher"]["mean"])
    said = [
        f"The generator has no labels: a teacher says what a synthetic image shows ({judge['model']}, seed "
        f"{judge['seed']}, trained on {judge['training images']:,} real public images; accuracy {teacher}), and what "
        f"is learnt from its labels can hardly be better. Classifiers of the first row are trained on "
        f"{found['accuracy']['trained on']:,} images each, all are tested on {found['test images']:,} held-out ones."
    ]
    if frechet:
        said.append(
            f"Fréchet distance: of the teacher's hidden layer, not of Inception, {frechet['of']:,} images a side; "
            "compare it with its floor alone."
        )
    if found["diversity"] and found["diversity"]["text"].startswith("the generator collapsed"):
        said.append(f"warning: {found['diversity']['text']}")
    return said


def _rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Figure, of synthetic images, of real ones, by chance; intervals on a line of their own."""
    accuracy, sure, classes = found["accuracy"], found["sure"], found["classes"]

    def share(of: Mapping[str, float]) -> str:
        ends = f"\n{formats.span(of, 1, 100.0)}" if "low" in of else ""
        return f"{formats.percent(of['mean'])}{ends}"

    accuracies = (share(accuracy[of]) for of in ("synthetic", "real", "chance"))
    surer = (formats.percent(sure[of]) for of in ("synthetic", "real"))
    rows: list[tuple[str, ...]] = [
        ("accuracy on real images", *accuracies),
        (f"teacher surer than {formats.percent(sure['above'], 0)}", *surer, ""),
        ("classes present", f"{classes['found']} of {classes['of']}", "", ""),
    ]
    if different := found["diversity"]:
        rows.append(("distinct samples", formats.percent(different["distinct"]), "", ""))
    if frechet := found["frechet"]:
        rows.append(("Fréchet distance", *(formats.compact(frechet[of]) for of in ("distance", "floor")), ""))
    return rows


def _table(found: Mapping[str, Any], leaks: Sequence[AuditResult]) -> Table:
    """What it is worth, and what it leaks."""
    table = Table(title="What the images are worth, and what they leak", **PLAIN)
    for name in ("", "synthetic", "real", "chance"):
        table.add_column(name, no_wrap=True, justify="right" if name else "left")
    for row in _rows(found):
        table.add_row(*row)
    for one in leaks:
        chance, area = one.summary["floors"]["chance"]["auc"], one.summary["metrics"]["auc"]
        leak, by_chance = (f"{of['mean']:.3f}\n{formats.span(of, 3)}" for of in (area, chance))
        table.add_row(f"AUC {one.attack}", leak, "", by_chance)
    return table


def _sentences(found: Mapping[str, Any]) -> list[str]:
    """The table's figures as notes of a report."""
    notes = []
    for row in _rows(found):
        name, made, real, chance = (cell.replace("\n", " in ") for cell in row)
        told = (
            [f"{made} (synthetic)"] + [f"{real} (real)"] * bool(real) + [f"{chance} (chance)"] * bool(chance)
        )
        notes.append(f"{name}: {', '.join(told)}")
    return [*notes, *_said(found)]
