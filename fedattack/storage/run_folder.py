"""The folder that a run leaves behind, and from which a killed run resumes.

Layout::

    config.toml  log.txt  records.csv  records.parquet  requests.csv  summary.json  report.html
    observations/  truth/        what the attacker saw, and, apart from it, what was private
    parts/<attack>/<key>.*       finished answers of the attacks, and why there is none (.failed.json)
    checkpoints/<attack>/<key>/  states of attacks that are at work
    images/<attack>/  figures/
"""

from __future__ import annotations

import datetime
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedattack import sealed
from fedattack.config import Config
from fedattack.errors import ConfigError, DataError, told
from fedattack.files import cannot_write, private_folder, write_bytes, write_tensors
from fedattack.observation import MembershipScores, Reconstruction, client_name
from fedattack.sealed import Identity
from fedattack.storage import lock
from fedattack.storage.observations import read_tensors, safe_name
from fedattack.storage.plain import flat, number, plain
from fedattack.version import fedattack_version

LOGGER = "fedattack_log"
"""The logger that is told every line of ``log.txt``; apart from those whose records go into the log."""

_SESSIONS = "sessions"
_LONGEST = 4000
"""Characters of a line of the log."""


class StoredAnswer(NamedTuple):
    """An attack's answer with what it cost: seconds, and the most bytes that its process held (0: not known)."""

    answer: Reconstruction
    seconds: float
    memory: int


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, made with :meth:`create`; `resumed` where it held a run of the same settings.

    `begun` is when this session began, `sessions` how many there were with it; other processes are kept out of a
    folder that was made with :meth:`create` until :meth:`close`, until nobody refers to it, or this process ends.
    Whatever writes raises RunFailed where the disk is full, whatever reads DataError where a file is malformed.
    """

    path: Path
    config: Config
    resumed: bool = False
    begun: datetime.datetime = field(default_factory=_now, compare=False)
    sessions: int = field(default=1, compare=False)
    token: str = field(default="", compare=False, repr=False)

    @classmethod
    def create(cls, path: Path | str, config: Config, resume: bool = True) -> RunFolder:
        """Make the folder, or take up the run of the same result settings in it (engine and output may differ).

        Raises
        ------
        ConfigError
            If the folder holds another configuration's run (names the first settings that differ), is in use by
            another process, is not empty and no run folder, cannot be made, or holds a run while `resume` is False.
        """
        path = Path(path)
        token = lock.take(path, "setting 'output.run_dir'")
        try:
            folder = cls._create(path, config, resume, token)
        except BaseException:
            lock.release(token)
            raise
        weakref.finalize(folder, lock.release, token)
        return folder

    @classmethod
    def _create(cls, path: Path, config: Config, resume: bool, token: str) -> RunFolder:
        stored = path / "config.toml"
        try:
            resumed = stored.is_file()
            if not resumed and any(not one.name.startswith(lock.NAME) for one in path.iterdir()):
                raise ConfigError(
                    f"setting 'output.run_dir' = {str(path)!r}: is not empty and no run folder (no config.toml); "
                    "give an empty or new folder, or one of an earlier run with the same settings"
                )
            for leftover in path.rglob(".*.part"):
                leftover.unlink(missing_ok=True)
        except OSError as error:
            what = f"{error.strerror}; give a folder"
            raise ConfigError(f"setting 'output.run_dir' = {str(path)!r}: {what}") from None
        if resumed:
            _check_same(stored, config, resume)
        else:
            header = f"# A run of fedattack {fedattack_version()}; repeat it with: fedattack --config config.toml\n"
            write_bytes(stored, (header + config.to_toml()).encode())
        earlier = cls(path, config).load_part(_SESSIONS) or {}
        begun = _now()
        folder = cls(path, config, resumed, begun, 1 + int(number(earlier.get("count", 0))), token)
        folder.save_part(_SESSIONS, {"count": folder.sessions, "last": begun.isoformat(timespec="seconds")})
        if folder.truth.is_dir():
            private_folder(folder.truth)
        folder.log("resumed" if resumed else "started")
        return folder

    def close(self) -> None:
        """Let other processes use the folder."""
        lock.release(self.token)

    @property
    def observations(self) -> Path:
        """Where observations are stored; free of the truth."""
        return self.path / "observations"

    @property
    def truth(self) -> Path:
        """Where the private batches are stored."""
        return self.path / "truth"

    @property
    def images(self) -> Path:
        """Single images, as PNG."""
        return self.path / "images"

    @property
    def figures(self) -> Path:
        """Figures, as PNG."""
        return self.path / "figures"

    def log(self, text: str) -> None:
        """Append a line with the time (UTC) to ``log.txt``; as one line (:func:`fedattack.errors.told`)."""
        line = f"{_now().isoformat(timespec='seconds')}  {told(text, _LONGEST)}\n"
        try:
            with (self.path / "log.txt").open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise cannot_write(self.path / "log.txt", error, len(line)) from error
        logging.getLogger(LOGGER).info(line.rstrip())

    def save_reconstruction(
        self, attack: str, key: str, answer: Reconstruction, seconds: float, memory: int = 0
    ) -> None:
        """Store an attack's answer for the observation `key` and its cost; a resumed run need not ask again."""
        place = self._part(attack, key)
        names = list(answer.floors)
        tensors = {"images": answer.images, "labels": answer.labels}
        tensors |= {f"floor.{index}": answer.floors[name] for index, name in enumerate(names)}
        history = torch.tensor(answer.history, dtype=torch.float64)
        scalars = torch.tensor([answer.loss, answer.label_confidence, seconds], dtype=torch.float64)
        tensors |= {"history": history, "scalars": scalars}
        document = {
            "format": 1,
            "certificate": answer.certificate,
            "has_certificate": answer.certificate is not None,
            "method": answer.method,
            "floors": names,
            "details": answer.details,
            "memory": memory,
        }
        self._write_pair(place, document, tensors)
        place.with_suffix(".failed.json").unlink(missing_ok=True)

    def save_failure(self, attack: str, key: str, reason: str) -> None:
        """Store why an attack has no answer for one observation."""
        path = self._part(attack, key).with_suffix(".failed.json")
        sealed.write_json(path, {"format": 1, "reason": reason}, self._called(path), self.identity)

    def has_failed(self, attack: str, key: str) -> bool:
        """Whether :meth:`save_failure` was called for it, and no answer came since."""
        return self._part(attack, key).with_suffix(".failed.json").is_file()

    def checkpoints(self, attack: str, key: str) -> Path:
        """Where an attack that is at work on one observation, or on a group that begins with it, keeps its state."""
        return self.path / "checkpoints" / safe_name(attack) / safe_name(key)

    def load_reconstruction(self, attack: str, key: str) -> StoredAnswer | None:
        """The stored answer and its cost, or None where it is not finished."""
        place = self._part(attack, key)
        if not place.with_suffix(".json").is_file():
            return None
        document, tensors = self._read_pair(place)
        try:
            loss, confidence, seconds = tensors["scalars"].tolist()
            answer = Reconstruction(
                images=tensors["images"],
                labels=tensors["labels"],
                loss=loss,
                label_confidence=confidence,
                certificate=number(document["certificate"]) if document["has_certificate"] else None,
                method=document["method"],
                history=tensors["history"].tolist(),
                floors={name: tensors[f"floor.{index}"] for index, name in enumerate(document["floors"])},
                details=document["details"],
            )
            memory = int(document.get("memory", 0))
        except (KeyError, TypeError, ValueError) as error:
            what = "do not hold one reconstruction"
            raise DataError(f"{place}.json and .safetensors {what}: {error!r}") from None
        return StoredAnswer(answer, seconds, memory)

    def save_round(self, attack: str, round: int, figures: Mapping[str, torch.Tensor]) -> None:
        """Store what an attack keeps of one round."""
        path = self._part(attack, f"round-{round:05d}").with_suffix(".safetensors")
        sealed.write_sealed(path, figures, self._called(path), self.identity)

    def load_rounds(self, attack: str) -> dict[int, dict[str, torch.Tensor]]:
        """Round -> what :meth:`save_round` stored of it, ascending."""
        found = sorted((self.path / "parts" / safe_name(attack)).glob("round-?????.safetensors"))
        return {
            int(path.stem.partition("-")[2]): sealed.read_sealed(path, self._called(path), self.identity)[0]
            for path in found
        }

    def save_scores(
        self, attack: str, target: int, scores: MembershipScores, seconds: float, basis: Sequence[int] = ()
    ) -> None:
        """Store the membership scores for one target client; `basis` says what they were concluded from."""
        place = self._part(attack, client_name(target))
        document = {"format": 1, "statistic": scores.statistic, "details": scores.details, "seconds": seconds}
        self._write_pair(place, document | {"basis": list(basis)}, {"scores": scores.scores})

    def load_scores(
        self, attack: str, target: int, basis: Sequence[int] | None = None
    ) -> tuple[MembershipScores, float] | None:
        """The stored scores and their seconds; None where they are not finished, or have another basis.

        `basis` None: any will do.
        """
        place = self._part(attack, client_name(target))
        if not place.with_suffix(".json").is_file():
            return None
        document, tensors = self._read_pair(place)
        try:
            if basis is not None and document["basis"] != list(basis):
                return None
            scores = MembershipScores(tensors["scores"], document["statistic"], document["details"])
            return scores, float(document["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}.json and .safetensors do not hold scores: {error!r}") from None

    def save_part(self, name: str, document: Mapping[str, Any]) -> None:
        """Store any other finished part (the federation's rounds, an unlearning outcome) as JSON."""
        path = self.path / "parts" / f"{safe_name(name)}.json"
        sealed.write_json(path, plain(document), self._called(path), self.identity)

    def load_part(self, name: str) -> dict[str, Any] | None:
        """A part stored by :meth:`save_part` (NaN comes back as None), or None where it is not finished."""
        path = self.path / "parts" / f"{safe_name(name)}.json"
        if not path.is_file():
            return None
        return sealed.read_json(path, self._called(path), self.identity)

    def _part(self, attack: str, key: str) -> Path:
        return self.path / "parts" / safe_name(attack) / safe_name(key)

    @cached_property
    def identity(self) -> Identity:
        """Whose the folder's files are."""
        return Identity.of(self.path, self.config.result_settings())

    def _called(self, path: Path) -> str:
        """What a file's seal says that it is: its place in the folder."""
        return path.relative_to(self.path).as_posix()

    def _write_pair(
        self, place: Path, document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        path = place.with_suffix(".json")
        path.unlink(missing_ok=True)  # it would not be that of the new tensors
        write_tensors(place.with_suffix(".safetensors"), tensors)
        sealed.write_json(path, plain(document), self._called(path), self.identity, tensors)

    def _read_pair(self, place: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors, path = read_tensors(place.with_suffix(".safetensors")), place.with_suffix(".json")
        return sealed.read_json(path, self._called(path), self.identity, tensors), tensors


def _check_same(stored: Path, config: Config, resume: bool) -> None:
    if not resume:
        raise ConfigError(
            f"setting 'output.run_dir' = {str(stored.parent)!r}: holds a run already; resume it or give another"
        )
    try:
        earlier = Config.from_toml(stored)
    except ConfigError as error:
        what = f"{stored} is not readable: {error}; give another folder"
        raise ConfigError(f"setting 'output.run_dir': {what}") from None
    there, here = flat(earlier.result_settings()), flat(config.result_settings())
    differing = [name for name in [*here, *(set(there) - set(here))] if there.get(name) != here.get(name)]
    if differing:
        both = [f"{name} = {there.get(name)!r} there, {here.get(name)!r} here" for name in differing[:3]]
        shown = "; ".join(both)
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            f"setting 'output.run_dir' = {str(stored.parent)!r}: holds a run with other settings: {shown}{more}. "
            "Give another folder, or the same settings to resume"
        )
