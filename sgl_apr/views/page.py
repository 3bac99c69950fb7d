"""Trajectories as one HTML file that needs nothing else: timelines, texts and plots; no file of theirs is read here."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_apr.views.page_entry import PageEntry, full_entry, list_row

WEB_DIRECTORY = Path(__file__).parent / "web"
# Scripts, in the order in which they need one another while they are read.
PAGE_SCRIPTS = ["words", "entries", "graph", "list", "detail", "drawing", "timeline", "reader", "plots", "overview", "main"]  # fmt: skip
LIVE_SCRIPTS = [*PAGE_SCRIPTS, "run", "live"]
PLACEHOLDER = re.compile(r"{{(\w+)}}")
# What could end a script element, or begin a comment in it; and what is no line break in JSON but was one in scripts.
JSON_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
SECURITY_POLICY = {
    "default-src": "'none'",
    "img-src": "data:",  # its own icon
    "base-uri": "'none'",
    "form-action": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}


def render_page(entries: Iterable[PageEntry], title: str = "Trajectories", facts: str = "") -> str:
    """A page of trajectories, in their order. It asks no network for anything, and runs no script but its own.

    The list is there at once; a trajectory is unpacked when it is selected. Whatever a model wrote is data: in the
    file no character of it could end the element that it stands in, and the script only ever sets it as text.
    Raises `AprError` for a trajectory whose tokens are unknown.
    """
    rows, packed = list[Mapping[str, Any]](), list[str]()
    for entry in entries:
        rows.append(list_row(entry))
        packed.append(
            f'<script type="text/plain" id="t{len(packed)}">{_pack(full_entry(entry.trajectory))}</script>'
        )
    return _fill_template(
        PAGE_SCRIPTS, {}, title=html.escape(title), facts=html.escape(facts), data="\n".join(packed), index=_index(rows), live=""
    )  # fmt: skip


def render_live_page() -> str:
    """The page that a server serves: it asks that server, and nobody else, for trajectories as they are written."""
    return _fill_template(
        LIVE_SCRIPTS, {"connect-src": "'self'"},
        title="Live trajectories", facts="", data="", index=_index([]), live=_read("live.html"),
    )  # fmt: skip


def safe_json(value: Any) -> str:
    """JSON in ASCII that cannot end an element or begin a comment, whatever text it holds.

    >>> safe_json("</script><!--")
    '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    return json.dumps(value, separators=(",", ":")).translate(JSON_ESCAPES)


def _index(rows: list[Mapping[str, Any]]) -> str:
    """Names once, and the rows without them."""
    columns = list(rows[0]) if rows else []
    return safe_json({"columns": columns, "rows": [list(r.values()) for r in rows]})


def _pack(value: Any) -> str:
    """Deflated, in letters that end nothing."""
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)).decode()


def _fill_template(scripts: Sequence[str], policy: Mapping[str, str], **parts: str) -> str:
    """The page with its style and scripts, which are all that its policy lets run, by their hashes."""
    style, script = _read("page.css"), "\n".join(_read(f"{name}.js") for name in scripts)
    allowed = {**SECURITY_POLICY, "script-src": _hash(script), "style-src": _hash(style), **policy}
    parts |= {"policy": "; ".join(map(" ".join, allowed.items())), "style": style, "script": script}
    return PLACEHOLDER.sub(
        lambda slot: parts[slot[1]], _read("page.html")
    )  # in one pass: parts are not looked into


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (WEB_DIRECTORY / name).read_text(encoding="utf-8")
