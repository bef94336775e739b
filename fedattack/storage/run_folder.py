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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedattack.config import Config
from fedattack.errors import ConfigError, DataError
from fedattack.files import cannot_write, write_bytes, write_tensors
from fedattack.observation import MembershipScores, Reconstruction, client_name
from fedattack.storage.observations import read_tensors, safe_name
from fedattack.storage.plain import fedattack_version, flat, number, read_json, write_json


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, made with :meth:`create`; `resumed` where it held a run of the same settings.

    Whatever writes raises RunFailed where the disk is full, whatever reads DataError where a file is malformed.
    """

    path: Path
    config: Config
    resumed: bool = False

    @classmethod
    def create(cls, path: Path | str, config: Config, resume: bool = True) -> RunFolder:
        """Make the folder, or take up the run of the same result settings in it (engine and output may differ).

        Raises
        ------
        ConfigError
            If the folder holds another configuration's run (names the first settings that differ), is not empty and
            no run folder, cannot be made, or holds a run while `resume` is False.
        """
        path = Path(path)
        stored = path / "config.toml"
        try:
            path.mkdir(parents=True, exist_ok=True)
            resumed = stored.is_file()
            if not resumed and any(path.iterdir()):
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
        folder = cls(path, config, resumed)
        folder.log("resumed" if resumed else "started")
        return folder

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
        """Append a line with the time (UTC) to ``log.txt``."""
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = f"{stamp}  {text}\n"
        try:
            with (self.path / "log.txt").open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise cannot_write(self.path / "log.txt", error, len(line)) from error

    def save_reconstruction(self, attack: str, key: str, answer: Reconstruction, seconds: float) -> None:
        """Store an attack's answer for the observation `key` and its seconds; a resumed run need not ask again."""
        place = self._part(attack, key)
        names = list(answer.floors)
        tensors = {"images": answer.images, "labels": answer.labels}
        tensors |= {f"floor.{index}": answer.floors[name] for index, name in enumerate(names)}
        history = torch.tensor(answer.history, dtype=torch.float64)
        scalars = torch.tensor([answer.loss, answer.label_confidence, seconds], dtype=torch.float64)
        tensors |= {"history": history, "scalars": scalars}
        write_tensors(place.with_suffix(".safetensors"), tensors)
        document = {
            "format": 1,
            "certificate": answer.certificate,
            "has_certificate": answer.certificate is not None,
            "method": answer.method,
            "floors": names,
            "details": answer.details,
        }
        write_json(place.with_suffix(".json"), document)
        place.with_suffix(".failed.json").unlink(missing_ok=True)

    def save_failure(self, attack: str, key: str, reason: str) -> None:
        """Store why an attack has no answer for one observation."""
        write_json(self._part(attack, key).with_suffix(".failed.json"), {"format": 1, "reason": reason})

    def has_failed(self, attack: str, key: str) -> bool:
        """Whether :meth:`save_failure` was called for it, and no answer came since."""
        return self._part(attack, key).with_suffix(".failed.json").is_file()

    def checkpoints(self, attack: str, key: str) -> Path:
        """Where an attack that is at work on one observation, or on a group that begins with it, keeps its state."""
        return self.path / "checkpoints" / safe_name(attack) / safe_name(key)

    def load_reconstruction(self, attack: str, key: str) -> tuple[Reconstruction, float] | None:
        """The stored answer and its seconds, or None where it is not finished."""
        place = self._part(attack, key)
        if not place.with_suffix(".json").is_file():
            return None
        document, tensors = _read_pair(place)
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
        except (KeyError, TypeError, ValueError) as error:
            what = "do not hold one reconstruction"
            raise DataError(f"{place}.json and .safetensors {what}: {error!r}") from None
        return answer, seconds

    def save_round(self, attack: str, round: int, figures: Mapping[str, torch.Tensor]) -> None:
        """Store what an attack keeps of one round."""
        write_tensors(self._part(attack, f"round-{round:05d}").with_suffix(".safetensors"), figures)

    def load_rounds(self, attack: str) -> dict[int, dict[str, torch.Tensor]]:
        """Round -> what :meth:`save_round` stored of it, ascending."""
        found = sorted((self.path / "parts" / safe_name(attack)).glob("round-?????.safetensors"))
        return {int(path.stem.partition("-")[2]): read_tensors(path) for path in found}

    def save_scores(
        self, attack: str, target: int, scores: MembershipScores, seconds: float, basis: Sequence[int] = ()
    ) -> None:
        """Store the membership scores for one target client; `basis` says what they were concluded from."""
        place = self._part(attack, client_name(target))
        write_tensors(place.with_suffix(".safetensors"), {"scores": scores.scores})
        document = {"format": 1, "statistic": scores.statistic, "details": scores.details, "seconds": seconds}
        write_json(place.with_suffix(".json"), document | {"basis": list(basis)})

    def load_scores(
        self, attack: str, target: int, basis: Sequence[int] | None = None
    ) -> tuple[MembershipScores, float] | None:
        """The stored scores and their seconds; None where they are not finished, or have another basis.

        `basis` None: any will do.
        """
        place = self._part(attack, client_name(target))
        if not place.with_suffix(".json").is_file():
            return None
        document, tensors = _read_pair(place)
        try:
            if basis is not None and document["basis"] != list(basis):
                return None
            scores = MembershipScores(tensors["scores"], document["statistic"], document["details"])
            return scores, float(document["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}.json and .safetensors do not hold scores: {error!r}") from None

    def save_part(self, name: str, document: Mapping[str, Any]) -> None:
        """Store any other finished part (the federation's rounds, an unlearning outcome) as JSON."""
        write_json(self.path / "parts" / f"{safe_name(name)}.json", document)

    def load_part(self, name: str) -> dict[str, Any] | None:
        """A part stored by :meth:`save_part` (NaN comes back as None), or None where it is not finished."""
        path = self.path / "parts" / f"{safe_name(name)}.json"
        if not path.is_file():
            return None
        document = read_json(path)
        if not isinstance(document, dict):
            raise DataError(f"{path} holds no JSON object")
        return document

    def _part(self, attack: str, key: str) -> Path:
        return self.path / "parts" / safe_name(attack) / safe_name(key)


def _read_pair(place: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    return read_json(place.with_suffix(".json")), read_tensors(place.with_suffix(".safetensors"))


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
