"""Checks the headers that tell who sends a request: `Host`, `Origin`, `Sec-Fetch-Site` and `Content-Type`.

A web page of any site can make its visitor's browser send requests to this server. Without these checks, such a page
could use a server that listens on the visitor's own machine.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.refusal import RequestRefused

DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
OPEN_PAGES = ("/apr/ui", "/", "/docs", "/redoc")  # a page of another site may have a link to these
FORM_PATHS = ("/v1/audio/transcriptions",)  # these take multipart/form-data
FORM_TYPE = "multipart/form-data"

Headers = Mapping[bytes, bytes]


@lru_cache(maxsize=64)  # nearly all requests name the same host
def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's loopback."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def split_host(netloc: str, scheme: str) -> tuple[str, int | None] | None:
    """Return the name and the port of a host, or None if it is malformed."""
    try:
        parts = urlsplit(f"//{netloc}")
        port = parts.port
    except ValueError:
        return None
    if not parts.hostname:
        return None
    return parts.hostname.rstrip("."), port or DEFAULT_PORTS.get(scheme)


def check_host(headers: Headers, scheme: str, limits: GuardLimits, *, loopback: bool) -> None:
    """Check the header `Host`, so that a name which an attacker points to this machine is not served.

    Args:
        headers: The headers by name, in lower case.
        scheme: The scheme of the request.
        limits: The limits.
        loopback: Whether the server listens on loopback only. Elsewhere any name is served, unless the operator
            gives names.

    Raises:
        RequestRefused: The name is not served.
    """
    value = headers.get(b"host")
    if value is None or "*" in limits.hosts or not (loopback or limits.hosts):
        return
    host = split_host(value.decode("latin-1"), scheme)
    if host is None or not (is_loopback(host[0]) or host[0] in limits.hosts):
        raise RequestRefused(
            f"Host is {value.decode('latin-1')[:100]!r}, expected localhost or a name of --apr-allow-host", "Host", 421
        )  # fmt: skip


def check_origin(headers: Headers, scheme: str, method: str, path: str, limits: GuardLimits) -> None:
    """Check that a browser sends the request for a page of this server, or of an allowed origin.

    Clients that are no browsers send neither of the headers.

    Raises:
        RequestRefused: A page of another origin sends it.
    """
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
    if (origin is None and site is None) or "*" in limits.origins:
        return
    if origin is not None:
        text = origin.decode("latin-1").lower().rstrip("/")
        if text in limits.origins or _is_same_origin(text, headers, scheme):
            return
        raise RequestRefused(
            f"Origin is {text[:100]!r}, expected this server's or one of --apr-allow-origin", "Origin", 403
        )
    if site in (b"same-origin", b"none"):
        return
    if method in ("GET", "HEAD") and path in OPEN_PAGES and headers.get(b"sec-fetch-mode") == b"navigate":
        return
    raise RequestRefused(
        "a web page of another site sent the request, expected one of --apr-allow-origin",
        "Sec-Fetch-Site",
        403,
    )


def _is_same_origin(origin: str, headers: Headers, scheme: str) -> bool:
    origin_scheme, _, netloc = origin.partition("://")
    host = headers.get(b"host", b"").decode("latin-1")
    # A proxy may end TLS, so the scheme is the origin's for both.
    own = split_host(host, origin_scheme)
    return own is not None and own == split_host(netloc, origin_scheme)


def check_content_type(headers: Headers, path: str) -> None:
    """Check that a body is JSON by its content type. A browser asks before it sends that type to another site.

    Raises:
        RequestRefused: It has another type or none.
    """
    value = headers.get(b"content-type", b"").decode("latin-1")
    media_type = value.partition(";")[0].strip().lower()
    if path in FORM_PATHS and media_type == FORM_TYPE:
        return
    is_json = media_type.startswith("application/") and media_type.endswith(("/json", "+json"))
    if not is_json:
        found = repr(value[:100]) if value else "missing"
        raise RequestRefused(
            f"Content-Type is {found}, expected application/json (curl: -H 'Content-Type: application/json')",
            "Content-Type",
            415,
        )
