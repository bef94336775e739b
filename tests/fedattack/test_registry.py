"""Plug-ins by name."""

from __future__ import annotations

import json

import pytest

from fedattack.errors import ConfigError
from fedattack.registry import Registry


def test_get_by_name_and_by_path() -> None:
    registry: Registry[type] = Registry("codec", {"json": "json:JSONDecoder"})
    assert registry.get("json") is json.JSONDecoder
    assert registry.get("json:JSONEncoder") is json.JSONEncoder
    assert registry.names() == ["json"]
    assert registry.summary("json").startswith("Simple JSON")
    registry.add("enc", "json:JSONEncoder")
    assert "enc" in registry


def test_unknown_names_answer_with_the_nearest() -> None:
    registry: Registry[type] = Registry("attack", {"hcgla": "json:JSONDecoder", "fedmia": "json:JSONEncoder"})
    with pytest.raises(ConfigError, match="unknown attack 'hcgal'; did you mean 'hcgla'"):
        registry.get("hcgal")
    with pytest.raises(ConfigError, match="cannot load attack"):
        registry.get("no.such.module:Thing")
    with pytest.raises(ConfigError, match="cannot load attack"):
        registry.get("json:Nothing")
