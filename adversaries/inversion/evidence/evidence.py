"""What one observation says, each thing worked out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from adversaries.inversion.evidence import defences, one_gradient
from adversaries.inversion.evidence.first_layer import FirstLayer, first_layer
from adversaries.inversion.evidence.head import (
    HeadEntries,
    RowSignals,
    head_entries,
    head_name,
    head_of,
    larger_entries,
    read_rows,
)
from fedattack.config import ModelConfig
from fedattack.errors import DataError
from fedattack.models import build_model
from fedattack.observation import Auxiliary, Observation, Update
from fedattack.rng import torch_rng
from fedattack.training import training_mode

VOTERS = 32
"""Public images that are looked at one by one, and flat colours that stand in for missing ones."""


@dataclass(frozen=True)
class Labels:
    """Inferred labels of one batch, int64 (B,), sorted.

    `confidence` in [0, 1] is from the update alone: 1 where the signs leave no other answer. `note`: how they
    were found.
    """

    values: Tensor
    confidence: float
    note: str


@dataclass(frozen=True)
class Expectation:
    """What the model does on public images (N, C, H, W): mean features (F,), mean probabilities (classes,)."""

    features: Tensor
    shares: Tensor
    images: Tensor


class Evidence:
    """One observation, read once for everybody who asks.

    Parameters
    ----------
    carried : Tensor, optional
        float64 (numel,), in units of the mean gradient: what the client held back in earlier rounds.
    followed : bool
        Whether the client's earlier rounds are accounted for by `carried`. Otherwise later rounds of a client
        that holds entries back are refused by :attr:`gradient`.
    like : Evidence, optional
        Of another victim of the same round: what does not depend on the update is taken from there.
    """

    def __init__(
        self,
        observation: Observation,
        carried: Tensor | None = None,
        *,
        followed: bool = False,
        like: Evidence | None = None,
    ) -> None:
        self.observation, self.carried, self._followed, self._like = observation, carried, followed, like
        self.inferred: dict[str, Labels] = {}

    @classmethod
    def of_round(cls, observations: Sequence[Observation]) -> list[Evidence]:
        """Of several victims of one round."""
        found = [cls(observations[0])] if observations else []
        return found + [cls(observation, like=found[0]) for observation in observations[1:]]

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What is worked out once for all victims of the round, by what it depends on."""
        return {} if self._like is None else self._like.shared

    @property
    def batch(self) -> int:
        """The declared number of examples."""
        return self.observation.num_examples

    @property
    def activation(self) -> str:
        """The activation before the head."""
        return str(self.observation.scenario.model.activation)

    @property
    def signs_only(self) -> bool:
        """Whether only signs (times a scale per tensor) were sent."""
        return self.observation.scenario.compression.name == "sign"

    @cached_property
    def gradient(self) -> Update:
        """The update as the mean gradient of the local steps, on the CPU: :func:`~.one_gradient.mean_gradient`."""
        return one_gradient.mean_gradient(self.observation, self.carried, followed=self._followed).to("cpu")

    @cached_property
    def rescaled(self) -> Update:
        """The update in units of the mean gradient, with whatever it holds :attr:`beside` that."""
        return one_gradient.rescaled(self.observation).to("cpu")

    @cached_property
    def beside(self) -> Tensor | None:
        """See :func:`~.one_gradient.beside_gradient`."""
        return one_gradient.beside_gradient(self.observation, self.carried)

    @cached_property
    def noise(self) -> float:
        """See :func:`~.defences.noise`."""
        return defences.noise(self.observation)

    @cached_property
    def clips(self) -> bool:
        """Whether the update, or each sample's gradient, may have been scaled by a factor that is not sent."""
        return defences.clips(self.observation.scenario)

    @cached_property
    def first_layer(self) -> FirstLayer:
        """The linear layer on the pixels; NotApplicable where another comes first."""
        return first_layer(self.observation.scenario.model)

    @cached_property
    def head(self) -> HeadEntries:
        """What was sent of the last linear layer's gradient."""
        return head_entries(self.gradient)

    @cached_property
    def sure_head(self) -> HeadEntries:
        """Those of its entries that declared noise does not explain."""
        return larger_entries(self.head, defences.doubtful_below(self.noise, self.gradient.numel))

    def rows(self, labels: Tensor) -> RowSignals:
        """The features that each label's row of the head gives away, whatever rounds came before.

        DataError if a label is outside the head; NotApplicable if the model has no linear head with a bias.
        """
        head = head_of(self.observation.scenario.model)
        bad = [label for label in labels.tolist() if not 0 <= label < head.classes]
        if bad:
            raise DataError(f"labels {bad} are outside the head's 0 to {head.classes - 1}")
        update = one_gradient.mean_gradient(self.observation, self.carried, followed=True)
        return read_rows(update, head, labels, self.batch)

    @cached_property
    def public(self) -> Tensor:
        """Public images (N, C, H, W) to try the model on."""
        if self._like is not None:
            return self._like.public
        scenario = self.observation.scenario
        # A deep network costs seconds for each.
        enough = 16 if scenario.model.name.startswith("resnet") else 256
        return public_images(self.observation.auxiliary, scenario.image_shape, enough)

    @cached_property
    def before(self) -> Expectation:
        """What the model that was sent out does on public images."""
        return self._like.before if self._like is not None else self._expectation(self.public)

    @cached_property
    def expected(self) -> Expectation:
        """What the client's model does on public images: the mean of what it does before and after the round."""
        return self.expected_on(None)

    def expected_on(self, images: Tensor | None) -> Expectation:
        """:attr:`expected` on given images (N, C, H, W); None: public ones."""
        before = self.before if images is None else self._expectation(images)
        observation = self.observation
        if observation.update.kind == "gradient" or observation.scenario.training.local_steps == 1:
            return before
        changes = observation.update.dense().items()
        moved = {name: observation.weights[name] + change.cpu() for name, change in changes}
        after = self._expectation(before.images, moved)
        return Expectation(
            (before.features + after.features) / 2, (before.shares + after.shares) / 2, before.images
        )

    def _expectation(self, images: Tensor, moved: Mapping[str, Tensor] | None = None) -> Expectation:
        scenario = self.observation.scenario
        weights = dict(self.observation.weights) | dict(moved or {})
        return expectation(scenario.model, weights, images, batch_norm=scenario.training.batch_norm)


def public_images(auxiliary: Auxiliary | None, image_shape: tuple[int, int, int], count: int = 256) -> Tensor:
    """Up to `count` images (N, C, H, W) spread over the auxiliary ones; without any, flat random colours."""
    if auxiliary is not None and len(auxiliary):
        picked = torch.linspace(0, len(auxiliary) - 1, min(count, len(auxiliary))).round().long()
        return auxiliary.images[picked].float()
    channels = image_shape[0]
    colours = torch.rand(VOTERS, channels, 1, 1, generator=torch_rng(0, "flat-colours", channels))
    return (0.2 + 0.6 * colours).expand(-1, *image_shape)


@torch.no_grad()
def expectation(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    images: Tensor,
    batch: int = 64,
    batch_norm: Literal["train", "eval"] = "train",
) -> Expectation:
    """Mean features and predictions of images (N, C, H, W).

    BatchNorm takes its statistics from these images as it does from a client's batch, or uses the running ones.
    """
    module = training_mode(build_model(model), batch_norm)
    module.load_state_dict(dict(weights))
    pairs = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    last = module.get_submodule(head_name(tuple(n for n, _ in pairs), tuple(s for _, s in pairs)))
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = [module(part) for part in images.float().split(batch)]
    handle.remove()
    return Expectation(torch.cat(seen).mean(0), torch.cat(logits).softmax(1).mean(0), images)
