"""The README names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from fedattack.defenses import DEFENSES
from fedattack.unlearning import MECHANISMS
from fedattack.unlearning.gates import GATES
from simulations.cli.catalogue import attacks_markdown

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_attacks_is_the_one_that_the_command_writes() -> None:
    rows = re.search(r"^\| attack \| who .*\n\|[-|]+\n(?:\|.*\n)+", README, re.M)
    assert rows is not None
    assert rows[0] == attacks_markdown(), "paste what `fedattack list attacks --markdown` writes"


def test_every_path_and_mechanism_is_there() -> None:
    paths = set(re.findall(r"`((?:fedattack|adversaries|strategies|simulations)/[\w/.]+)`", README))
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert all(f"`{name}`" in README for name in (*MECHANISMS, *GATES))


def test_every_defence_is_named() -> None:
    paragraph = re.search(r"^\*\*Defences\*\*.*?\n\n", README, re.M | re.S)
    assert paragraph is not None
    assert set(DEFENSES.names()) <= set(re.findall(r"`([\w-]+)`", paragraph[0]))
