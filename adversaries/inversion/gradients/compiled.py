"""The explicit passes compiled, where a run is long enough to earn back the compiler's time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from adversaries.inversion.gradients.sent import DirectGradients

LOG = logging.getLogger("fedattack.attacks")

Compile = Literal["auto", "always", "never"]

LONG = 20_000
"""Iterations from which on "auto" compiles.

A first compilation takes half a minute to a minute and a half, later ones of the same network a few seconds (the
compiler keeps what it made). An iteration is about twice as fast then on a LeNet, and 1.5 times on a ResNet-20 with
one victim, which saves 0.8 and 7 ms; networks whose convolutions take all the time gain next to nothing.
"""


class CompiledSlope:
    """The explicit passes, compiled when they are first called; as they are, with a logged reason, where that fails.

    Its `outcome` is "compiled", "not yet", or why not.
    """

    def __init__(self, plain: DirectGradients) -> None:
        self.outcome = "not yet"
        self._slope = plain.slope

    def slope(
        self, images: Tensor, victims: slice, distance: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        if self.outcome == "not yet":
            compiled = torch.compile(self._slope, fullgraph=True, dynamic=False)
            try:
                found = compiled(images, victims, distance)
            except Exception as error:  # compilers fail in as many ways as there are compilers
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                self.outcome = f"not compiled: {type(error).__name__}: {reason}"
                LOG.warning("gradients as they are, %s", self.outcome)
            else:
                self._slope, self.outcome = compiled, "compiled"
                return found
        return self._slope(images, victims, distance)
