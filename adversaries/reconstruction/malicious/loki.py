"""LOKI: kernels of each client's own in front of the bins, so that a sum over clients is read client by client."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adversaries.base import Progress
from adversaries.inversion.solvers.peeling import Sample
from adversaries.needs import Block, Needs
from adversaries.reconstruction.base import armable, failed
from adversaries.reconstruction.malicious.base import ReplayedClient, answer
from adversaries.reconstruction.malicious.bins import BinReading, alone_share
from fedattack.errors import NotApplicable
from fedattack.models.armable.loki import KernelSets, identities
from fedattack.observation import Auxiliary, Candidates, Observation, Reconstruction, Scenario, Update

_BLOCK = ("kernels.weight", "kernels.bias")
_PLAIN = "imprint-sparse"
"""The model that a client's part of the update is read as."""


@dataclass
class Loki(BinReading):
    """LOKI: a malicious server that sees nothing but sums over clients reads each client's images out of them.

    The model begins with S sets of convolution kernels, and the wide layer of bins has columns for each set. Every
    client is sent one set that passes its images on; all others are zero for it, and so is then its gradient at
    their columns. In the sum over all clients, what secure aggregation lets through, a set's columns hold the
    images of its own client alone, and bins are as many for each client as for one (Zhao et al. 2024).

    The bias' gradient, which tells an image from its multiples, is one sum over all clients. The paper does without
    it. Here the kernels have a bias of one and a ring of padding that holds nothing else, whose columns are the
    bias' gradient of the set's own client: images come out exact and with labels, as by
    :class:`~adversaries.reconstruction.malicious.imprint.Imprint`, whose bins and whose peeling these are.

    Clients beyond the number of sets share theirs, as one client with a larger batch would. Where clients are seen
    one by one, the attack is imprint's. Parameters are those of imprint; `scale` has no effect.

    References
    ----------
    Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr, Bagchi, "LOKI: Large-scale Data Reconstruction Attack against
    Federated Learning through Model Manipulation", IEEE S&P 2024.
    """

    name: ClassVar[str] = "loki"
    needs: ClassVar[Needs] = dataclasses.replace(
        BinReading.needs,
        block=Block(KernelSets, "sets of kernels that keep clients apart", "loki"),
        first_layer=False,
        entries="all",
        values="exact",
        undecayed="delta",
    )

    def arm(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        seed: int,
        auxiliary: Auxiliary | None,
        candidates: Candidates | None = None,
        turn: int = 0,
    ) -> dict[str, Tensor]:
        """The global model with imprint's bins over every set's columns, and all kernels passing the image on."""
        module = armable(scenario, KernelSets)
        plain = super().arm(_plain_scenario(scenario), _plain_weights(module, weights, 0), seed, auxiliary)
        wide = torch.zeros_like(weights["measure.weight"])
        rows = plain["measure.weight"].reshape(-1, 1, *scenario.image_shape)
        module.columns(wide)[..., 1:-1, 1:-1] = rows  # a view
        sent = dict(weights) | {"measure.weight": wide, "back.weight": plain["back.weight"]}
        sent["measure.bias"] = (plain["measure.bias"].double() - rows.double().sum((1, 2, 3, 4))).float()
        sent["kernels.weight"], sent["kernels.bias"] = identities(module)
        return sent

    def tailor(
        self, scenario: Scenario, weights: dict[str, Tensor], place: int, earlier: Sequence[Observation] = ()
    ) -> dict[str, Tensor]:
        """The kernels, zero but for the client's own set."""
        module = armable(scenario, KernelSets)
        own = (torch.arange(module.sets) == place % module.sets).repeat_interleave(module.kernels.in_channels)
        return {
            name: torch.where(own.reshape(-1, *[1] * (weights[name].ndim - 1)), weights[name], 0.0)
            for name in _BLOCK
        }

    def one(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """Read one client's rows after the other's."""
        self.check(observation.scenario)
        found: list[Sample] = []
        counts: dict[int, int] = {}
        seen = left = 0.0
        figures: dict[str, Any] = {}
        try:
            for number, part in _parts(observation):
                client = ReplayedClient(part, device)
                samples, rows, rest = self._read(client, progress, len(found))
                seen += float(rows.vectors.square().sum())
                left += float(rest.vectors.square().sum())
                figures = {"bins": len(client.bias), "functionals": self.functionals}
                counts[number] = len(samples)
                found += samples
        except NotApplicable as reason:
            return failed(self.name, observation, str(reason))
        if not counts:
            return failed(self.name, observation, "no client moved the bins: the update is zero there")
        each = -(-observation.num_examples // len(counts))
        figures |= {"sets": counts, "birthday_bound": alone_share(1 / figures["bins"], each)}
        unread = (left / max(seen, 1e-300)) ** 0.5
        return answer(self.name, observation, client.vague, found, unread, **figures)


def _plain_scenario(scenario: Scenario) -> Scenario:
    model = scenario.model.model_copy(update={"name": _PLAIN, "kernel_sets": None})
    return dataclasses.replace(scenario, model=model)


def _plain_weights(module: KernelSets, weights: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """The model that a client sees whose images pass through one set of kernels, each plus one."""
    columns = module.columns(weights["measure.weight"])[:, number]
    plain = {name: tensor for name, tensor in weights.items() if name not in _BLOCK}
    plain["measure.weight"] = columns[..., 1:-1, 1:-1].flatten(1).contiguous()
    plain["measure.bias"] = (weights["measure.bias"].double() + columns.double().sum((1, 2, 3))).float()
    return plain


def _parts(observation: Observation) -> Iterator[tuple[int, Observation]]:
    """For each set of kernels that was used, what its clients would have sent of the model without kernels."""
    module = armable(observation.scenario, KernelSets)
    sent = observation.update.dense()
    columns = module.columns(sent["measure.weight"].double())
    inside = torch.zeros(columns.shape[-2:], dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    ones = columns[..., ~inside].mean((2, 3))  # (width, S): the ring shows nothing but the kernels' bias
    images = columns[..., inside].flatten(2) - ones[..., None]
    weight, bias = identities(module)
    for number in range(module.sets):
        own = slice(number * module.kernels.in_channels, (number + 1) * module.kernels.in_channels)
        kernels = [observation.weights[name][own] for name in _BLOCK]
        if not any(bool(tensor.any()) for tensor in kernels):
            continue
        if not (torch.equal(kernels[0], weight[own]) and torch.equal(kernels[1], bias[own])):
            raise NotApplicable(
                "the kernels that were sent do not pass images on (an honest server's): let the server send the "
                "attack's weights (attack.names with 'loki' arms the rounds in attack.rounds)"
            )
        if not bool(columns[:, number].any()):
            continue
        tensors = {name: tensor for name, tensor in sent.items() if name not in _BLOCK}
        tensors |= {"measure.weight": images[:, number], "measure.bias": ones[:, number]}
        update = Update(
            tuple(tensors),
            tuple(tuple(tensor.shape) for tensor in tensors.values()),
            None,
            torch.cat([tensor.flatten().double() for tensor in tensors.values()]),
            observation.update.kind,
        )
        yield (
            number,
            dataclasses.replace(
                observation,
                scenario=_plain_scenario(observation.scenario),
                weights=_plain_weights(module, observation.weights, number),
                update=update,
            ),
        )
