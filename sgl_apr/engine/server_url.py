"""The URL of a server, as a user writes it."""

from __future__ import annotations

from urllib.parse import urlsplit

from sgl_apr.errors import AprError


def normalize_url(url: object) -> str:
    """Return the URL of a server with its scheme, and without a slash at the end.

    Examples:
        >>> normalize_url("localhost:30000/")
        'http://localhost:30000'

    Raises:
        AprError: It is no URL of an HTTP server.
    """
    text = url.strip() if isinstance(url, str) else ""
    full = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(full)
        is_url = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:  # of a port that is no number
        is_url = False
    if not is_url or any(c.isspace() for c in full):
        raise AprError(
            f"the URL of the server is {str(url)[:80]!r}, expected one such as http://127.0.0.1:30000"
        )
    return full.rstrip("/")
