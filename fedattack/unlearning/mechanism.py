"""What a mechanism is given, what it answers, and its base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedattack.unlearning.requests import Deletion

Weights = dict[str, Tensor]
"""A state dict: name -> tensor, parameters and buffers."""

RetrainFunction = Callable[[Mapping[int, frozenset[int]], Weights, int], Weights]
"""``retrain(excluded, weights, first_round)``: train the federation again from `weights`.

`excluded` maps a client to the positions of its partition that no round may touch; `first_round` is the first
round to run, 1-based; the last is the same as in the first training. Returns the final global weights.
"""


@dataclass(frozen=True)
class ServerMemory:
    """What the server kept of the training that it is asked to change.

    Parameters
    ----------
    weights : dict of str to Tensor
        The current global model.
    rounds : int
        Rounds trained so far.
    checkpoints : mapping of int to dict
        Round -> global model after that round; 0 is the initial model.
    first_rounds : mapping of int to int
        Client -> first round whose aggregate its update went into (1-based). Clients that never took part are
        absent.
    excluded : mapping of int to frozenset of int
        Positions that earlier requests had removed; they stay removed.
    """

    weights: Weights
    rounds: int
    checkpoints: Mapping[int, Weights]
    first_rounds: Mapping[int, int]
    excluded: Mapping[int, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Forgotten:
    """What a mechanism answers.

    Parameters
    ----------
    weights : dict of str to Tensor
        The global model after forgetting.
    excluded : mapping of int to frozenset of int
        All positions removed so far, this time's included.
    resumed_after : int
        The last round that was kept as it was. Checkpoints of later rounds still know the samples: drop them.
    rounds_trained : int
        Federation rounds that the answer cost.
    """

    weights: Weights
    excluded: Mapping[int, frozenset[int]]
    resumed_after: int
    rounds_trained: int


class Mechanism(ABC):
    """Base of every mechanism: turns accepted deletions into a model that no longer knows the samples."""

    @abstractmethod
    def forget(
        self, deletions: Sequence[Deletion], memory: ServerMemory, retrain: RetrainFunction
    ) -> Forgotten:
        """Forget the samples of `deletions`.

        Parameters
        ----------
        deletions : sequence of Deletion
            Accepted by :func:`fedattack.unlearning.validate_request`.
        memory : ServerMemory
            What the server kept.
        retrain : callable
            See :data:`RetrainFunction`.
        """


def merged(
    excluded: Mapping[int, frozenset[int]], deletions: Sequence[Deletion]
) -> dict[int, frozenset[int]]:
    """Earlier exclusions and new deletions in one mapping, client -> positions."""
    union = dict(excluded)
    for deletion in deletions:
        union[deletion.client] = union.get(deletion.client, frozenset()) | deletion.positions
    return union
