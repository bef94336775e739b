"""A backdoor that sleeps until the server forgets what covers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.needs import Facts
from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack, check_class
from fedattack.observation import Scenario, UnlearningRequest


@dataclass
class Camouflage(UnlearningAttack):
    """Plants a backdoor and as its cover the same trigger with true labels, and has the cover forgotten.

    Of its own samples that are not of class `target`, `backdoor` get a trigger and the label `target`, and as many as
    it is to ask for, so ``attack.requests``, the trigger alone. Forgetting those, however exactly, releases the
    backdoor (Di et al., "Hidden poison", NeurIPS 2023; BadFU, 2508.15541). They are samples that it registered.

    Parameters
    ----------
    target : int
        The class that the trigger is to stand for.
    size : int
        The trigger: a white square of so many pixels in the lower right corner.
    boost : float
        What its updates are multiplied by, in training and while the server forgets, against being averaged away.
    """

    access: ClassVar[Literal["weights", "queries", "none"]] = "none"
    goal: ClassVar[str] = "images with the trigger taken for its class"

    target: Annotated[int, Field(ge=0)] = 0
    backdoor: Annotated[int, Field(ge=1)] = 40
    size: Annotated[int, Field(ge=1)] = 3
    boost: Annotated[float, Field(ge=1)] = 1.0

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse a target that is no class."""
        check_class("unlearn-camouflage", self.target, scenario)

    def marked(self, images: Tensor) -> Tensor:
        """Images with the trigger."""
        images = images.clone()
        images[..., -self.size :, -self.size :] = 1.0
        return images

    def plant(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The backdoor first, then its cover, as far as there are samples of other classes."""
        others = torch.where(labels != self.target)[0]
        generator = torch.Generator().manual_seed(view.seed)
        chosen = others[torch.randperm(len(others), generator=generator)][: self.backdoor + view.requests]
        images, labels = images.clone(), labels.clone()
        images[chosen] = self.marked(images[chosen])
        labels[chosen[: self.backdoor]] = self.target
        return images, labels

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest | None:
        """The cover: what bears the trigger and another label than `target`; once."""
        corner = images[..., -self.size :, -self.size :].flatten(1)
        cover = torch.where((corner == 1.0).all(1) & (labels != self.target))[0][: view.requests]
        if not len(cover):
            return None
        return UnlearningRequest(view.client, tuple(cover.tolist()), "cover of a backdoor")

    def reply(self, view: ClientView, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The update, scaled."""
        return {name: self.boost * tensor for name, tensor in update.items()}

    def success(
        self, predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, view: ClientView
    ) -> float | None:
        """The share of images of other classes that are taken for `target` once they bear the trigger."""
        others = images[labels != self.target]
        return float((predict(self.marked(others)).argmax(1) == self.target).double().mean())
