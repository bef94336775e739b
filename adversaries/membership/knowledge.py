"""What the seat of a membership attack knows beside what it sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedattack.observation import Auxiliary, Candidates


@dataclass(frozen=True)
class References:
    """Answers of reference models, each trained by the adversary on a random half of candidates and public samples.

    `logits` float32 (R, N, classes) and `trained_on` bool (R, N) on the candidates; `public_logits` (R, P, classes)
    and `public_trained_on` (R, P) on the public samples.
    """

    logits: Tensor
    trained_on: Tensor
    public_logits: Tensor
    public_trained_on: Tensor

    def __len__(self) -> int:
        return len(self.logits)


@dataclass(frozen=True)
class Knowledge:
    """The samples asked about, the labelled public samples that were granted (None: none), and reference models."""

    candidates: Candidates
    public: Candidates | None = None
    references: References | None = None

    @classmethod
    def of(
        cls, candidates: Candidates, auxiliary: Auxiliary | None, references: References | None = None
    ) -> Knowledge:
        """With the public samples of `auxiliary`, where these have labels."""
        public = None
        if auxiliary is not None and auxiliary.labels is not None and len(auxiliary):
            public = Candidates(auxiliary.images, auxiliary.labels, auxiliary.groups)
        return cls(candidates, public, references)
