"""Forgetting by moving a draw of the posterior to where the posterior without the samples is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from fedattack.errors import RunFailed
from fedattack.unlearning.central import Central
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.mechanism import Excluded, Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion

Count = Annotated[int, Field(ge=1)]


@dataclass
class Mcmc(Mechanism):
    """MCMC unlearning (Fu et al., Knowledge removal in sampling-based Bayesian inference, ICLR 2022, algorithm 2).

    What is released is a draw of ``exp(-sum of losses - n weight_decay |w|^2 / 2)`` by Langevin dynamics from the
    trained weights. It forgets by moving by ``H^-1 E[gradient of the forgotten's energy]``, H the mean Hessian of the
    energy of what is left, both averaged over `samples` further states of the chain; the inverse by a Neumann series.

    Parameters
    ----------
    burn_in, samples : int
        Steps of the chain before the release, and states that forgetting averages over, 1 or more.
    batch : int
        Samples of a chain's step; 0: all.
    step, scale : float
        Langevin step and the series' factor, over the number of samples; above 0.
    terms : int
        Of the series, 1 or more.
    damping : float
        Added to H per sample, 0 or more, where the energy is not convex.
    """

    runs = "central"
    burn_in: Count = 100
    samples: Count = 5
    batch: Annotated[int, Field(ge=0)] = 64
    step: Annotated[float, Field(gt=0)] = 0.01
    scale: Annotated[float, Field(gt=0)] = 0.05
    terms: Count = 64
    damping: Annotated[float, Field(ge=0)] = 0.01

    def prepare(self, excluded: Excluded, history: History, trainer: Trainer) -> Weights:
        """The chain's state after its burn-in."""
        central = trainer.central()
        gone = frozenset().union(*excluded.values())
        with trainer.cost.clocked():
            flat = central.flat(history.weights)
            for state in self._chain(central, flat, history.weights, gone, central.rng("mcmc", len(gone), 0)):
                flat = state
        return central.weights(flat, history.weights)

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`; `details`: the length of the "step". RunFailed where the series diverges."""
        excluded = merged(history.excluded, deletions)
        start = history.ignorant(excluded)
        if start is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        central, base = trainer.central(), history.weights
        earlier = frozenset().union(*history.excluded.values())
        now = frozenset().union(*excluded.values())
        kept, forgotten = central.retained(now), np.array(sorted(now - earlier), dtype=np.int64)
        ridge = len(kept) * (central.scenario.training.weight_decay + self.damping)
        with trainer.cost.clocked():
            flat = central.flat(base)
            chain = self._chain(central, flat, base, earlier, central.rng("mcmc", len(earlier), 1))
            states = [state for _, state in zip(range(self.samples), chain, strict=False)]
            decay = len(forgotten) * central.scenario.training.weight_decay
            pulls = [central.gradient(state, base, forgotten) + decay * state for state in states]
            pull = torch.stack(pulls).mean(0)

            def curved(vector: Tensor) -> Tensor:
                products = [central.product(state, base, vector, kept) for state in states]
                return torch.stack(products).mean(0) + ridge * vector

            moved = inverse_product(curved, pull, self.scale / max(1, len(kept)), self.terms)
        after = central.weights(flat + moved, base)
        return Forgotten(after, excluded, start, details={"step": float(moved.norm())})

    def _chain(
        self, central: Central, flat: Tensor, base: Weights, gone: frozenset[int], draws: Generator
    ) -> Iterator[Tensor]:
        """The chain's states, as many as the burn-in."""
        kept = central.retained(gone)
        decay, count = central.scenario.training.weight_decay * len(kept), len(kept)

        def energy_slope(state: Tensor) -> Tensor:
            some = kept
            if 0 < self.batch < count:
                some = kept[torch.randperm(count, generator=draws)[: self.batch].numpy()]
            return central.gradient(state, base, some) * (count / max(1, len(some))) + decay * state

        return langevin(flat, energy_slope, self.step / max(1, count), self.burn_in, draws)


def langevin(
    state: Tensor, slope: Callable[[Tensor], Tensor], step: float, steps: int, draws: Generator
) -> Iterator[Tensor]:
    """States of unadjusted Langevin dynamics on an energy, given its gradient (Welling and Teh, ICML 2011)."""
    for _ in range(steps):
        noise = torch.randn(state.shape, generator=draws, dtype=state.dtype)
        state = state - step / 2 * slope(state) + step**0.5 * noise
        yield state


def inverse_product(curved: Callable[[Tensor], Tensor], vector: Tensor, scale: float, terms: int) -> Tensor:
    """``H^-1 vector`` by the Neumann series of ``scale H``; RunFailed where it diverges.

    That is where an eigenvalue of H lies outside [0, 2 / scale].
    """
    total, start = vector.clone(), float(vector.norm())
    for _ in range(terms):
        total = vector + total - scale * curved(total)
    if not bool(total.isfinite().all()) or float(total.norm()) > 10 * (terms + 1) * start:
        raise RunFailed(
            "mcmc: the Neumann series diverges; lower 'unlearning.mcmc.scale' or raise its 'damping'"
        )
    return scale * total
