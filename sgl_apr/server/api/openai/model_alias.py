"""The model name `NAME:apr`, with which clients get a trajectory that cannot send the object `apr`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import ORJSONResponse

from sgl_apr.server.hooks import require_sglang

ALIAS_SUFFIX = ":apr"
HTTP_SERVER = "sglang.srt.entrypoints.http_server"


def has_alias(model: str, served_model: str) -> bool:
    """Return whether a request asks for a trajectory by the name of its model, as in `NAME:apr`."""
    return model.endswith(ALIAS_SUFFIX) and model != served_model


def make_models_router(get_manager: Callable[[], Any]) -> APIRouter:
    """Return the routes that list models. They add the alias to what SGLang's routes return.

    Args:
        get_manager: Returns SGLang's TokenizerManager.

    Raises:
        LaunchError: SGLang has no such routes.
    """
    list_stock = require_sglang(f"{HTTP_SERVER}:available_models")
    retrieve_stock = require_sglang(f"{HTTP_SERVER}:retrieve_model", ["model"])
    make_card = require_sglang("sglang.srt.entrypoints.openai.protocol:ModelCard")

    def alias_card() -> Any:
        manager = get_manager()
        name = manager.served_model_name
        return make_card(
            id=f"{name}{ALIAS_SUFFIX}", root=name, parent=name, max_model_len=manager.model_config.context_len
        )

    async def available_models() -> Any:
        """Show available models, the alias for trajectories included. OpenAI-compatible endpoint."""
        models = await list_stock()
        models.data.append(alias_card())
        return models

    async def retrieve_model(model: str) -> Any:
        """Retrieve a model, or the alias for trajectories."""
        card = alias_card()
        return card if model == card.id else await retrieve_stock(model)

    router = APIRouter(default_response_class=ORJSONResponse)
    router.add_api_route("/v1/models", available_models, methods=["GET"])
    router.add_api_route("/v1/models/{model:path}", retrieve_model, methods=["GET"])
    return router
