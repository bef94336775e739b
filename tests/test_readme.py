"""The README names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from fedattack.defenses import DEFENSES
from simulations.cli.catalogue import attacks_markdown

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_attacks_is_the_one_that_the_command_writes() -> None:
    rows = re.search(r"^\| attack \| who .*\n\|[-|]+\n(?:\|.*\n)+", README, re.M)
    assert rows is not None
    assert rows[0] == attacks_markdown(), "paste what `fedattack list attacks --markdown` writes"


def test_every_defence_is_named() -> None:
    paragraph = re.search(r"^\*\*Defences\*\*.*?\n\n", README, re.M | re.S)
    assert paragraph is not None
    assert set(DEFENSES.names()) <= set(re.findall(r"`([\w-]+)`", paragraph[0]))
