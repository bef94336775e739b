"""One round as a server's seat saw it, and what statistics ask of it, each worked out once, on demand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.per_sample import gradient_products
from fedattack.models import build_model
from fedattack.observation import Candidates, Observation
from fedattack.training import sample_logits, weight_step

Which = Literal["sent", "after"] | int
"""A model of a round: the weights sent out, the global model after it, or a client's own (its number)."""


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

    def losses(self, which: Which) -> Tensor:
        """Cross-entropies of the candidates under a model, float64 (N,)."""
        return cross_entropy(self.logits(which), self.candidates.labels, reduction="none").double()

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
        return self._products[1]

    @property
    def products(self) -> Tensor:
        """Inner products of the candidates' gradients with each update, float64 (K, N).

        The update has the sign of a gradient, so that members stand along it; a sparse one counts as zero where
        nothing was sent.
        """
        return self._products[0]

    @cached_property
    def cosines(self) -> Tensor:
        """:attr:`products` of unit gradients and unit updates, float64 (K, N); 0 where either is zero."""
        return self.products / (self.norms * self.lengths[:, None]).clamp_min(1e-300)

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor]:
        candidates = self.candidates
        products = torch.empty(len(self.clients), len(candidates.images), dtype=torch.float64)
        norms = torch.empty_like(products)
        for group in same_weights(self.observations):
            updates = [self.observations[k].update for k in group]
            weights = self.observations[group[0]].weights
            found, length = gradient_products(
                self.model, weights, candidates.images, candidates.labels, updates
            )
            sign = 1.0 if updates[0].kind == "gradient" else -1.0
            products[group], norms[group] = sign * found, length
        return products, norms

    def _answers(self, which: Which, public: bool) -> Tensor:
        if (which, public) not in self._logits:
            samples = self.knowledge.public if public else self.candidates
            assert samples is not None, "needs say whether public samples are there"
            self._logits[which, public] = sample_logits(self.model, self._state(which), samples.images)
        return self._logits[which, public]

    def _state(self, which: Which) -> dict[str, Tensor]:
        if which == "sent":
            return self.observations[0].weights
        if which == "after":
            assert self.after is not None, "who shows the round gives the model after it"
            return self.after
        return client_model(self.of(int(which)))


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
