"""The benchmark of one matching iteration runs, and compares equal things."""

from __future__ import annotations

import pytest
import torch

from fedattack.errors import RunFailed
from simulations.bench import hcgla_iteration


def test_quick_run_agrees_with_the_dense_reference() -> None:
    figures = hcgla_iteration.run(quick=True)
    assert figures["objective_error"] < 1e-4
    assert figures["gradient_error"] < 1e-3
    assert figures["sent_entries"] == round(0.001 * 7_834_249)
    assert figures["speedup_one_victim"] > 1
    assert figures["speedup_batched"] > 1


def test_a_disagreement_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = hcgla_iteration._sparse

    def wrong(*arguments: object) -> hcgla_iteration.Evaluation:
        evaluate = honest(*arguments)  # type: ignore[arg-type]

        def shifted() -> tuple[torch.Tensor, torch.Tensor]:
            objective, slope = evaluate()
            return objective * 1.001, slope

        return shifted

    monkeypatch.setattr(hcgla_iteration, "_sparse", wrong)
    with pytest.raises(RunFailed, match="disagree"):
        hcgla_iteration.run(quick=True)
