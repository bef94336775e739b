"""Forgetting by training again with updates that the server estimates from the kept ones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from fedattack.models import build_model
from fedattack.task import tied_names, trained_parameters
from fedattack.unlearning.averaging import flat, moved, stepped, told
from fedattack.unlearning.curvature import CompactBFGS
from fedattack.unlearning.history import ClientUpdate, History
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion


@dataclass
class FedRecover(Mechanism):
    """FedRecover (Cao et al., IEEE S&P 2023): estimated updates, corrected now and then by real ones.

    From the last model that cannot know the samples, each kept round is taken again. A client that forgets nothing
    is said to answer ``g + H (w - v)``: g its kept update, v the weights it was computed at, w those of now, and H
    the compact L-BFGS form of the client's last pairs of weight and update differences. Clients answer themselves in
    the first rounds, every `every`-th after them, the last ones, and whenever an estimate has a larger entry than any
    kept update has, but for a share `tolerance`; clients that have forgotten a part of their samples always do. The
    first round starts from weights that have not changed, so the kept updates are taken as they are, at no cost.
    Rounds that were not kept are left out. A strategy other than the weighted mean is not followed. The pairs of all
    clients are in memory.

    Parameters
    ----------
    warm_up : int
        Rounds at the beginning that clients take themselves, the first, which is free, among them (T_w).
    every : int
        Rounds from one correction to the next (T_c).
    final : int
        Rounds at the end that clients take themselves (T_f).
    pairs : int
        Differences that a client's curvature is estimated from (s).
    tolerance : float
        Share of a kept update's entries that may be larger than what counts as normal; 0: everything is normal.
    """

    keeps = frozenset({"checkpoints", "updates"})
    warm_up: Annotated[int, Field(ge=1)] = 2
    every: Annotated[int, Field(ge=1)] = 8
    final: Annotated[int, Field(ge=0)] = 1
    pairs: Annotated[int, Field(ge=1)] = 2
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 1e-6

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget the samples of `deletions`; see :meth:`Mechanism.forget`."""
        excluded = merged(history.excluded, deletions)
        start = history.ignorant(excluded)
        if start is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        model = build_model(history.scenario.model)
        names, tied = tuple(trained_parameters(model)), tied_names(model)
        weights, rounds = history.checkpoint(start), history.update_rounds_after(start)
        abnormal = self._largest(history, rounds, excluded, names)
        known = defaultdict[int, CompactBFGS](lambda: CompactBFGS(self.pairs))
        asked = estimated = fixed = 0
        for index, round in enumerate(rounds):
            kept = {update.client: update for update in history.updates(round)}
            shift = flat(weights, names) - flat(history.checkpoint(round - 1), names)
            at_once = index < self.warm_up or index >= len(rounds) - self.final
            at_once = at_once or (index - self.warm_up + 1) % self.every == 0
            ask, answers = set(excluded).intersection(kept), dict[int, ClientUpdate]()
            for client in sorted(kept.keys() - excluded.keys()):
                if at_once and bool(shift.any()):
                    ask.add(client)
                    continue
                guess = stepped(kept[client].change, -known[client].product(shift), names, {})
                if float(flat(guess, names).abs().max()) > abnormal:
                    ask.add(client)
                    fixed += 1
                else:
                    answers[client] = replace(kept[client], change=guess)
            estimated += len(answers)
            for update in trainer.updates(excluded, weights, round, clients=sorted(ask)) if ask else ():
                answers[update.client] = update
                asked += 1
                if update.client not in excluded:
                    # an update goes against the gradient, of which the estimate is
                    change = flat(kept[update.client].change, names) - flat(update.change, names)
                    known[update.client].add(shift, change)
            weights = moved(weights, (answers[client] for client in sorted(answers)), tied)
        details = {"asked": asked, "estimated": estimated, "abnormal": fixed}
        return Forgotten(weights, excluded, start, details=details | told(history.scenario, "the curvature"))

    def _largest(
        self, history: History, rounds: Iterable[int], excluded: Collection[int], names: Sequence[str]
    ) -> float:
        """A size that no more than a share `tolerance` of the entries of any unaffected client's update exceeds."""
        found = 0.0 if self.tolerance else math.inf
        for update in (one for round in rounds if self.tolerance for one in history.updates(round)):
            if update.client not in excluded:
                sizes = flat(update.change, names).abs()
                found = max(found, float(sizes.topk(1 + int(self.tolerance * len(sizes))).values[-1]))
        return found
