"""Checks the query of a request, where SGLang answers values that it does not know with status 500."""

from __future__ import annotations

from starlette.datastructures import QueryParams

from sgl_apr.runtime.value_checks import shorten
from sgl_apr.server.guard.model_size import ModelSize
from sgl_apr.server.guard.refusal import RequestRefused

LOADS_PATH = "/v1/loads"
ALL_SECTIONS = "all"


def check_loads_query(query: bytes, size: ModelSize) -> None:
    """Check the query of `/v1/loads`. SGLang's route looks up the names in `include` where it handles no error.

    Args:
        query: The query string.
        size: What is known of the server.

    Raises:
        RequestRefused: A name is unknown. The message lists the known ones.
    """
    include = QueryParams(query).get("include")
    sections = {section.strip() for section in include.split(",")} if include else set[str]()
    if ALL_SECTIONS not in sections and not sections <= size.load_sections:
        known = ", ".join(sorted(size.load_sections))
        raise RequestRefused(
            f"include={shorten(include)}, expected some of {known}, separated by commas", "include"
        )
