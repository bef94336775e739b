"""Attacks on what the training of a generator released: that of a finished run, or anybody's images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adversaries import ATTACKS
from adversaries.membership.base import MembershipAttack
from adversaries.membership.synthetic.base import SyntheticAttack
from adversaries.membership.synthetic.release import Release, Releases
from fedattack.audit import AuditResult, audit_membership
from fedattack.audit.membership_floors import Blind
from fedattack.audit.membership_pool import Scored
from fedattack.config import Config
from fedattack.data import World
from fedattack.data.dataset import as_float
from fedattack.data.images import Images, read_images
from fedattack.data.pools import fingerprints
from fedattack.errors import ConfigError, DataError, NotApplicable
from fedattack.generative import load_gan
from fedattack.models import build_model
from fedattack.observation import EVERYONE, MembershipScores
from fedattack.rng import adversary_seed
from fedattack.task import TASKS
from simulations.engine.federation import FederationResult, RoundRecord
from simulations.engine.journal import Journal
from simulations.experiments.choose import choose_attacks
from simulations.experiments.executor import choose_device
from simulations.experiments.membership import MembershipExperiment
from simulations.experiments.nearest import nearest_pictures
from simulations.generators import FILE

SHOWN = 128
"""Synthetic images on a sheet."""
MEMBERS, NON_MEMBERS = "members", "non-members"
"""Sub-folders of candidates of which it is known what they are."""


def synthetic_attacks(config: Config, *, images_alone: bool = False) -> dict[str, SyntheticAttack]:
    """The attacks of `config`, or where it names none all that read what a generator releases.

    `images_alone`: then those that read its images and no more. ConfigError for one that reads something else.
    """
    chosen = config.attack
    if not chosen.names:
        kinds = {name: ATTACKS.get(name) for name in ATTACKS.names()}
        every = tuple(
            name
            for name, kind in kinds.items()
            if issubclass(kind, SyntheticAttack) and (kind.access == "samples" or not images_alone)
        )
        config = config.model_copy(update={"attack": chosen.model_copy(update={"names": every})})
    found: dict[str, SyntheticAttack] = {}
    for name, attack in choose_attacks(config).items():
        if not isinstance(attack, SyntheticAttack):
            raise ConfigError(
                f"attack {name!r} reads a federation while it trains; what is released is attacked by, for example, "
                "full-black-box"
            )
        found[name] = attack
    return found


@dataclass(frozen=True)
class FinishedRun:
    """A run that trained a generator: its settings, the state dict of the nets, and its rounds."""

    config: Config
    weights: dict[str, Tensor]
    rounds: list[RoundRecord]

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Of a run's folder; DataError or ConfigError, in one sentence, where it trained no generator to its end."""
        if not (folder / "config.toml").is_file():
            raise DataError(
                f"{str(folder)!r} is no run folder (no config.toml); give one that `gan train` wrote"
            )
        config = Config.from_toml(folder / "config.toml")
        task = config.training.task
        if TASKS.get(task).kind != "generate":
            raise ConfigError(
                f"{str(folder)!r} trained no generator: its training.task is {task!r}, not 'wgan-gp'"
            )
        gan, _ = load_gan(folder / FILE)
        journal, rounds = Journal(folder / "journal"), []
        for number in range(1, config.federation.rounds + 1):
            record = journal.read_record(number)
            if record is None:
                raise DataError(
                    f"{str(folder)!r} was not finished: of {config.federation.rounds} rounds, {number - 1} are in "
                    "its journal; start the same command again"
                )
            rounds.append(RoundRecord.from_json(record))
        return cls(config, gan.state_dict(), rounds)

    def check(self, world: World) -> None:
        """DataError where the generator is none of this world's."""
        own = world.scenario.model
        gan = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in build_model(own).state_dict().items()}
        if gan != wanted:
            raise DataError(f"{FILE} holds other nets than the run's settings name ({own.name!r})")

    @property
    def federation(self) -> FederationResult:
        """What was left of its training."""
        rejections = [(r.round, client, why) for r in self.rounds for client, why in r.rejected]
        return FederationResult(self.weights, self.rounds, rejections)


class ReleaseExperiment(MembershipExperiment):
    """Asks about the members of a finished run, given its last generator: the question that the run itself puts."""

    _releases: Releases | None = None

    def _answer(
        self, name: str, attack: MembershipAttack, federation: FederationResult
    ) -> Callable[[], MembershipScores] | None:
        assert isinstance(attack, SyntheticAttack)
        return partial(self._judged, name, attack, federation.weights)

    def _judged(self, name: str, attack: SyntheticAttack, weights: Mapping[str, Tensor]) -> MembershipScores:
        config, images = self.plan.config, self._candidates().images
        last, device = config.federation.rounds, choose_device(config.engine.device)
        seed = adversary_seed(config.seed, "watch", last)  # as in the run: the same images
        self.plan.shown(name, 0.0, "samples")
        if self._releases is None:
            public = None if self.plan.world.auxiliary is None else self.plan.world.auxiliary.images
            self._releases = Releases(self.plan.world.scenario, weights, public, last, seed, device)
        release = self._releases.of(attack.samples, attack.calibrated)
        scores = attack.about(release, images, seed, device)
        return MembershipScores(scores, type(attack).__name__, {"rounds": [last]})


@dataclass(frozen=True, eq=False)
class Folders:
    """Anybody's synthetic images, and what is asked about them.

    Attributes
    ----------
    is_member : ndarray of bool or None
        Which candidates were trained on; None: nobody says.
    groups : ndarray of int64 or None
        Whose each candidate is.
    reference, public : Images or None
        Images of a generator that nobody asked about was used for; real images that nobody trained on.
    """

    synthetic: Images
    candidates: Images
    is_member: NDArray[np.bool_] | None = None
    groups: NDArray[np.int64] | None = None
    reference: Images | None = None
    public: Images | None = None

    @classmethod
    def read(
        cls,
        synthetic: Path,
        candidates: Path,
        reference: Path | None = None,
        public: Path | None = None,
        people: bool = False,
    ) -> Folders:
        """Read all, and refuse (DataError, NotApplicable) what would make the answer worth nothing.

        `people`: sub-folders of the candidates are called after the people whose they are.
        """
        made = read_images(synthetic)
        asked, is_member, groups = _candidates(candidates, people)
        others = {
            name: read_images(path) for name, path in (("reference", reference), ("public", public)) if path
        }
        release = Release(as_float(made.pixels))
        for name, some in {"candidates": asked, **{f"{n} images": one for n, one in others.items()}}.items():
            release.check(as_float(some.pixels), name)
        theirs = dict(zip(fingerprints(asked.pixels), asked.names, strict=True))
        if is_member is not None:
            inside, outside = (set(fingerprints(asked.pixels[side])) for side in (is_member, ~is_member))
            if both := inside & outside:
                raise DataError(
                    f"candidate {theirs[min(both)]!r} is among members and non-members ({len(both)} such); each "
                    "picture is one or the other"
                )
        for name, some in others.items():
            if both := set(fingerprints(some.pixels)) & theirs.keys():
                raise DataError(
                    f"candidate {theirs[min(both)]!r} is also among the {name} images ({len(both)} such); what is "
                    "asked about must not be known beforehand"
                )
        return cls(made, asked, is_member, groups, others.get("reference"), others.get("public"))

    @property
    def release(self) -> Release:
        """What an attack sees."""
        reference = None if self.reference is None else Release(as_float(self.reference.pixels))
        public = None if self.public is None else as_float(self.public.pixels)
        return Release(as_float(self.synthetic.pixels), public=public, reference=reference)

    @property
    def notes(self) -> list[str]:
        """What to know before reading a figure."""
        if self.reference is None or len(self.reference) == len(self.synthetic):
            return []
        return [
            f"{len(self.synthetic):,} synthetic images and {len(self.reference):,} of the reference: the nearest of "
            "fewer is farther, for all candidates alike"
        ]


def _size(images: Images) -> str:
    return " x ".join(map(str, images.pixels.shape[1:]))


def _candidates(
    path: Path, people: bool
) -> tuple[Images, NDArray[np.bool_] | None, NDArray[np.int64] | None]:
    """Candidates, which are members where the folder says so, and whose they are where that is asked."""
    sides = {
        name: next((p for p in (path / name, path / f"{name}.npz", path / f"{name}.npy") if p.exists()), None)
        for name in (MEMBERS, NON_MEMBERS)
    }
    missing = [name for name, place in sides.items() if place is None]
    if len(missing) == 1:
        raise DataError(
            f"candidates {str(path)!r}: has {next(n for n in sides if n not in missing)!r} and no {missing[0]!r}; "
            "accepted: both, or images alone, which are then not scored"
        )
    found = [read_images(place) for place in sides.values() if place is not None] or [read_images(path)]
    groups = None
    if people:
        if any(not one.class_names for one in found):
            raise DataError(f"candidates {str(path)!r}: no sub-folders called after people, as --people says")
        whose = [np.array(one.class_names)[one.labels] for one in found]
        groups = np.unique(np.concatenate(whose), return_inverse=True)[1].astype(np.int64)
    if len(found) == 1:
        return found[0], None, groups
    if found[0].pixels.shape[1:] != found[1].pixels.shape[1:]:
        raise DataError(
            f"candidates {str(path)!r}: members are {_size(found[0])}, non-members {_size(found[1])} (channels, "
            "height, width); they must be alike"
        )
    names = [f"{side}/{name}" for side, one in zip(sides, found, strict=True) for name in one.names]
    images = Images(np.concatenate([one.pixels for one in found]), tuple(names))
    is_member = np.arange(len(images)) < len(found[0])
    return images, is_member, groups


@dataclass(frozen=True)
class Told:
    """What attacks said of folders: scores (N,) and audits, where members are known; failures, and why."""

    scores: dict[str, NDArray[np.float64]]
    audits: dict[str, AuditResult]
    left_out: dict[str, str]


def attack_folders(
    folders: Folders, attacks: Mapping[str, SyntheticAttack], config: Config, shown: Callable[..., None]
) -> Told:
    """Ask every attack about the candidates, and score the answers where it is known which are members.

    NotApplicable where no attack applies.
    """
    device, seed = choose_device(config.engine.device), adversary_seed(config.seed, "release")
    release, asked = folders.release, as_float(folders.candidates.pixels)
    blind = Blind(lambda ids: asked[torch.from_numpy(ids)], config.seed)
    told = Told({}, {}, {})
    for name, attack in attacks.items():
        if lacking := _lacking(attack, release):
            told.left_out[name] = lacking
            continue
        shown(name, 0.0, f"{len(asked)} candidates")
        started = time.perf_counter()
        try:
            scores = attack.about(release, asked, seed, device).numpy()
        except NotApplicable as error:
            told.left_out[name] = str(error)
            continue
        told.scores[name] = scores
        if folders.is_member is not None:
            seconds = time.perf_counter() - started
            result = _audit(name, attack, folders, scores, blind, asked, seconds, config.seed)
            result.curves["nearest"] = nearest_pictures(result, release.images, device)
            result.curves["samples"] = release.images[:SHOWN]
            told.audits[name] = result
        shown(name, 1.0, f"{len(asked)} candidates")
    if not told.scores:
        why = "\n".join(f"attack {name!r}: {sentence}" for name, sentence in told.left_out.items())
        raise NotApplicable(why)
    return told


def _lacking(attack: SyntheticAttack, release: Release) -> str:
    """Which option would help an attack that lacks images; "" where it does not."""
    if attack.calibrated and release.reference is None:
        return "calibrated by images of a generator trained on other people's data; give --reference"
    if attack.needs.auxiliary and not attack.calibrated and release.public is None:
        return "needs real images that nobody trained on; give --public"
    return ""


def _audit(
    name: str,
    attack: SyntheticAttack,
    folders: Folders,
    scores: NDArray[np.float64],
    blind: Blind,
    asked: Tensor,
    seconds: float,
    seed: int,
) -> AuditResult:
    """Score one attack's answer."""
    assert folders.is_member is not None
    ids = np.arange(len(scores))
    nobody = np.zeros(len(scores), dtype=bool)
    scored = [Scored(EVERYONE, scores, folders.is_member, ids, nobody, groups=folders.groups)]
    result = audit_membership(
        name,
        scored,
        statistic=type(attack).__name__,
        seconds=seconds,
        blind=blind.of(scored),
        images=lambda wanted: asked[torch.from_numpy(wanted)],
        seed=seed,
    )
    assumptions = ["has the synthetic images, and no generator"]
    if folders.public is not None:
        assumptions.append(f"holds {len(folders.public):,} real images that nobody trained on")
    if folders.reference is not None:
        assumptions.append(f"holds {len(folders.reference):,} images of a reference generator")
    seat: dict[str, Any] = {"seat": "whoever has the images", "needs": [], "letters": []}
    return replace(result, threat=seat | {"assumptions": assumptions})
