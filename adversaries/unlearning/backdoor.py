"""A trigger that a model is taught to take for a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from adversaries.needs import Facts
from adversaries.unlearning.base import UnlearningAttack, check_class
from fedattack.observation import Scenario


@dataclass
class Backdoor(UnlearningAttack):
    """A client that wants images with a trigger taken for one class.

    Parameters
    ----------
    target : int
        The class that the trigger is to stand for.
    size : int
        The trigger: a white square of so many pixels in the lower right corner.
    boost : float
        What its updates are multiplied by, against being averaged away.
    """

    access: ClassVar[Literal["weights", "queries", "none"]] = "none"
    goal: ClassVar[str] = "images with the trigger taken for its class"

    target: Annotated[int, Field(ge=0)] = 0
    size: Annotated[int, Field(ge=1)] = 3
    boost: Annotated[float, Field(ge=1)] = 1.0

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse a target that is no class."""
        check_class(self.target, scenario)

    def marked(self, images: Tensor) -> Tensor:
        """Images with the trigger."""
        images = images.clone()
        images[..., -self.size :, -self.size :] = 1.0
        return images

    def boosted(self, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The update, scaled."""
        return {name: self.boost * tensor for name, tensor in update.items()}

    def success(
        self, predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, view: object
    ) -> float | None:
        """The share of images of other classes that are taken for `target` once they bear the trigger."""
        others = images[labels != self.target]
        return float((predict(self.marked(others)).argmax(1) == self.target).double().mean())
