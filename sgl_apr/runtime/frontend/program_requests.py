"""Requests and meta information of a program's own expressions, as `RuntimeEndpoint` sends and returns them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from sglang.lang.global_config import global_config
from sglang.lang.ir import SglSamplingParams

from sgl_apr.engine.routing import ROUTING_KEY_FIELD
from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.trajectory.trajectory import Trajectory

PROGRAM_SAMPLING_PARAMS = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty")
ROUTE_VARIABLE = "__apr_route__"  # SGLang copies variables to forks
LOGPROB_PARAMS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


def gen_body(prompt: Mapping[str, Any], params: SglSamplingParams, routing_key: str) -> dict[str, Any]:
    """Return the body of the request of an `sgl.gen`.

    Args:
        prompt: The fields of the body that hold the prompt.
        params: The parameters of the gen, with a regular expression in place of a `dtype`.
        routing_key: The routing key of the program.
    """
    body = {
        **prompt,
        ROUTING_KEY_FIELD: routing_key,
        "sampling_params": {
            "skip_special_tokens": global_config.skip_special_tokens_in_output,
            "spaces_between_special_tokens": global_config.spaces_between_special_tokens_in_out,
            **params.to_srt_kwargs(),
        },
        **{k: v for k in LOGPROB_PARAMS if (v := getattr(params, k)) is not None},
    }
    return body if params.n > 1 else {"rid": new_rid(), **body}  # SGLang makes the ids of a batch itself


def program_routing_key(variables: MutableMapping[str, Any]) -> str:
    """Return the routing key that a program and its forks share. A new one is stored with the program's variables."""
    return str(variables.setdefault(ROUTE_VARIABLE, uuid.uuid4().hex))


def with_ids(body: Mapping[str, Any], encode: Callable[[str], Sequence[int]]) -> dict[str, Any]:
    """Return a body with token ids in place of its text, or of its texts."""
    rest = {name: value for name, value in body.items() if name != "text"}
    match body.get("text"):
        case None:
            return rest
        case str() as text:
            return {**rest, "input_ids": list(encode(text))}
        case texts:
            return {**rest, "input_ids": [list(encode(text)) for text in texts]}


def image_prompt(text: str, images: Sequence[tuple[Any, str]]) -> dict[str, Any]:
    """Return the prompt of a program with an image. The server makes its token ids.

    Args:
        text: The program's text.
        images: The images or videos of the program, each with its data.

    Raises:
        AprError: There are several, which SGLang's front end does not send either.
    """
    if len(images) > 1:
        raise AprError(f"the program has {_name_images(images)}, expected at most one image or video")
    return {"text": text, "image_data": images[0][1]}


def check_no_images(expression: object, images: Sequence[tuple[Any, str]]) -> None:
    """Check that nothing but text stands before an expression that makes a trajectory.

    Raises:
        AprError: The program has an image or a video.
    """
    if images:
        raise AprError(
            f"{expression} follows {_name_images(images)}, expected text only: a trajectory has no images, video or "
            "audio (sgl.gen takes them)"
        )


def _name_images(images: Sequence[tuple[Any, str]]) -> str:
    names = ", ".join(shorten(path) for path, _ in images[:3])
    return f"the image or video {names}" + (f" and {len(images) - 3} more" if len(images) > 3 else "")


def trajectory_meta(trajectory: Trajectory) -> dict[str, Any]:
    """Return what `get_meta_info` returns: SGLang's own fields, summed over the requests, and the trajectory."""
    metrics = trajectory.metrics()
    return {
        "id": None,
        "finish_reason": {"type": trajectory.finish},
        "prompt_tokens": len(trajectory.spans[0].token_ids or ()),
        "completion_tokens": metrics.total,
        "cached_tokens": metrics.cached_tokens,
        "trajectory": trajectory,
    }


def new_rid() -> str:
    """Return a new request id."""
    return f"apr-{uuid.uuid4().hex}"
