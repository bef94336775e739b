"""The README names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from adversaries import ATTACKS
from fedattack.defenses import DEFENSES

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_attacks_names_exactly_the_registered_ones() -> None:
    rows = re.search(r"^\| attack \| who .*\n\|[-|]+\n((?:\|.*\n)+)", README, re.M)
    assert rows is not None
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]
    assert sorted(name.strip("`") for name, *_ in cells) == sorted(ATTACKS.names())
    for name, who, *others in cells:
        assert who == ATTACKS.get(name.strip("`")).seat
        assert all(others)


def test_every_defence_is_named() -> None:
    paragraph = re.search(r"^\*\*Defences\*\*.*?\n\n", README, re.M | re.S)
    assert paragraph is not None
    assert set(DEFENSES.names()) <= set(re.findall(r"`([\w-]+)`", paragraph[0]))
