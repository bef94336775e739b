"""What the server saw of the canaries, set beside what their noise is accounted to guarantee."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedattack.canaries import Canaries
from fedattack.defenses.accounting import UNIT_WORDS, Privacy
from fedattack.metrics.canaries import (
    GaussianEstimate,
    gaussian_bound,
    gaussian_estimate,
    guessed,
    one_run_bound,
    right_guesses,
    shift_epsilon,
)
from fedattack.observation import Update
from fedattack.reporting import formats

_AT_ONCE = 1 << 24
"""Entries of contributions that are held at once."""

Contribution = Callable[[int], NDArray[np.float32]]
"""Canary -> what it adds if it is there, float32 (numel,), over all that an update holds."""


class CanaryScores:
    """Evidence on each canary, summed over the updates that could hold it.

    Of an update ``u = sum_j b_j w_j p_j + noise``, where canary j of contribution p_j is there (b_j = 1) or not, the
    noise has the deviation ``noise * sqrt(v)`` in each entry. The `scores` are ``w <p, u> / v``, matched filters: the
    log-likelihood ratio up to ``- w^2 |p|^2 / 2v`` and the noise. They are 0 on average where the canary is
    absent, and `inclusions`, the sum of ``w^2 |p|^2 / v``, where it is there: the number of releases that hold it,
    counted in full where a release is one step seen singly and densely, in part otherwise.

    Only entries that were sent count, of u and of p. Half of all other canaries' contributions, what they add on
    average, is taken out first, and what is known of everything else: differential privacy is promised against one
    who knows all but whether the unit is there.
    """

    def __init__(self, count: int) -> None:
        self.scores = np.zeros(count)
        self.inclusions = np.zeros(count)

    def add(
        self,
        update: Update,
        canaries: NDArray[np.int64],
        weights: NDArray[np.float64],
        variance: float,
        contribution: Contribution,
        known: NDArray[np.float32] | None = None,
    ) -> None:
        """Take account of an update: of the `canaries` (k,) that it could hold, their `weights` w (k,), and v.

        `known`, (numel,), is what everybody else adds.
        """
        values = update.values.numpy().astype(np.float64)
        sent = None if update.indices is None else update.indices.numpy()
        if known is not None:
            values -= known if sent is None else known[sent]

        def parts() -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float32]]]:
            size = max(1, _AT_ONCE // max(1, update.numel))
            for start in range(0, len(canaries), size):
                chosen = canaries[start : start + size]
                rows = [contribution(int(one)) for one in chosen]
                held = np.stack([row if sent is None else row[sent] for row in rows])
                yield chosen, weights[start : start + size], held

        kept = list(parts()) if len(canaries) * update.numel <= _AT_ONCE else None
        expected = sum((0.5 * w @ held for _, w, held in kept or parts()), np.zeros(len(values)))
        values = values - expected
        for chosen, w, held in kept or parts():
            power = np.square(held, dtype=np.float64).sum(1)
            self.scores[chosen] += w * (held @ values + 0.5 * w * power) / variance
            self.inclusions[chosen] += w * w * power / variance


@dataclass(frozen=True)
class CanaryAudit:
    """What the canaries show, beside what is accounted.

    `bound` holds for any mechanism, `gaussian_bound` for Gaussian noise, both at 95 %, beside their ceilings, the
    largest value that so many canaries could show; `estimate` is no bound, but for its `least`. `view` is the
    epsilon of the agreed noise in what the server saw of the canaries: less than `account` where it saw sums, or not
    every release could hold them. `response` is by how much of what was expected a present canary raised its score.
    """

    kind: str
    planted: int
    count: int  # that were in at least one update
    present: int  # of these
    guesses: int
    right: int
    bound: float
    ceiling: float
    gaussian_bound: float
    gaussian_ceiling: float
    estimate: GaussianEstimate | None
    response: float
    inclusions: float  # mean of those that count
    view: float | None  # None where it cannot be told, for `through`
    through: str  # what stands between noise and server and is not linear; empty for nothing
    account: Privacy
    client: int  # of the canaries' clients that which is guaranteed least
    noise: float  # agreed multiplier
    scores: NDArray[np.float64]  # (count,)
    inclusions_of: NDArray[np.float64]  # (count,)
    of_present: NDArray[np.bool_]  # (count,)

    @property
    def broken(self) -> bool:
        """Whether a bound lies above what is accounted.

        The two bounds by guesses grow with the number of right ones and depend on nothing else, so that no
        correction for looking at both is due; that of normal scores errs once in a thousand runs.
        """
        return self.least > self.account.epsilon

    @property
    def normal_bound(self) -> float:
        """For Gaussian noise seen through what is linear, at 99.9 %; 0 for anything else."""
        return 0.0 if self.through or self.estimate is None else self.estimate.least

    @property
    def least(self) -> float:
        """The largest bound."""
        return max(self.bound, self.gaussian_bound, self.normal_bound)

    @property
    def adjacency(self) -> str:
        """What may be there or not, in words."""
        return f"delta {formats.compact(self.account.delta)} for {UNIT_WORDS[self.account.unit]}"

    @property
    def text(self) -> str:
        """The finding in a line."""
        bound, of, gauss, most = (
            formats.decimal(x, 2)
            for x in (self.bound, self.ceiling, self.gaussian_bound, self.gaussian_ceiling)
        )
        measured = f"epsilon at least {gauss} for Gaussian noise (so many canaries show at most {most}), {bound} for "
        measured += f"any mechanism (at most {of}), at 95 %"
        if self.estimate is not None:
            e = self.estimate
            if self.normal_bound:
                measured += f", {formats.decimal(self.normal_bound, 2)} for Gaussian noise at 99.9 %"
            measured += f"; estimated {formats.decimal(e.epsilon, 2)} "
            measured += f"[{formats.decimal(e.low, 2)}, {formats.decimal(e.high, 2)}]"
        accounted = f"accounted {formats.decimal(self.account.epsilon, 2)} at {self.adjacency}"
        text = f"{formats.count(self.count)} {self.kind} canaries: {measured}; {accounted}"
        return f"BROKEN GUARANTEE: {text}" if self.broken else text

    @property
    def headline(self) -> str:
        """What a broken guarantee is told by; empty where there is none."""
        if not self.broken:
            return ""
        return (
            f"broken guarantee: canaries show epsilon {formats.decimal(self.least, 2)} or more, where "
            f"{formats.decimal(self.account.epsilon, 2)} is accounted, at {self.adjacency}"
        )

    @property
    def remarks(self) -> list[str]:
        """What to know when reading the figures."""
        told = [
            f"guesses, fixed beforehand: the {self.guesses // 2} canaries of the highest evidence are said to be "
            f"there, the {self.guesses // 2} of the lowest not; {self.right} of {self.guesses} are right"
        ]
        if self.view is None:
            told.append(
                f"noise and canaries came through {self.through}: scores are of what was sent, as it "
                "was sent, and the bounds hold for that"
            )
        elif self.view < 0.98 * self.account.epsilon:
            told.append(
                f"the server saw {formats.decimal(self.inclusions, 2)} releases' worth of a canary on average: the "
                f"agreed noise shows epsilon {formats.decimal(self.view, 2)} there, however many canaries there are"
            )
        if self.account.note:
            told.append(f"nothing is guaranteed: {self.account.note}")
        elif self.gaussian_ceiling < self.account.epsilon:
            text = "guesses about so few canaries could not show a broken guarantee, whatever the noise was"
            told.append(text + ("; normal scores could" if self.normal_bound else ""))
        if self.kind == "client":
            told.append(
                "canary clients' replies are part of the global model, which learns from the others only"
            )
        if self.planted > self.count:
            told.append(f"{self.planted - self.count} canaries were in no update")
        if self.estimate is None:
            told.append("no estimate: fewer than two canaries were there, or fewer than two were not")
        elif self.estimate.epsilon > self.account.epsilon and not self.broken:
            told.append("the estimate above the accounted epsilon breaks no guarantee: it is no bound")
        return told

    @property
    def rows(self) -> list[dict[str, str]]:
        """Of a table: "name", "value", "most" (that could be shown) and "what" of each epsilon."""
        a, e = self.account, self.estimate
        found = [
            ("accounted", a.epsilon, None, f"what the agreed noise guarantees, at {self.adjacency}"),
            (
                "if replaced",
                a.replacement_epsilon,
                None,
                "the same noise, where the unit is replaced by another",
            ),
            (
                "bound, Gaussian",
                self.gaussian_bound,
                self.gaussian_ceiling,
                "shown at 95 %, if noise is Gaussian",
            ),
            ("bound", self.bound, self.ceiling, "shown at 95 %, of any mechanism"),
        ]
        if self.view is not None:
            found.insert(
                2, ("in the server's view", self.view, None, "the agreed noise, in what the server saw")
            )
        if self.normal_bound:
            what = "shown at 99.9 %, if noise is Gaussian, by how far present and absent lie apart"
            found.append(("bound, normal scores", self.normal_bound, None, what))
        if e is not None:
            ends = f"[{formats.decimal(e.low, 2)}, {formats.decimal(e.high, 2)}]"
            found.append(("estimate", e.epsilon, None, f"no bound; 95 % interval {ends}"))
        return [
            {"name": n, "value": formats.decimal(x, 2), "most": formats.decimal(m, 2) if m else "", "what": w}
            for n, x, m, w in found
        ]

    def record(self) -> dict[str, Any]:
        """The figures, JSON-able, with "broken", "headline", "text" and "remarks"."""
        told = {"broken": self.broken, "headline": self.headline, "text": self.text, "remarks": self.remarks}
        left_out = ("scores", "inclusions_of", "of_present")
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        kept["account"] = dataclasses.asdict(self.account)
        kept["estimate"] = None if self.estimate is None else dataclasses.asdict(self.estimate)
        return kept | told


def audit_canaries(
    canaries: Canaries, found: CanaryScores, account: Privacy, client: int, share: float, through: str = ""
) -> CanaryAudit | None:
    """Guess, count and estimate; `account` is that of `client`, `share` of the canaries are guessed about.

    `through` names what makes of updates something that is not linear in them. None where fewer than two canaries
    were in any update.
    """
    used = found.inclusions > 0
    count = int(used.sum())
    if count < 2:
        return None
    scores, inclusions, present = found.scores[used], found.inclusions[used], canaries.present[used]
    # Half of the canaries are there: the mean score tells how strongly one answers, without knowing which.
    response = max(0.0, 2 * float(scores.sum() / inclusions.sum()))
    guesses, delta = guessed(count, share), account.delta
    right = right_guesses(scores - 0.5 * response * inclusions, present, guesses)
    return CanaryAudit(
        kind=canaries.kind,
        planted=len(canaries),
        count=count,
        present=int(present.sum()),
        guesses=guesses,
        right=right,
        bound=one_run_bound(count, guesses, right, delta),
        ceiling=one_run_bound(count, guesses, guesses, delta),
        gaussian_bound=gaussian_bound(count, guesses, right, delta),
        gaussian_ceiling=gaussian_bound(count, guesses, guesses, delta),
        estimate=gaussian_estimate(scores, present, inclusions, delta),
        response=response,
        inclusions=float(inclusions.mean()),
        view=shift_epsilon(math.sqrt(float(inclusions.mean())) / canaries.promise.noise, delta)
        if not through
        else None,
        through=through,
        account=account,
        client=client,
        noise=canaries.promise.noise,
        scores=scores,
        inclusions_of=inclusions,
        of_present=present,
    )
