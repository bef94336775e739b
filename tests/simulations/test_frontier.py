"""The map of where a federation leaks: its cells are runs, and it shows the worst of each beside its floor."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fedattack.config import Config
from fedattack.reporting.frontier import frontier_figure, frontier_table, worst_cells
from simulations.studies import frontier

CURIOUS = {
    "server": "curious server",
    "network": "trained",
    "update": "one pass",
    "images": 4,
    "sent": "everything",
}


def row(
    attack: str, level: str | None, psnr: float = np.nan, floor: float = np.nan, **more: object
) -> dict[str, object]:
    figures = {"psnr": psnr, "floor": floor, "gain": psnr - floor, "status": "done"}
    return {**CURIOUS, "attack": attack, "level": level, **figures, **more}


MAP = pd.DataFrame(
    [
        row("ig", "undecided", 20.0, 13.0),
        row("spear", "leak", 18.0, 12.5),
        row("dlf", "none", 11.0, 13.0),
        row("ig", "none", 11.0, 13.0, images=16),
        row("dlf", "undecided", 14.0, 13.5, images=16),
        row("spear", None, status="refused", images=64),
        row("cah", None, server="malicious: cah"),
        row("imprint", "leak", 60.0, 13.0, server="malicious: imprint"),
        {"server": "malicious: tensor", "network": "trained", "reason": "local training diverged in round 1"},
    ]
)


def test_a_cell_is_what_the_auditor_called_worst_and_malicious_servers_are_one_seat() -> None:
    told = [(cell.server, cell.images, cell.attack, cell.text) for cell in worst_cells(MAP)]
    assert told == [
        ("curious server", 4, "spear", "18.0 / 12.5"),
        ("curious server", 16, "dlf", "14.0 / 13.5"),
        ("curious server", 64, "", "none applies"),
        ("malicious server", 4, "imprint", "60.0 / 13.0"),
    ]
    table = frontier_table(MAP).splitlines()
    assert table[0].endswith(
        "| curious server, trained, everything | malicious server, trained, everything |"
    )
    assert table[2:] == [
        "| one pass | 4 | **18.0 / 12.5 (spear)** | **60.0 / 13.0 (imprint)** |",
        "| one pass | 16 | 14.0 / 13.5 (dlf) |  |",
        "| one pass | 64 | none applies |  |",
    ]
    (axes,) = frontier_figure(MAP).axes
    assert {text.get_text() for text in axes.texts} >= {
        "18.0 / 12.5\nspear",
        "none applies",
        "malicious server",
    }


@pytest.mark.parametrize("seat", frontier.SEATS, ids=lambda seat: seat.label)
def test_every_cell_is_a_request_that_can_be_made(seat: frontier.Seat) -> None:
    cells = frontier._cells(seat, "untrained", {}, False)
    assert len({cell["label"] for cell in cells}) == len(cells) == 3 * 4 * 2
    for cell in cells:
        asked = {key: value for key, value in cell.items() if key != "label"}
        assert Config.from_mapping({"dataset": "cifar10", **asked}).attack.names
