"""Renders trajectories as one HTML file that needs no other files: timelines, texts and plots."""

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
# Scripts, in the order in which they depend on one another while they load.
PAGE_SCRIPTS = ["dom", "entries", "graph", "tools", "list", "detail", "drawing", "timeline", "reader", "plots", "overview", "main"]  # fmt: skip
LIVE_SCRIPTS = [*PAGE_SCRIPTS, "run", "saved", "live"]
PLACEHOLDER = re.compile(r"{{(\w+)}}")
# Characters that could end a script element or begin a comment in it, and line breaks of JavaScript that JSON allows.
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
    """Render a page of trajectories.

    The page loads nothing from the network and runs no script but its own. A trajectory is unpacked when it is
    selected. The text of a model is data: in the file no character of it can end its element, and the script only
    ever sets it as text.

    Args:
        entries: The trajectories, in the order of the list.
        title: The title of the page.
        facts: A line below the title.

    Returns:
        The HTML.

    Raises:
        AprError: The token counts of a trajectory are unknown.
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
    """Render the page that a server serves. It sends prompts to that server only, and shows the trajectories live."""
    return _fill_template(
        LIVE_SCRIPTS, {"connect-src": "'self'"},
        title="Live trajectories", facts="", data="", index=_index([]), live=_read("live.html"),
    )  # fmt: skip


def safe_json(value: Any) -> str:
    """Return JSON in ASCII that cannot end an element or begin a comment, whatever text it contains.

    Examples:
        >>> safe_json("</script><!--")
        '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    return json.dumps(value, separators=(",", ":")).translate(JSON_ESCAPES)


def _index(rows: list[Mapping[str, Any]]) -> str:
    """Return the rows as JSON, with the names of the columns only once."""
    columns = list(rows[0]) if rows else []
    return safe_json({"columns": columns, "rows": [list(r.values()) for r in rows]})


def _pack(value: Any) -> str:
    """Return JSON, compressed, in characters that cannot end an element."""
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)).decode()


def _fill_template(scripts: Sequence[str], policy: Mapping[str, str], **parts: str) -> str:
    """Fill the template. Its security policy allows only these scripts and this style, by their hashes."""
    style, script = _read("page.css"), "\n".join(_read(f"{name}.js") for name in scripts)
    allowed = {**SECURITY_POLICY, "script-src": _hash(script), "style-src": _hash(style), **policy}
    parts |= {"policy": "; ".join(map(" ".join, allowed.items())), "style": style, "script": script}
    return PLACEHOLDER.sub(
        lambda slot: parts[slot[1]], _read("page.html")
    )  # one pass: placeholders in parts are not filled


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (WEB_DIRECTORY / name).read_text(encoding="utf-8")
