"""The page that asks, one for a server and for a file: its markup, style and script, put into one document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def page(data: Mapping[str, Any], nonce: str = "") -> str:
    """The whole document, with `data` for its script; it asks for nothing but a server's ``/api`` and ``/image``.

    `nonce`: of the policy that a server sends. Without one, the document holds its own, which allows no network.
    """
    parts = {
        name: (files(__name__) / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    }
    alone = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    filled = parts["page.html"]
    for mark, content in (
        ("<!--HEAD-->", "" if nonce else f'<meta http-equiv="Content-Security-Policy" content="{alone}">'),
        ("/*NONCE*/", f' nonce="{nonce}"' if nonce else ""),
        ("/*STYLE*/", parts["page.css"]),
        ("/*SCRIPT*/", parts["page.js"]),
        ("/*DATA*/", text),  # last: nothing of it is replaced
    ):
        filled = filled.replace(mark, content)
    return filled
