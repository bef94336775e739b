"""Several local steps on one batch: the client's whole training, played again inside the span.

All samples lie in a span of B dimensions that the wide layer's change shows, and so does that change: the training
is played with B inputs instead of d, and fitted to what was sent by Gauss-Newton on the samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap

from adversaries.inversion.solvers.levenberg_marquardt import Damping, Step, levenberg_marquardt
from adversaries.reconstruction.tensor.head import TwoLayerHead
from fedattack.config import TrainingConfig

_CHUNK = 32
_MOST_UNKNOWNS = 1100


def replayable(training: TrainingConfig, samples: int) -> bool:
    """Whether every local step sees the whole batch, so that nothing of the client's order is unknown."""
    return (training.batch_size == 0 or training.batch_size >= samples) and training.weight_decay == 0


def play(
    head: TwoLayerHead, neurons: Tensor, samples: Tensor, labels: Tensor, training: TrainingConfig
) -> tuple[Tensor, Tensor]:
    """Weight changes of SGD on the mean cross-entropy of one batch: of the neurons (m, k) and of the head (C, m).

    The neurons are the wide layer's, all of it or in coordinates of a span, and the samples (B, k) in the same.
    """
    act = head.activation
    hot = torch.nn.functional.one_hot(labels, head.classes).to(neurons.dtype)
    wide, last = neurons, head.head
    velocity: tuple[Tensor, Tensor] | None = None
    for _ in range(training.local_steps):
        u = samples @ wide.T
        hidden = act.value(u)
        delta = ((hidden @ last.T).softmax(1) - hot) / len(samples)
        step = (((delta @ last) * act.slope(u)).T @ samples, delta.T @ hidden)
        if velocity is not None and training.momentum:
            step = (step[0] + training.momentum * velocity[0], step[1] + training.momentum * velocity[1])
        velocity = step
        wide = wide - training.learning_rate * step[0]
        last = last - training.learning_rate * step[1]
    return wide - neurons, last - head.head


def fit(
    head: TwoLayerHead,
    wide_change: Tensor,
    head_change: Tensor,
    inputs: Tensor,
    labels: Tensor,
    training: TrainingConfig,
    basis: Tensor,
    iterations: int = 25,
    progress: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Inputs (B, d) in the span of `basis` (d, k) whose training explains the changes best, from an estimate.

    The span is not moved: where the rounding of the new weights has turned its weakest directions, that stays.
    Levenberg-Marquardt on both layers' changes, each over its norm; the Jacobian by forward differentiation.
    """
    neurons = head.wide @ basis
    seen = (wide_change @ basis / wide_change.norm(), head_change / head_change.norm())
    wanted = torch.cat([part.flatten() for part in seen])

    def played(flat: Tensor) -> Tensor:
        first, second = play(head, neurons, flat.reshape(len(inputs), -1), labels, training)
        return torch.cat([(first / wide_change.norm()).flatten(), (second / head_change.norm()).flatten()])

    point = (inputs @ basis).flatten()
    if point.numel() > _MOST_UNKNOWNS:
        return inputs
    eye = torch.eye(point.numel(), dtype=point.dtype, device=point.device)

    def linearise(x: Tensor) -> tuple[Tensor, Callable[[float], Step]]:
        left = wanted - played(x)

        def prepare(gained: float) -> Step:
            del gained
            columns = [vmap(lambda v: jvp(played, (x,), (v,))[1])(part) for part in eye.split(_CHUNK)]
            jacobian = torch.cat(columns)
            gram, right = jacobian @ jacobian.T, jacobian @ left

            def step(damping: float) -> Tensor | None:
                found, failed = torch.linalg.solve_ex(gram + torch.diag(damping * gram.diagonal()), right)
                return None if int(failed) else found

            return step

        return left, prepare

    found, _, _ = levenberg_marquardt(linearise, point, iterations, Damping(), progress=progress)
    return found.reshape(len(inputs), -1) @ basis.T
