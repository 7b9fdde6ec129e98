"""An HTML page that needs nothing else: no network, no library, no other file.

Its content security policy allows no script but the page's own: what a prompt or a path holds is only ever text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent.parent / "assets"

text = html.escape
"""What comes from outside goes through here."""


def html_page(title: str, body: Iterable[str], own: str) -> str:
    """A whole page; `own` names its style and script in the assets, as "report" does report/report.css and report.js.

    They come after what all pages share: the look, and tables that sort.
    """
    style, script = (
        "".join((ASSETS / name).read_text(encoding="utf-8") for name in names)
        for names in (("page/page.css", f"{own}/{own}.css"), ("page/sorting.js", f"{own}/{own}.js"))
    )
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>",
            f"<style>{style}</style></head><body>",
            *body,
            f"<script>{script}</script>",
            "</body></html>\n",
        ]
    )


def data_block(name: str, value: Any) -> str:
    """JSON for the page's script, which finds it by the id `name`."""
    # Inside a script element only `</` and `<!--` mean anything.
    block = json.dumps(value).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{block}</script>'


def data_uri(kind: str, contents: bytes) -> str:
    """The address of contents that lie in the page itself; `kind` is such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"


def sorting_heads(headings: Iterable[str]) -> str:
    """The row of headings of a table that a click on one of them sorts."""
    cells = (f"<th><button>{text(name)}</button></th>" if name else "<th></th>" for name in headings)
    return f"<tr>{''.join(cells)}</tr>"


def sorted_cell(shown: str, value: Any, kind: str = "number", below: str = "") -> str:
    """A cell of such a table: what it shows, what it is sorted by, and what stands below in small."""
    small = f'<span class="range">{text(below)}</span>' if below else ""
    # Empty where there is none; infinity as JavaScript spells it.
    value = "" if value is None else str(value).replace("inf", "Infinity") if isinstance(value, float) else str(value)
    return f'<td class="{kind}" data-value="{text(value)}">{text(shown)}{small}</td>'


def fact_list(facts: Mapping[str, Any]) -> str:
    """Names and what they stand for."""
    return "<dl>" + "".join(f"<dt>{text(str(k))}</dt><dd>{text(str(v))}</dd>" for k, v in facts.items()) + "</dl>"


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
