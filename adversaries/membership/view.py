"""One round as a server's seat saw it, and what statistics ask of it, each worked out once, on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.per_sample import HELD, Gradients, gram, products
from adversaries.membership.synthetic.release import Release, Releases
from fedattack.errors import NotApplicable
from fedattack.models import build_model
from fedattack.observation import Candidates, Observation
from fedattack.training import sample_logits, sample_losses, weight_step

Which = Literal["sent", "after"] | int
"""A model of a round: the weights sent out, the global model after it, or a client's own (its number)."""


MOST_PUBLIC = 1000
"""Public samples in a round's equations, whose cost grows with the cube of all samples."""


@dataclass(frozen=True)
class System:
    """Inner products among the gradients of n samples, and with the updates of some clients; float64.

    Samples are the candidates, then public ones, at most :data:`MOST_PUBLIC`. Gradients are divided by their whole
    norms, updates by theirs. Of a sparse update `gram` is over the entries that were sent, so that its diagonal is at
    most 1.

    Parameters
    ----------
    rows : list of int
        Places of the clients among :attr:`RoundView.clients`.
    gram, products : Tensor
        (n, n) and (rows, n).
    """

    rows: list[int]
    gram: Tensor
    products: Tensor
    sparse: bool

    def damped(self, damping: float | None) -> Tensor:
        """`gram` with `damping` added to its diagonal, times the diagonal's median where the update is sparse.

        None: 0.01, and 0.03 where it is sparse; rules that were fixed once, not by what is a member.
        """
        value, scale = damping or (0.03 if self.sparse else 0.01), 1.0
        if self.sparse:  # behind few entries most gradients can be zero
            diagonal = self.gram.diagonal()
            scale = float(diagonal.quantile(0.5)) or float(diagonal.mean()) or 1.0
        return self.gram + value * scale * torch.eye(len(self.gram), dtype=torch.float64)


class RoundView:
    """One round, shared by all statistics of a run; what is asked is kept, updates are let go with the view.

    Rows stand for clients, in the order of :attr:`clients`; N candidates, P public samples. Gradients are of the
    cross-entropy at the weights that the client was sent, in eval mode: BatchNorm has no per-sample gradient on
    batch statistics, so that candidates are seen at the statistics that were sent.

    Parameters
    ----------
    observations : sequence of Observation
        All that was seen in the round, ascending by client; of several of one client the last counts.
    after : dict of str to Tensor, optional
        The global model after the round; None: not known.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        knowledge: Knowledge,
        device: torch.device,
        after: dict[str, Tensor] | None = None,
    ) -> None:
        self.observations = list({one.client: one for one in observations}.values())
        self.knowledge, self.device, self.after = knowledge, device, after
        self._logits: dict[tuple[Which, bool], Tensor] = {}
        self._per_sample: dict[tuple[int, bool], Gradients] = {}
        self._found: dict[bool, tuple[Tensor, Tensor]] = {}
        self._grams: dict[int, Tensor] = {}
        self._releases: dict[int, Releases] = {}

    @property
    def round(self) -> int:
        """Its number."""
        return self.observations[0].round

    @cached_property
    def clients(self) -> list[int]:
        """Who answered, K numbers."""
        return [observation.client for observation in self.observations]

    @property
    def candidates(self) -> Candidates:
        """The samples asked about."""
        return self.knowledge.candidates

    @property
    def public(self) -> Candidates:
        """The labelled public samples; NotApplicable where none were granted."""
        if self.knowledge.public is None:
            raise NotApplicable("no labelled public samples are granted; raise setting 'data.auxiliary_size'")
        return self.knowledge.public

    @cached_property
    def model(self) -> nn.Module:
        """The architecture, in eval mode on :attr:`device`; its weights are scratch."""
        return build_model(self.observations[0].scenario.model).to(self.device).eval()

    def of(self, client: int) -> Observation:
        """What was seen of one of :attr:`clients`."""
        return self.observations[self.clients.index(client)]

    def logits(self, which: Which) -> Tensor:
        """Answers of a model to the candidates, float32 (N, classes)."""
        return self._answers(which, public=False)

    def public_logits(self, which: Which) -> Tensor:
        """Answers of a model to the public samples, float32 (P, classes)."""
        return self._answers(which, public=True)

    def critic(self, which: Which) -> Tensor:
        """Scores of a model's critic for the candidates, with mean 0 and deviation 1 over them, float64 (N,)."""
        scores = self.logits(which)[:, 0].double()
        return (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-12)

    def losses(self, which: Which) -> Tensor:
        """Cross-entropies of the candidates under a model, float64 (N,)."""
        return cross_entropy(self.logits(which), self.candidates.labels, reduction="none").double()

    @cached_property
    def sent_losses(self) -> Tensor:
        """Cross-entropies of the candidates at what each client was sent, float64 (K, N)."""
        found = torch.empty(len(self.clients), len(self.candidates.labels), dtype=torch.float64)
        for group in self._groups:
            weights = self.observations[group[0]].weights
            found[group] = sample_losses(self.model, weights, self.candidates.images, self.candidates.labels)
        return found

    @cached_property
    def client_losses(self) -> Tensor:
        """Cross-entropies of the candidates under each client's own model, float64 (K, N)."""
        return torch.stack([self.losses(client) for client in self.clients])

    @cached_property
    def lengths(self) -> Tensor:
        """Norm of what each client sent, float64 (K,)."""
        return torch.stack([one.update.values.double().norm().cpu() for one in self.observations])

    @property
    def norms(self) -> Tensor:
        """Norm of each candidate's whole gradient at what each client was sent, float64 (K, N)."""
        return self._products(public=False)[1]

    @property
    def products(self) -> Tensor:
        """Inner products of the candidates' gradients with each update, float64 (K, N).

        The update has the sign of a gradient, so that members stand along it; a sparse one counts as zero where
        nothing was sent. PayloadError if one is not over the model's parameters.
        """
        return self._products(public=False)[0]

    @cached_property
    def cosines(self) -> Tensor:
        """:attr:`products` of unit gradients and unit updates, float64 (K, N); 0 where either is zero."""
        return self.products / (self.norms * self.lengths[:, None]).clamp_min(1e-300)

    def release(self, count: int, calibrated: bool, seed: int) -> Release:
        """`count` images of the generator after the round, and what is known besides; see :mod:`.synthetic.release`.

        With `calibrated`, also those of a generator that the adversary trains on its public images, as many rounds.
        """
        if seed not in self._releases:
            first, public = self.observations[0], self.knowledge.public
            assert self.after is not None, "who shows the round gives the model after it"
            images = None if public is None else public.images
            self._releases[seed] = Releases(first.scenario, self.after, images, self.round, seed, self.device)
        return self._releases[seed].of(count, calibrated)

    def equations(self, client: int) -> tuple[Tensor, Tensor]:
        """Of the client's :class:`System`, `gram` (n, n) and its row of `products` (n,), float64."""
        k = self.clients.index(client)
        rows = next(rows for rows in self._systems if k in rows)
        return self._gram(rows), self._unit_products[k]

    def systems(self) -> Iterator[System]:
        """The equations of all clients, those together that share the matrix."""
        for rows in self._systems:
            sparse = self.observations[rows[0]].update.indices is not None
            yield System(rows, self._gram(rows), self._unit_products[rows], sparse)

    @cached_property
    def _systems(self) -> list[list[int]]:
        """Rows that share a matrix."""
        found = []
        for group in self._groups:
            whole = [k for k in group if self.observations[k].update.indices is None]
            found += [whole] * bool(whole) + [[k] for k in group if k not in whole]
        return found

    @property
    def _sets(self) -> list[bool]:
        """Of which samples equations are: the candidates (False) and, where there are any, public ones (True)."""
        return [False] if self.knowledge.public is None else [False, True]

    @cached_property
    def _some_public(self) -> Candidates:
        """The public samples of equations, spread over all of them where there are more than :data:`MOST_PUBLIC`."""
        if len(self.public.labels) <= MOST_PUBLIC:
            return self.public
        places = torch.linspace(0, len(self.public.labels) - 1, MOST_PUBLIC).long()
        return Candidates(self.public.images[places], self.public.labels[places])

    @cached_property
    def _unit_products(self) -> Tensor:
        """Inner products of all samples' unit gradients with unit updates, float64 (K, n)."""
        found = [self._products(public) for public in self._sets]
        dots, norms = (torch.cat([each[i] for each in found], 1) for i in (0, 1))
        return dots / (norms * self.lengths[:, None]).clamp_min(1e-300)

    def _gram(self, rows: list[int]) -> Tensor:
        k = rows[0]
        if k not in self._grams:
            sets = [self._gradients(self._group_of(k), public) for public in self._sets]
            lengths = torch.cat([self._products(public)[1][k] for public in self._sets]).clamp_min(1e-300)
            found = gram(sets, self.observations[k].update) / lengths[:, None] / lengths
            if len(self._systems) * found.numel() > HELD:
                return found
            self._grams[k] = found
        return self._grams[k]

    @cached_property
    def _groups(self) -> list[list[int]]:
        return same_weights(self.observations)

    def _group_of(self, k: int) -> int:
        return next(i for i, group in enumerate(self._groups) if k in group)

    def _gradients(self, group: int, public: bool) -> Gradients:
        """Those of the candidates or of the public samples, at the weights that a group of clients was sent."""
        if (group, public) not in self._per_sample:
            # Of one group at a time, which is all of them unless the server sent clients different weights.
            self._per_sample = {key: kept for key, kept in self._per_sample.items() if key[0] == group}
            weights = self.observations[self._groups[group][0]].weights
            samples = self._some_public if public else self.candidates
            self._per_sample[group, public] = Gradients(self.model, weights, samples)
        return self._per_sample[group, public]

    def _products(self, public: bool) -> tuple[Tensor, Tensor]:
        """Inner products with each update, which has the sign of a gradient, and norms, float64 (K, samples)."""
        if public not in self._found:
            count = len((self._some_public if public else self.candidates).labels)
            dots = torch.empty(len(self.clients), count, dtype=torch.float64)
            norms = torch.empty_like(dots)
            for place, group in enumerate(self._groups):
                updates = [self.observations[k].update for k in group]
                signs = torch.tensor([1.0 if update.kind == "gradient" else -1.0 for update in updates])
                found, length = products(self._gradients(place, public), updates)
                dots[group], norms[group] = signs.double()[:, None] * found, length
            self._found[public] = dots, norms
        return self._found[public]

    def _answers(self, which: Which, public: bool) -> Tensor:
        if (which, public) not in self._logits:
            images = (self.public if public else self.candidates).images
            self._logits[which, public] = sample_logits(self.model, self._state(which), images)
        return self._logits[which, public]

    def _state(self, which: Which) -> dict[str, Tensor]:
        if which == "sent":
            return self.observations[0].weights
        if which == "after":
            assert self.after is not None, "who shows the round gives the model after it"
            return self.after
        observation = self.of(int(which))
        statistics = {name for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        if missing := sorted(statistics - observation.buffers.keys()):
            raise NotApplicable(
                f"the model that client {observation.client} trained is asked for, and its BatchNorm statistics "
                f"({missing[0]!r}, ...) were not sent; use a model without BatchNorm, or a statistic of gradients"
            )
        return client_model(observation)


def client_model(observation: Observation) -> dict[str, Tensor]:
    """The client's own model after the round, as far as the server can tell: name -> tensor.

    Entries that were not sent stay as they were sent out; BatchNorm statistics are the client's where it sent them.
    """
    step = weight_step(observation.scenario.training, observation.update.kind)
    moved = {
        name: observation.weights[name] + step * change.to(observation.weights[name].device)
        for name, change in observation.update.dense().items()
    }
    return {**observation.weights, **observation.buffers, **moved}


def same_weights(answers: Sequence[Observation]) -> list[list[int]]:
    """Positions grouped by the weights sent out: one group unless the server sent clients different ones."""
    groups: list[list[int]] = []
    for k, observation in enumerate(answers):
        for group in groups:
            first = answers[group[0]].weights
            if first is observation.weights or all(
                torch.equal(first[name], tensor) for name, tensor in observation.weights.items()
            ):
                group.append(k)
                break
        else:
            groups.append([k])
    return groups
