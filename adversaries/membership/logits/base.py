"""What a black-box attack is: it reads a model's answers to the candidates, beside those of reference models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adversaries.membership.base import Figures, MembershipAttack, rows_of, unanswered
from adversaries.membership.knowledge import Knowledge, References
from adversaries.membership.view import RoundView
from adversaries.needs import Needs
from adversaries.seats import CuriousServer
from fedattack.errors import DataError, NotApplicable
from fedattack.observation import EVERYONE, MembershipScores, Scenario


@dataclass
class BlackBox(CuriousServer, MembershipAttack):
    """Base of the attacks that see a model's answers alone; a subclass brings :meth:`signal`.

    Parameters
    ----------
    model : {"global", "rounds", "client"}
        Whose answers: ``global``, the last global model, and the question is who was a member of anybody;
        ``rounds``, the global models of all rounds, the mean of what each tells; ``client``, the target's own last
        model, and the question is who was the target's.
    """

    model: Literal["global", "rounds", "client"] = "global"

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody")

    def required(self) -> Needs:
        """What the signal needs with its own settings: references, public samples."""
        return self.needs

    def needs_now(self, scenario: Scenario) -> Needs:
        """Single updates, where it reads the clients' own models."""
        own = self.model == "client"
        return replace(self.required(), about="client", sums="single") if own else self.required()

    @abstractmethod
    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """Shape (N,), float64; higher means "more likely a member".

        `logits`, float64 (N, C), are a model's answers to the candidates, and `public`, (P, C), to the public
        samples; P = 0 unless needs ask for some.
        """

    def watch(self, view: RoundView, seed: int) -> Figures:
        """``clients``, int64 (K,), and ``logits``, float32 (K, N, C); of public samples ``public``, (K, P, C).

        There is one row, of ``EVERYONE``, unless it reads the clients' own models.
        """
        own = self.model == "client"
        if not own and view.after is None:
            raise NotApplicable(
                f"{type(self).__name__}: the global model after round {view.round} is not known; use model 'client'"
            )
        rows = view.clients if own else [EVERYONE]
        found = {"clients": torch.tensor(rows)}
        found["logits"] = torch.stack([view.logits(row if own else "after") for row in rows])
        if self.required().auxiliary:
            found["public"] = torch.stack([view.public_logits(row if own else "after") for row in rows])
        return found

    def scores(self, rounds: Mapping[int, Figures], target: int, knowledge: Knowledge) -> MembershipScores:
        """See :meth:`signal`.

        `details`: the rounds read, how often each candidate was put to the model, the numbers of public samples and
        references, of references the fewest that did and did not train on a candidate, and how many candidates have
        fewer than two of either, so that what is of all candidates stands in.
        NotApplicable without the references or public samples it needs; DataError for answers that are not finite.
        """
        name, needs = type(self).__name__, self.required()
        asked = target if self.model == "client" else EVERYONE
        logits = rows_of(rounds, asked, "logits")
        if not logits:
            raise unanswered(name, asked, len(rounds))
        count = 0 if knowledge.public is None else len(knowledge.public.images)
        if count < needs.auxiliary:
            raise NotApplicable(
                f"{name}: {count} labelled public samples, and at least {needs.auxiliary} are needed; raise setting "
                "'data.auxiliary_size'"
            )
        details: dict[str, object] = {"model": self.model, "population": count if needs.auxiliary else 0}
        details |= {"references": 0} | (
            self._check_references(knowledge, needs.references) if needs.references else {}
        )
        public = rows_of(rounds, asked, "public") if needs.auxiliary else {}
        read = list(logits) if self.model == "rounds" else [max(logits)]
        told = []
        for number in read:
            nothing = logits[number].new_empty(0, logits[number].shape[1])
            seen, of_public = logits[number].double(), public.get(number, nothing).double()
            _check_finite(
                name, f"the {'client' if self.model == 'client' else 'global'} model", number, seen, of_public
            )
            told.append(self.signal(seen, knowledge, of_public))
        details |= {"rounds": read, "queries": len(read)}
        return MembershipScores(torch.stack(told).mean(0), name, details)

    def _check_references(self, knowledge: Knowledge, least: int) -> dict[str, object]:
        """Refuse too few; their numbers."""
        name, references = type(self).__name__, knowledge.references
        if references is None or len(references) < least:
            count = 0 if references is None else len(references)
            raise NotApplicable(
                f"{name}: {count} reference model{'' if count == 1 else 's'}, and at least {least} are needed; use "
                f"--references {least}"
            )
        if not (references.logits.isfinite().all() and references.public_logits.isfinite().all()):
            raise DataError(
                f"{name}: answers of reference models are not finite, their training has diverged"
            )
        inside = references.trained_on.sum(0)
        outside = len(references) - inside
        return {
            "references": len(references),
            "fewest_in": int(inside.min()),
            "fewest_out": int(outside.min()),
            "pooled": int(((inside < 2) | (outside < 2)).sum()),
        }


def _check_finite(name: str, whose: str, number: int, *answers: Tensor) -> None:
    if not all(bool(one.isfinite().all()) for one in answers):
        raise DataError(
            f"{name}: answers of {whose} after round {number} are not finite, its training has diverged; lower "
            "'training.learning_rate'"
        )


def log_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the label, minus the cross-entropy; logits (..., N, C), labels (N,) -> float64 (..., N)."""
    return of_label(logits.double().log_softmax(-1), labels)


def scaled_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """``log p_y - log(1 - p_y)``, close to normal over models; shapes of :func:`log_confidence`."""
    logits = logits.double()
    others = logits.scatter(-1, _index(logits, labels), -torch.inf)
    return of_label(logits, labels) - others.logsumexp(-1)


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """Each sample's entry at its label: (..., N, C) -> (..., N)."""
    return values.gather(-1, _index(values, labels))[..., 0]


def _index(values: Tensor, labels: Tensor) -> Tensor:
    return labels[:, None].expand(*values.shape[:-1], 1)


def centres(
    values: Tensor, trained_on: Tensor, median: bool = False, probability: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean or median over the references that trained on a candidate, and over the others: (R, N) -> two of (N,).

    Where one kind is missing, the other's stands in, moved by the mean difference of all candidates, on the scale
    of log-odds where values are probabilities. NotApplicable if no reference trained on any candidate, or all did.
    """
    inside, outside = middle(values, trained_on, median), middle(values, ~trained_on, median)
    on_scale, off_scale = (_log_odds(inside), _log_odds(outside)) if probability else (inside, outside)
    gap = on_scale.nanmean() - off_scale.nanmean()
    if gap.isnan():
        raise NotApplicable(
            "reference models of which none trained on a candidate, or all did, tell no difference; use mode "
            "'offline' where none did"
        )
    moved_in, moved_out = off_scale + gap, on_scale - gap
    if probability:
        moved_in, moved_out = moved_in.sigmoid(), moved_out.sigmoid()
    return moved_in.where(inside.isnan(), inside), moved_out.where(outside.isnan(), outside)


def _log_odds(probability: Tensor) -> Tensor:
    return probability.clamp(1e-6, 1 - 1e-6).logit()


def middle(values: Tensor, chosen: Tensor, median: bool = False) -> Tensor:
    """Mean or median of the chosen of each column, NaN where there are none: (R, N) -> (N,)."""
    among = values.where(chosen, torch.nan)
    return among.nanquantile(0.5, dim=0) if median else among.nanmean(0)


def outside_alone(
    values: Tensor, trained_on: Tensor, median: bool = False, probability: bool = False
) -> Tensor:
    """Mean or median over the references that did not train on a candidate: (R, N) -> (N,).

    Where all did, as :func:`centres` fills it.
    """
    if trained_on.any():
        return centres(values, trained_on, median, probability)[1]
    return middle(values, ~trained_on, median)


def variances(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Variance (divisor: count) of the chosen of each column, and that of all of them: (R, N) -> (N,), ().

    Columns with fewer than two chosen have the mean of the others', or where there are no others that of all.
    """
    everything = values[chosen].var(correction=0)
    own = middle((values - middle(values, chosen)).square(), chosen)
    enough = chosen.sum(0) >= 2
    instead = own[enough].mean() if enough.any() else everything
    return own.where(enough, instead), everything


def log_ratio_of_normals(x: Tensor, inside: tuple[Tensor, Tensor], outside: tuple[Tensor, Tensor]) -> Tensor:
    """``log N(x; inside) - log N(x; outside)``, each (mean, variance)."""
    (mean_in, var_in), (mean_out, var_out) = inside, outside
    var_in, var_out = var_in.clamp_min(1e-30), var_out.clamp_min(1e-30)
    apart = (x - mean_out).square() / var_out - (x - mean_in).square() / var_in
    return 0.5 * (apart + var_out.log() - var_in.log())


def known(knowledge: Knowledge) -> References:
    """The references, which needs say are there."""
    assert knowledge.references is not None, "needs say whether references are there"
    return knowledge.references
