"""Membership attacks on saved observations, without a federation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adversaries.membership.base import MembershipAttack
from adversaries.membership.knowledge import Knowledge
from fedattack.audit import AuditResult, audit_membership
from fedattack.audit.membership_floors import Blind
from fedattack.defenses import hides_clients
from fedattack.errors import DataError
from fedattack.observation import EVERYONE, MembershipScores, Observation, client_name
from fedattack.storage.membership import load_candidates, load_global_model, load_membership_truth
from fedattack.storage.observations import observed_rounds
from simulations.experiments.answered import Answered
from simulations.experiments.base import SavedWork
from simulations.experiments.question import Asked, per_unit
from simulations.experiments.rounds import Watch


class SavedMembership(SavedWork):
    """Membership attacks on saved observations: asked about the saved candidates, scored where the truth is given."""

    attacks: dict[str, MembershipAttack]
    left = "the scores are in parts/"

    def __init__(self, *run: Any) -> None:
        super().__init__(*run)
        self._rounds = observed_rounds(self.saved)
        self._candidates = load_candidates(self.saved)
        self._watch: Watch | None = None
        self._seen: set[int] = set()
        self._hidden = False
        self._answers: dict[str, dict[int, MembershipScores]] = defaultdict(dict)

    def submit(self, observations: Sequence[Observation]) -> None:
        first = observations[0]
        if self._watch is None:
            if tuple(self._candidates.images.shape[1:]) != first.scenario.image_shape:
                raise DataError(
                    f"{self.saved}: candidates of {tuple(self._candidates.images.shape[1:])}, but the model takes "
                    f"{first.scenario.image_shape}"
                )
            seat = Knowledge.of(self._candidates, first.auxiliary), first.auxiliary
            setting = first.scenario, self._rounds[-1]
            self._watch = Watch(self.config, self.folder, self.attacks, seat, setting, self.shown)
            self._hidden = hides_clients(first.scenario.defense)
        self._seen |= {o.client for o in observations}
        last = first.round == self._rounds[-1]
        shown = [name for name, attack in self.attacks.items() if last or attack.watches == "every"]
        self._watch.show(observations, load_global_model(self.saved, first.round), shown)

    def collect(self) -> None:
        assert self._watch is not None, "there is no folder without an observation"
        self._watch.collect()
        self.failed |= self._watch.failed
        for name, attack in self.attacks.items():
            if name not in self.failed:
                for target in self._targets(attack):
                    if (found := self._watch.scores(name, target)) is not None:
                        self._answers[name][target] = found
                if not self._answers[name]:
                    self.failed[name] = self._watch.fault(name)

    def _targets(self, attack: MembershipAttack) -> Sequence[int]:
        assert self._watch is not None
        if self._hidden or attack.needs_now(self._watch.scenario).about == "anybody":
            return [EVERYONE]
        asked = self.config.attack.targets
        return sorted(self._seen if asked is None else self._seen & set(asked))

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def audit(self) -> dict[str, AuditResult]:
        assert self._watch is not None
        assert self.truth is not None
        truth, known = self.truth, load_membership_truth(self.truth)
        groups = self._candidates.groups
        units = len(self._candidates.labels) if groups is None else int(groups.max()) + 1
        if len(known.ids) != units:
            raise DataError(f"{truth} is of {len(known.ids)} candidates, {self.saved} of {units}")
        first = np.arange(units) if groups is None else np.unique(groups.numpy(), return_index=True)[1]
        place = {int(sample): index for sample, index in zip(known.ids, first, strict=True)}

        def images(ids: NDArray[np.int64]) -> Tensor:
            return self._candidates.images[[place[sample] for sample in ids.tolist()]]

        blind, audits = Blind(images, self.config.seed), {}
        for name, answers in self._answers.items():
            told = Answered(known.ids, known.labels, known.groups)
            for target, answer in answers.items():
                if target in known.asked:
                    asked = Asked(target, **known.asked[target])
                    told.add(asked, per_unit(answer, groups), self._rounds)
            if not told.scored:
                self.failed[name] = DataError(f"{truth} says nothing of clients {sorted(answers)}")
                continue
            audits[name] = audit_membership(
                name,
                told.scored,
                statistic=told.statistic,
                seconds=self._watch.seconds[name],
                accuracy=known.accuracy,
                chance_accuracy=known.chance_accuracy,
                test_samples=known.test_samples,
                source=told.source,
                blind=blind.of(told.scored),
                references=told.references,
                images=images,
                seed=self.config.seed,
            )
        return audits

    def answers(self) -> dict[str, dict[str, MembershipScores]]:
        return {
            name: {client_name(target): found for target, found in answers.items()}
            for name, answers in self._answers.items()
        }
