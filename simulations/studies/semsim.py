"""The commands of `fedattack semsim`: training, evaluation, and ratings by classifiers instead of people."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from fedattack.annotation.pairs import Picture, RatedPair, read_pairs
from fedattack.annotation.table import (
    CANNOT_TELL,
    PER_PAIR,
    PROXY,
    SCHEMA_VERSION,
    check_images,
    latest,
    pair_name,
    read_table,
    to_frame,
    votes,
    write_table,
)
from fedattack.config import Config
from fedattack.data import build_world
from fedattack.errors import ConfigError, DataError, unknown_name
from fedattack.metrics import METRICS, Pairs, score
from fedattack.metrics.semsim.evaluation import STATISTICS, Evaluation, Figure, seen_and_unseen
from fedattack.metrics.semsim.labeller import (
    Labeller,
    load_labeller,
    save_labeller,
    train_labeller,
)
from fedattack.metrics.semsim.rated import AXES, Rated, held_out, image_digests
from fedattack.metrics.semsim.training import RECIPES, Recipe, Rule, load_semsim, save_semsim, train_semsim
from fedattack.storage.plain import plain, write_json
from simulations.experiments.executor import choose_device
from simulations.progress import stages, tell

BESIDE = ("psnr", "ssim", "regcorr")
"""Metrics that stand beside SemSim in an evaluation."""

RECOGNISED = 0.5
"""Probability of the true class from which a classifier's rating is 1."""


@dataclass(frozen=True)
class Ratings:
    """What tables hold: the rated images, the class of each original as the table has it, and what to know."""

    rated: Rated
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def read_ratings(tables: Sequence[Path], protocol: str | None, annotators: str | None) -> Ratings:
    """The majority's answer to each pair of the tables, with the images; ties and unanswered pairs are left out.

    `protocol` and `annotators` ("human", "proxy") choose where tables hold several; DataError otherwise, and where
    an image is missing or not the one that was rated, sizes differ, or nothing is left.
    """
    frames = [read_table(path, protocol) for path in tables]
    notes = [note for frame in frames for note in frame.attrs.get("notes", [])]
    frame = pd.concat([one.assign(_table=place) for place, one in enumerate(frames)])
    if annotators is not None:
        frame = frame[frame["annotator_type"] == annotators]
    counted = votes(frame, annotators)
    proxies = sorted(set(latest(frame)[0]["proxy_name"].fillna("")) - {""})
    kept = counted[counted["majority"].notna()]
    if left := len(counted) - len(kept):
        notes.append(f"{left} of {len(counted)} pairs have no majority and are left out")
    if not len(kept):
        raise DataError(f"{', '.join(map(str, tables))}: no pair has a majority")
    check_images(kept)
    pictures = {
        path: Picture.read(Path(path)) for path in {*kept["original_path"], *kept["reconstruction_path"]}
    }
    tensors = _as_tensors(pictures)
    place: dict[bytes, int] = {}
    originals, classes, owner = list[Tensor](), list[str](), list[int]()
    for path, label in zip(kept["original_path"], kept["class_label"].fillna(""), strict=True):
        key = tensors[path].numpy().tobytes()
        if key not in place:
            place[key] = len(originals)
            originals.append(tensors[path])
            classes.append(str(label))
        owner.append(place[key])
    facts = {axis: kept[axis].fillna("").to_numpy(dtype=str) for axis in AXES}
    rated = Rated(
        torch.stack(originals).float() / 255,
        torch.stack([tensors[path] for path in kept["reconstruction_path"]]).float() / 255,
        np.array(owner, dtype=np.int64),
        kept["majority"].to_numpy(dtype=np.int64) == 1,
        {axis: values for axis, values in facts.items() if (values != "").any()},
        proxy="+".join(proxies),
    )
    return Ratings(rated, tuple(classes), tuple(notes))


def _as_tensors(pictures: Mapping[str, Picture]) -> dict[str, Tensor]:
    """uint8 (C, S, S) of each, of one size, grey only if all are; DataError where sizes differ or are no squares."""
    shapes = sorted({one.size for one in pictures.values()})
    if len(shapes) > 1 or shapes[0][0] != shapes[0][1]:
        shown = ", ".join(f"{width}x{height}" for width, height in shapes[:3])
        raise DataError(f"pictures of {shown} pixels: SemSim takes square pictures of one size")
    images = {path: one.pixels() for path, one in pictures.items()}
    mode = "L" if all(image.mode == "L" for image in images.values()) else "RGB"
    return {path: pil_to_tensor(image.convert(mode)) for path, image in images.items()}


@dataclass(frozen=True)
class TrainRequest:
    """What `semsim train` was asked for besides the recipe; `without`: "axis=value" that it must not see."""

    tables: tuple[Path, ...]
    out: Path
    held_out: float
    without: tuple[str, ...] = ()
    protocol: str | None = None
    annotators: str | None = None
    device: str = "auto"


def chosen_recipe(
    name: str, rule: str, steps: int | None, fallback: bool, normalised: bool, seed: int
) -> Recipe:
    """A recipe of that name with what was asked for; ConfigError for an unknown name or rule."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    if rule not in get_args(Rule):
        raise unknown_name("rule", rule, get_args(Rule))
    recipe = replace(RECIPES[name], rule=rule, fallback=fallback, normalised=normalised, seed=seed)  # type: ignore[arg-type]
    return recipe if steps is None else replace(recipe, steps=steps)


def run_train(request: TrainRequest, recipe: Recipe, console: Console) -> None:
    """Train on the tables' ratings but a share of the originals, and write the checkpoint."""
    ratings = read_ratings(request.tables, request.protocol, request.annotators)
    rated = ratings.rated
    kept = _without(rated, request.without)
    if request.held_out:
        kept &= ~held_out(rated, request.held_out, recipe.seed)
    if not kept.any():
        raise ConfigError("nothing is left to train on: leave fewer out")
    _say(console, ratings.notes)
    with stages(console) as shown:
        trained = train_semsim(
            rated.only(kept), recipe, choose_device(request.device), partial(shown, "training SemSim")
        )
    save_semsim(request.out, trained)
    facts = trained.facts
    figures = {"ratings by": _source(rated), "rule": facts.rule, **facts.figures, "sha256": trained.hash[:16]}
    _figures(console, f"{facts.heading} written to {request.out}", figures)
    if facts.label_source == PROXY:
        tell(console, _proxy_sentence(rated.proxy))


def run_evaluate(
    checkpoint: Path,
    tables: Sequence[Path],
    labeller: Path | None,
    by: tuple[str, ...],
    protocol: str | None,
    annotators: str | None,
    seed: int,
    json_file: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Print, and answer, how well SemSim and pixel scores say what was recognised, on originals it never saw.

    A SemSim of proxy ratings stands beside its labeller, or is refused (ConfigError).
    """
    trained = load_semsim(checkpoint)
    facts = trained.facts
    judge = None if labeller is None else load_labeller(labeller)
    if facts.label_source == PROXY and (judge is None or judge.facts.name not in facts.proxy.split("+")):
        told = "none is given" if judge is None else f"{str(labeller)!r} is {judge.facts.name!r}"
        raise ConfigError(
            f"{facts.heading} is evaluated beside the classifier it learned from: give --labeller with the file of "
            f"{facts.proxy!r} ({told})"
        )
    ratings = read_ratings(tables, protocol, annotators)
    rated, notes = ratings.rated, list(ratings.notes)
    facts.check_shape(tuple(rated.originals.shape[1:]), f"{facts.heading} of {str(checkpoint)!r}")
    known = np.isin(np.array(rated.digests), facts.originals)
    if known.all():
        raise DataError(
            f"all {len(known)} originals of {', '.join(map(str, tables))} were in the training of "
            f"{str(checkpoint)!r}: hold some out when training (--held-out), or give others"
        )
    if known.any():
        notes.append(f"{int(known.sum())} of {len(known)} originals were in the training and are left out")
    classes = [label for label, seen in zip(ratings.classes, known, strict=True) if not seen]
    rated = rated.only(~known[rated.owner])
    if judge is not None and rated.proxy and judge.facts.name in rated.proxy.split("+"):
        notes.append(
            f"the ratings are {judge.facts.name}'s own: its figure is perfect by construction, and SemSim's says how "
            "well it copies; rate by another classifier to judge both"
        )
    scores = metric_scores(rated, facts.heading, trained.distances)
    if judge is not None:
        scores = {f"labeller {judge.facts.name}": _own_score(judge, rated, classes)} | scores
    parts = _parts(rated, scores, facts.heading, by, seed, facts.seen)
    _say(console, notes)
    for part, found in parts.items():
        _print_part(console, f"{part}: {facts.heading} and others, by {_source(rated)}", found)
    document: dict[str, Any] = {
        "heading": facts.heading,
        "ratings by": _source(rated),
        "sha256": trained.hash,
    }
    counts: dict[str, Any] = {"originals": len(rated.originals), "ratings": len(rated)}
    document |= counts | {"notes": notes, "by": by, "parts": parts}
    if json_file is not None:
        write_json(json_file, plain(document))
    if rated.proxy:
        tell(console, _proxy_sentence(rated.proxy))
    return document


def metric_scores(
    rated: Rated, heading: str, distances: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, NDArray[np.float64]]:
    """Of SemSim, by its heading, and :data:`BESIDE`, (N,) each, turned so that higher means more was leaked."""
    truth = rated.originals[torch.from_numpy(rated.owner)]
    metrics = {name: METRICS.get(name)() for name in BESIDE}
    found = {
        name: np.array(values) * (1.0 if metrics[name].higher else -1.0)
        for name, values in score(metrics, Pairs(rated.reconstructions, truth)).items()
    }
    return {heading: -distances(rated.reconstructions, truth).numpy()} | found


def _parts(
    rated: Rated,
    scores: Mapping[str, NDArray[np.float64]],
    heading: str,
    by: tuple[str, ...],
    seed: int,
    seen: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, dict[str, Figure]]]:
    """Part -> metric, or "<heading> - metric" -> statistic -> figure."""
    told = {}
    for part, mask in seen_and_unseen(rated, seen).items():
        held = Evaluation(rated.only(mask), {name: values[mask] for name, values in scores.items()}, by, seed)
        found = {name: held.figures(name) for name in scores}
        others = [name for name in scores if name != heading]
        found |= {f"{heading} - {name}": held.difference(heading, name) for name in others}
        told[part] = found
    return told


def _own_score(judge: Labeller, rated: Rated, classes: Sequence[str]) -> NDArray[np.float64]:
    labels = _true_classes(judge, rated.originals, classes)[0]
    return judge.true_class(rated.reconstructions, labels[torch.from_numpy(rated.owner)]).numpy()


def _true_classes(judge: Labeller, originals: Tensor, classes: Sequence[str]) -> tuple[Tensor, int]:
    """Class of each original by its label, or, where it has none, as the classifier has it; and of how many."""
    labels = torch.tensor([_class_of(judge, text) for text in classes], dtype=torch.int64)
    unknown = labels < 0
    if unknown.any():
        labels[unknown] = judge.probabilities(originals[unknown]).argmax(1)
    return labels, int(unknown.sum())


def _class_of(judge: Labeller, text: str) -> int:
    """Number of a class label; -1 for an empty one, DataError for one that the classifier does not know."""
    if not text:
        return -1
    if text in judge.facts.class_names:
        return judge.facts.class_names.index(text)
    if text.isdecimal() and int(text) < judge.facts.classes:
        return int(text)
    raise DataError(
        f"class {text!r}: labeller {judge.facts.name!r} knows {judge.facts.classes} classes"
        + (f" ({', '.join(judge.facts.class_names[:5])}, ...)" if judge.facts.class_names else "")
    )


def run_label(sources: Sequence[Path], labeller: Path, out: Path, console: Console) -> None:
    """Rate pairs of tables, runs, sweeps or folders by a classifier, as a table that says "proxy".

    The rating is 1 where the classifier gives the true class half of its probability or more; ``confidence`` is that
    probability. A pair whose class is unknown is rated by whether the reconstruction shows the class that the
    classifier finds in the original: protocol "match"; by its known class: "recognise".
    """
    if out.exists():
        raise ConfigError(f"--out {str(out)!r}: is there already, and may hold ratings; give a new file")
    judge = load_labeller(labeller)
    pairs = _pairs_of(sources)
    pictures = {str(one.path): one for pair in pairs for one in (pair.original, pair.reconstruction)}
    tensors = {path: one.float() / 255 for path, one in _as_tensors(pictures).items()}
    channels = judge.facts.channels
    if channels == 3:
        tensors = {path: one.expand(3, -1, -1) for path, one in tensors.items()}
    originals = torch.stack([tensors[str(pair.original.path)] for pair in pairs])
    made = torch.stack([tensors[str(pair.reconstruction.path)] for pair in pairs])
    labels, unknown = _true_classes(judge, originals, [pair.told.get("class_label", "") for pair in pairs])
    if 0 < unknown < len(pairs):
        raise DataError(
            f"the class of {unknown} of {len(pairs)} pairs is unknown: rate those with and without a class apart"
        )
    chances = judge.probabilities(made)
    own = chances.gather(1, labels[:, None])[:, 0]
    names = judge.facts.class_names or tuple(map(str, range(judge.facts.classes)))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    shared = {
        "schema_version": SCHEMA_VERSION,
        "protocol": "match" if unknown else "recognise",
        "annotator_id": f"proxy {judge.facts.name}",
        "annotator_type": PROXY,
        "proxy_name": judge.facts.name,
        "shown_px": str(judge.facts.size),
        "timestamp": now,
        "is_attention_check": "0",
    }
    rows = []
    for pair, chance, best in zip(pairs, own.tolist(), chances.argmax(1).tolist(), strict=True):
        row = dict.fromkeys(PER_PAIR, "") | pair.told
        for kind, picture in (("original", pair.original), ("reconstruction", pair.reconstruction)):
            row |= {f"{kind}_path": str(picture.path.absolute()), f"{kind}_sha256": picture.sha256}
        choice = names[best] if names[best] != CANNOT_TELL else str(best)
        given = {"label": str(int(chance >= RECOGNISED)), "choice": choice, "confidence": f"{chance:.6f}"}
        rows.append(row | shared | given | {"pair_id": pair_name(row)})
    write_table(out, to_frame(rows))
    yes = sum(row["label"] == "1" for row in rows)
    figures = {"pairs": len(rows), "rated 1": yes, "rated 0": len(rows) - yes, "protocol": shared["protocol"]}
    figures["accuracy of the classifier"] = judge.facts.figures.get("accuracy", "unknown")
    _figures(console, f"proxy ratings by {judge.facts.name} written to {out}", figures)
    if unknown:
        _say(console, ["no class is known: the class is the one that the classifier finds in each original"])
    tell(console, _proxy_sentence(judge.facts.name))


def _pairs_of(sources: Sequence[Path]) -> list[RatedPair]:
    """Of tables, each pair once, or of what :func:`read_pairs` reads."""
    tables = [source for source in sources if source.suffix.lower() in (".csv", ".parquet")]
    if tables and len(tables) < len(sources):
        raise ConfigError("tables of ratings and folders of pictures are rated apart")
    if not tables:
        return read_pairs(sources)
    frames = [read_table(path) for path in tables]
    frame = pd.concat(frames)
    frame = frame[~frame["is_attention_check"].astype(bool)].drop_duplicates("pair_id")
    if not len(frame):
        raise DataError(f"{', '.join(map(str, tables))}: no pairs")
    check_images(frame)
    found = []
    for row in frame[list(PER_PAIR)].astype("string").fillna("").to_dict("records"):
        original, made = (Picture.read(Path(row[f"{kind}_path"])) for kind in ("original", "reconstruction"))
        told = {name: str(row[name]) for name in PER_PAIR if not name.endswith(("_path", "_sha256"))}
        found.append(RatedPair(original, made, told))
    return found


def run_labeller(
    config: Config,
    out: Path,
    name: str,
    width: int,
    steps: int,
    half: str,
    apart_from: Sequence[Path],
    console: Console,
) -> None:
    """Train a classifier on the configured public images, which no client of that federation has, and write it.

    `half` ("all", "first", "second"): of those images, so that a labeller and a judge can be trained apart.
    `apart_from`: images with the pixels of an original of these sources are left out.
    """
    if half not in ("all", "first", "second"):
        raise ConfigError(f"--half {half!r}; accepted: all, first, second")
    world = build_world(config)
    public = world.auxiliary
    if public is None or public.labels is None or not len(public):
        raise DataError(
            "there are no public images with labels; set 'data.auxiliary_size' or 'data.auxiliary'"
        )
    images, labels, source = public.images, public.labels, f"{public.source}, {half}"
    if half != "all":
        middle = len(images) // 2
        part = slice(None, middle) if half == "first" else slice(middle, None)
        images, labels = images[part], labels[part]
    notes = []
    if apart_from:
        pictures = {str(pair.original.path): pair.original for pair in _pairs_of(apart_from)}
        originals = [one.float() / 255 for one in _as_tensors(pictures).values()]
        theirs = set(image_digests(torch.stack(originals)))
        alone = torch.tensor([digest not in theirs for digest in image_digests(images)])
        images, labels = images[alone], labels[alone]
        notes.append(
            f"{int((~alone).sum())} of {len(alone)} images are originals that are rated, and left out"
        )
    with stages(console) as shown:
        trained = train_labeller(
            images, labels, name, config.seed, source, width, steps, world.dataset.class_names,
            device=choose_device(config.engine.device), progress=partial(shown, "training labeller"),
        )  # fmt: skip
    save_labeller(out, trained)
    _say(console, notes)
    figures = {"images": len(images), "source": source, **trained.facts.figures, "sha256": trained.hash[:16]}
    _figures(console, f"labeller {name} written to {out}", figures)


def _without(rated: Rated, left_out: Sequence[str]) -> NDArray[np.bool_]:
    """Mask (N,) of what has none of the given "axis=value"; ConfigError for one that is not there."""
    kept = np.ones(len(rated), dtype=bool)
    for text in left_out:
        axis, equals, value = text.partition("=")
        if not equals or axis not in rated.facts or value not in rated.facts[axis]:
            known = "; ".join(f"{one}: {', '.join(np.unique(held))}" for one, held in rated.facts.items())
            raise ConfigError(
                f"--without {text!r}; accepted: AXIS=VALUE with {known or 'nothing, in these tables'}"
            )
        kept &= rated.facts[axis] != value
    return kept


def _source(rated: Rated) -> str:
    return f"proxy {rated.proxy}" if rated.proxy else "people"


def _proxy_sentence(name: str) -> str:
    return f"Proxy ratings: {name} is a classifier, and nobody looked at these images."


def _say(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _figures(console: Console, title: str, figures: Mapping[str, Any]) -> None:
    table = Table("figure", "value", title=title, title_justify="left")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def _print_part(console: Console, title: str, found: Mapping[str, Mapping[str, Figure]]) -> None:
    names = {"auc": "image AUC", "spearman": "Spearman", "kendall": "Kendall", "pearson": "Pearson"}
    one = next(iter(found.values()))
    points = one["pearson"].count
    counts = f"n = {one['auc'].count} images, {points} group{'s' if points != 1 else ''}"
    table = Table(
        "score", *(names[each] for each in STATISTICS), title=f"{title} ({counts})", title_justify="left"
    )
    reasons = dict.fromkeys(each.why for figures in found.values() for each in figures.values() if each.why)
    for name, figures in found.items():
        cells = ["no score" if figures[each].why else str(figures[each]) for each in STATISTICS]
        table.add_row(name, *cells)
    console.print(table)
    alone = {name: figures["pearson"].fisher for name, figures in found.items()}
    ends = [f"{name} [{pair[0]:.2f}, {pair[1]:.2f}]" for name, pair in alone.items() if pair is not None]
    if ends:
        _say(console, [f"Pearson by the number of groups alone (Fisher, 95 %): {'; '.join(ends)}"])
    _say(console, [f"no score: {reason}" for reason in reasons])
